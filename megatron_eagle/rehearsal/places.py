"""Where in the code something happens: the innermost line of this project or of Megatron."""

import sys
import threading
from functools import lru_cache
from pathlib import Path
from types import FrameType

_ROOT = Path(__file__).parents[2]
_SELF = Path(__file__).parent.name
_DEVICE_THREAD = "backward"  # autograd's own threads have no lines above them


@lru_cache(maxsize=4096)
def _short(filename: str) -> str | None:
    """A file's name as a place has it; None: of neither."""
    path = Path(filename)
    if f"/megatron_eagle/{_SELF}/" in filename:
        return None
    if path.is_relative_to(_ROOT / "megatron_eagle") or path.is_relative_to(_ROOT / "kernels"):
        return str(path.relative_to(_ROOT))
    _, found, rest = filename.partition("/megatron/core/")
    return f"megatron/core/{rest}" if found else None


def place(depth: int = 1) -> str:
    """The innermost `depth` lines, as `file:line function`."""
    found: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(found) < depth:
        name = _short(frame.f_code.co_filename)
        if name is not None:
            found.append(f"{name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(found) or _DEVICE_THREAD


def within(function: str) -> bool:
    """Whether a function of this name runs here, or autograd in a thread of its own."""
    if threading.current_thread() is not threading.main_thread():
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == function and _short(frame.f_code.co_filename) is not None:
            return True
        frame = frame.f_back
    return False
