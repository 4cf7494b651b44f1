"""A run, from its file to its last step."""
