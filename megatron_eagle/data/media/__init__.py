"""Reading pictures and videos."""
