"""The tiny model of the conversion tests."""

from tests.convert.conftest import checkpoint, exported, source

__all__ = ["checkpoint", "exported", "source"]
