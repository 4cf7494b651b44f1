"""What an export has made of media, in numbers and hashes, so that two places can be compared.

`megatron-eagle convert certify` asks for it. A request whose `mm_processor_kwargs` have `"seen"`, a number
that nobody else can guess, finds what the server has made of its media once, under that number alone
(`settings`). Nothing else is kept, of the pictures themselves nothing at all.
"""

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

_MOST_KEPT = 64  # requests of which nobody has asked yet
_NUMBER = re.compile("[0-9a-f]{32}")


def describe_medium(
    export: Any, item: Any, said: Any, pixels: Any, tiling: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a processor has made of a picture or a video.

    Args:
        export: the processor.
        item: PIL image, or `VideoFrames`.
        said, pixels: what its `show` gave: `PromptMedium`, tiles [n, 3, S, S].
        tiling: what `show` was given.
    """
    grids = [[1, 1] for _ in said.tiles]
    if said.fps is None:
        limits = {name: value for name, value in (tiling or {}).items() if name != "use_thumbnail"}
        grids = [list(export.image_processor.grid(item.width, item.height, **limits))]
    return medium_facts(grids, said.tiles, getattr(item, "numbers", None), said.times, said.fps, pixels)


def medium_facts(
    grids: Any, tiles: Any, frames: Any, times: Any, fps: float | None, pixels: Any
) -> dict[str, Any]:
    """The form in which media are compared; times to a microsecond, pixels fp32 [n, 3, S, S] bit by bit."""
    return {
        "kind": "picture" if fps is None else "video",
        "frames": None if frames is None else [int(number) for number in frames],
        "times": [round(float(time), 6) for time in times],
        "fps": None if fps is None else round(fps, 6),
        "grids": [list(grid) for grid in grids],
        "tiles": list(tiles),
        "pixels": tensor_hash(pixels),
    }


def tensor_hash(tensor: Any) -> str:
    """SHA-256 of a tensor's values in fp32, bit by bit."""
    return hashlib.sha256(tensor.float().contiguous().numpy().tobytes()).hexdigest()


class SeenMedia:
    """What the latest requests that asked for it were made into, each until it is taken."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, list[dict[str, Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, number: Any, media: list[dict[str, Any]]) -> None:
        """Keep it under a request's number.

        Raises:
            ValueError: no such number.
        """
        if not isinstance(number, str) or not _NUMBER.fullmatch(number):
            raise ValueError("seen must be 32 hexadecimal digits, chosen at random")
        with self._lock:
            self._kept[number] = media
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)

    def take(self, number: str) -> list[dict[str, Any]] | None:
        """What was kept under a number, once; None: nothing."""
        with self._lock:
            return self._kept.pop(number, None)


SEEN = SeenMedia()  # of this process: its requests and those who ask for them meet here
