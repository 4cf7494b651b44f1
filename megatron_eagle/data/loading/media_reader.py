"""The media of stored samples, of which a rank reads the tiles that it decodes.

Of a video only the wanted frames are decoded.  A picture is decoded and resized whole whatever part of it is
wanted: resizing mixes neighbouring pixels, and tiles must not depend on who asks for them.
"""

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from megatron_eagle.data.loading.packs import FailedMedium, LoadedPack, P, PlannedPack
from megatron_eagle.data.media.deadline import TOO_LONG
from megatron_eagle.data.media.decoder import MediaDecoder
from megatron_eagle.data.store.reader import ImagePlan, Rows, VideoPlan
from megatron_eagle.errors import UserError
from megatron_eagle.problems import Problem


@dataclass(frozen=True)
class Medium:
    """A picture, a page or a video; `source` is FILE:LINE of the annotation that uses it."""

    plan: ImagePlan | VideoPlan
    max_pixels: int  # that a picture may have
    row: int
    source: str

    @property
    def n_tiles(self) -> int:
        return self.plan.n_tiles if isinstance(self.plan, ImagePlan) else len(self.plan.frames)

    def load(self, decoder: MediaDecoder, tiles: range | None = None) -> torch.Tensor:
        """Some of its tiles, or all: uint8 [n, 3, S, S].

        Raises:
            Problem: a file that has changed since it was preprocessed or can no longer be read, and as the
                decoder says.
        """
        plan, wanted = self.plan, slice(None) if tiles is None else slice(tiles.start, tiles.stop)
        if isinstance(plan, VideoPlan):
            return decoder.frames(plan.path, plan.index, plan.frames[wanted])[0]
        grid = plan.columns, plan.rows
        return decoder.picture(plan.path, grid, max_pixels=self.max_pixels, file=plan.file)[wanted]


def media_of_row(store: Rows, row: int) -> list[Medium]:
    """The media of a row, in the order in which its text shows them."""
    sample = store[row]
    source = f"{sample.file}:{sample.line}"
    plans = [sample.images[i] if i >= 0 else sample.videos[-1 - i] for i in sample.media_order]
    return [Medium(plan, store.manifest.max_pixels, row, source) for plan in plans]


class MediaReader:
    """Reads the tiles of packs that their plans name, several media at the same time."""

    def __init__(self, store: Rows, decoder: MediaDecoder, threads: int, *, pin_memory: bool):
        self._store, self._decoder, self._threads = store, decoder, threads
        self._pin_memory = pin_memory
        self._pool = ThreadPoolExecutor(threads, "media")

    def read(self, packs: Sequence[PlannedPack[P]]) -> tuple[list[LoadedPack[P]], dict[int, FailedMedium]]:
        """The packs with their pixels; what cannot be read is 0 there and returned, by sample number.

        All media are handed to the threads before the first is waited for.  When as many as there are threads
        took too long, those not begun are given up: the storage is gone, and each would take as long.
        """
        reading = [
            (place, own, self._pool.submit(self._load, own))
            for place, pack in enumerate(packs)
            for own in self._own(pack)
        ]
        pixels = [self._black(pack.plan.tiles) for pack in packs]
        reading.reverse()
        failures: dict[int, FailedMedium] = {}
        overdue = 0
        while reading:  # what is copied is let go at once
            place, own, future = reading.pop()
            into = pixels[place]
            assert into is not None, "who takes no pixels reads no media"
            try:
                into[own.places] = future.result()
            except UserError:
                raise
            except Exception as error:  # a decoder may raise anything for a broken file
                overdue += isinstance(error, Problem) and error.kind == TOO_LONG
                if overdue == self._threads:
                    for *_, later in reading:
                        later.cancel()
                medium, path = own.medium, own.medium.plan.path
                failed = FailedMedium(medium.row, medium.source, path, _reason(error, path))
                failures.setdefault(own.sample, failed)
        loaded = [
            LoadedPack(**vars(pack), pixel_values=black) for pack, black in zip(packs, pixels, strict=True)
        ]
        return loaded, failures

    def blank(self, pack: LoadedPack[P], samples: Collection[int]) -> None:
        """Take the pixels of samples, by their numbers in the global batch, out of a pack: in place, for they
        are most of its bytes."""
        if pack.pixel_values is None:
            return
        for own in self._own(pack):
            if own.sample in samples:
                pack.pixel_values[own.places] = 0

    def close(self) -> None:
        """Begin nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, own: "_OwnTiles") -> torch.Tensor:
        try:
            return own.medium.load(self._decoder, own.tiles)
        except Exception:
            # A store that is made gets another place when it is complete, and its own media with it.
            again = media_of_row(self._store, own.medium.row)[own.number]
            if again.plan.path == own.medium.plan.path:
                raise
            return again.load(self._decoder, own.tiles)

    def _black(self, tiles: range | None) -> torch.Tensor | None:
        if tiles is None:
            return None
        size = self._store.manifest.tile_size
        return torch.zeros(len(tiles), 3, size, size, dtype=torch.uint8, pin_memory=self._pin_memory)

    def _own(self, pack: PlannedPack[P]) -> Iterator["_OwnTiles"]:
        """What this rank reads of a pack."""
        tiles = pack.plan.tiles
        if not tiles:
            return
        start = 0
        for sample in pack.samples:
            for place, medium in enumerate(media_of_row(self._store, sample.row)):
                first, last = max(start, tiles.start), min(start + medium.n_tiles, tiles.stop)
                if first < last:
                    places = slice(first - tiles.start, last - tiles.start)
                    yield _OwnTiles(sample.number, medium, place, range(first - start, last - start), places)
                start += medium.n_tiles


@dataclass(frozen=True)
class _OwnTiles:
    """Tiles of a medium that a rank reads."""

    sample: int  # its number in the global batch
    medium: Medium
    number: int  # the medium's among those of its row
    tiles: range  # which of the medium's
    places: slice  # theirs in the pack's `pixel_values`


def _reason(error: Exception, path: str) -> str:
    if isinstance(error, CancelledError):
        return f"not read: {path}: too many before it took too long"
    return str(error) if isinstance(error, Problem) else f"{path}: {type(error).__name__}: {error}"
