"""What a run does when a step, a sample or a node fails."""
