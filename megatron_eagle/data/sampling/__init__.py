"""Which tiles and frames of a sample are shown."""
