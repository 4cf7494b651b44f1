"""The media of a stored sample, of which a rank reads the tiles that it decodes.

Of a video only the wanted frames are decoded.  A picture is decoded and resized whole whatever part of it is
wanted: resizing mixes neighbouring pixels, and tiles must not depend on who asks for them.
"""

from dataclasses import dataclass

import torch

from megatron_eagle.data.media.decoder import MediaDecoder
from megatron_eagle.data.media.tiles import normalize
from megatron_eagle.data.store import ImagePlan, SampleStore, VideoPlan


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
        """Some of its tiles, or all: float32 [n, 3, S, S] in [-1, 1].

        Raises `Problem` for a file that has changed since it was preprocessed or can no longer be read, and
        as the decoder says.
        """
        plan, wanted = self.plan, slice(None) if tiles is None else slice(tiles.start, tiles.stop)
        if isinstance(plan, VideoPlan):
            return normalize(decoder.frames(plan.path, plan.index, plan.frames[wanted])[0])
        grid = plan.columns, plan.rows
        whole = decoder.picture(plan.path, grid, max_pixels=self.max_pixels, file_size=plan.file_size)
        return normalize(whole[wanted])


def sample_media(store: SampleStore, row: int) -> list[Medium]:
    """The media of a row, in the order in which its text shows them."""
    sample = store[row]
    source = f"{sample.file}:{sample.line}"
    plans = [sample.images[i] if i >= 0 else sample.videos[-1 - i] for i in sample.media_order]
    return [Medium(plan, store.manifest.max_pixels, row, source) for plan in plans]
