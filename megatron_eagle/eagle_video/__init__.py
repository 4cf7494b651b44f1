"""The Eagle-Video pipeline: which videos are new, and training samples about them written by other models."""
