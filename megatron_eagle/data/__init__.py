"""From annotation files and media to batches: the one direction in which data walks."""
