"""The tiny model of the conversion tests in its three forms."""

from tests.convert.conftest import broken, checkpoint, exported, source

__all__ = ["broken", "checkpoint", "exported", "source"]
