"""A past step of a run, made again."""
