"""Scores of an exported model on benchmarks."""
