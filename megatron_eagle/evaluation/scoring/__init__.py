"""Rules of single benchmarks' authors that are more than one comparison: one module a benchmark."""
