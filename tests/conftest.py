"""Settings of the whole test run."""

from hypothesis import settings

# Shared machines stall: a slow example is no failure. The same examples every time keep CI reproducible.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")
