"""An export, as the converter's tests make it."""

from tests.convert.conftest import checkpoint, exported, source

__all__ = ["checkpoint", "exported", "source"]
