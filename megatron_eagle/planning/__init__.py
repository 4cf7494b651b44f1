"""Before a run: memory, time and layouts by formula."""
