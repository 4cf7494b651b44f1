"""Benchmarks in the forms their authors publish, read into records of `evaluation.benchmarks`."""
