"""Media to tiles, by the back end that a run asks for: `exact` on the CPU, or `dali`.

Shapes: n tiles, S tile size in pixels.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from megatron_eagle.data.media.deadline import within_deadline
from megatron_eagle.data.media.exact import upright_frames
from megatron_eagle.data.media.frame_table import FrameIndex
from megatron_eagle.data.media.images import load_image
from megatron_eagle.data.media.remote.files import ONLY_LOCAL, MediaAccess
from megatron_eagle.data.media.source import FileMetadata, check_size, check_unchanged
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.tiles import image_tiles, resize

BACKENDS = ("auto", "exact", "dali")


class ExactDecoder:
    """PyAV, Pillow and torch: every frame is the right one or an error, on any machine."""

    def __init__(self, tile_size: int, fell_back: Callable[[str, str], None]):
        self._tile_size, self._fell_back = tile_size, fell_back

    def frames(self, path: str, index: FrameIndex) -> torch.Tensor:
        """All frames of an index as uint8 [n, 3, S, S]; each is resized before the next one is decoded."""
        size = self._tile_size
        tiles = torch.empty(len(index.numbers), 3, size, size, dtype=torch.uint8)
        for i, picture in enumerate(self.pictures(path, index)):
            tiles[i] = resize(picture, size, size)
        return tiles

    def pictures(self, path: str, index: FrameIndex) -> Iterator[np.ndarray]:
        """The same frames one by one, upright, at the size of the file: uint8 [h, w, 3]."""

        def went_linear(why: str) -> None:
            why = why if why == index.linear_reason else "a seek did not lead to its frames"
            self._fell_back(f"from the start of the file: {why}", path)

        yield from upright_frames(path, index, went_linear)

    def picture(self, path: str, grid: tuple[int, int], *, max_pixels: int) -> torch.Tensor:
        """See `MediaDecoder.picture`."""
        return image_tiles(np.array(load_image(path, max_pixels=max_pixels)), grid, self._tile_size)

    def close(self) -> None:
        """Nothing to let go."""


class _Backend(Protocol):
    """`ExactDecoder`, or `DaliDecoder` where DALI is installed."""

    def frames(self, path: str, index: FrameIndex) -> torch.Tensor: ...

    def picture(self, path: str, grid: tuple[int, int], *, max_pixels: int) -> torch.Tensor: ...

    def close(self) -> None: ...


class MediaDecoder:
    """Decodes media into tiles on the host; many threads may ask at the same time, of one process.

    `backend` is exact, dali, or auto: dali on a CUDA `device` if it is installed, else exact.  `name` and
    `reason` say what was chosen and why.  `timeout` is how many seconds decoding one medium may take (None:
    no limit), `files` gives those that are remote.
    `fallbacks` counts, by how and why, the media that are decoded in a slower way than others: exactly and
    not by DALI, or from the start of the file; `report` gets a line at the first of each.

    Raises:
        UserError: an unknown back end, and for dali if it is not installed.
    """

    def __init__(
        self,
        backend: str,
        *,
        tile_size: int,
        device: str | torch.device = "cpu",
        timeout: float | None = None,
        files: MediaAccess = ONLY_LOCAL,
        report: Callable[[str], None] = print,
    ):
        device = torch.device(device)
        self.name, self.reason = choose_decoder(backend, device)
        self._timeout, self._files, self._report = timeout, files, report
        self.fallbacks: Counter[str] = Counter()
        self._backend: _Backend
        if self.name == "exact":
            self._backend = ExactDecoder(tile_size, self._fell_back)
        else:
            from megatron_eagle.data.media.dali import DaliDecoder

            self._backend = DaliDecoder(tile_size, device, timeout=timeout, fell_back=self._fell_back)

    def frames(
        self, source: str, index: FrameIndex, frame_numbers: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The frames with these numbers, in any order, repetitions included.

        `index` is that of the file (`read_frame_table(source).index`) or what a store kept of it
        (`VideoPlan.index`).  Returns upright tiles uint8 [n, 3, S, S] and their times float64 [n] in seconds
        of the file's own clock.

        Raises:
            Problem: a number that the index does not have, a file that is not the one that was indexed, a
                frame that does not decode whole, and one that does not in time.
        """
        chosen = index.select(frame_numbers)
        order = torch.from_numpy(np.searchsorted(chosen.numbers, frame_numbers))

        with self._files.local(source, index.file) as local:

            def decode() -> torch.Tensor:
                check_unchanged(local, index.file, index.fingerprint)
                return self._backend.frames(local, chosen)

            tiles = within_deadline(self._timeout, local, decode)
        if len(order) > len(tiles) or (order.diff() < 0).any():
            tiles = tiles[order]
        return tiles, torch.from_numpy(chosen.times)[order]

    def picture(
        self, path: str, grid: tuple[int, int], *, max_pixels: int, file: FileMetadata | None = None
    ) -> torch.Tensor:
        """A picture in its grid (columns, rows) of tiles, uint8 [n, 3, S, S]: see `tiles.image_tiles`.

        Raises:
            Problem: it cannot be read, or not in time, or does not have the bytes of `file`, which it was.
        """
        with self._files.local(path, file) as local:

            def decode() -> torch.Tensor:
                if file is not None:
                    check_size(local, file.size)
                return self._backend.picture(local, grid, max_pixels=max_pixels)

            return within_deadline(self._timeout, local, decode)

    def close(self) -> None:
        """Let the back end's threads and memory go."""
        self._backend.close()

    def _fell_back(self, how: str, path: str) -> None:
        self.fallbacks[how] += 1
        if self.fallbacks[how] == 1:
            self._report(f"media: decoded {how} (first: {path})")


def choose_decoder(backend: str, device: torch.device) -> tuple[str, str]:
    """The back end's name and why; DALI is imported only if it may be taken."""
    if backend not in BACKENDS:
        raise UserError(f"data.decoder must be one of {', '.join(BACKENDS)}, got {backend}")
    if backend == "auto" and device.type != "cuda":
        return "exact", "no GPU"
    if backend == "exact":
        return "exact", "asked for"
    try:
        import nvidia.dali.fn  # noqa: F401
    except ImportError as error:
        if backend == "auto":
            return "exact", f"DALI cannot be imported ({error})"
        raise UserError(
            f"data.decoder=dali: DALI cannot be imported ({error}); install megatron-eagle[dali]"
        ) from None
    return "dali", "asked for" if backend == "dali" else "there is a GPU, and DALI is installed"
