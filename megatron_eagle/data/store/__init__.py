"""The rows on disk: tokens, labels, references to media."""
