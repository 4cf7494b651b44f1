"""Samples of a token store: what training's loader hands to the model, and the same as messages.

Packs are read as in training, with its loader and its decoder. What is handed to the processor is told back
from the store (`told_back`): the conversation, files, and of each video the clip and the number of frames
that were chosen.
"""

import io
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_eagle.certify.told_back import Told, UntoldError, tell_back
from megatron_eagle.certify.view import View
from megatron_eagle.data.loading.loader import DataConfig, PackLoader
from megatron_eagle.data.loading.packs import LoadedPack, PackedSample, TilesAlone, TokenPack
from megatron_eagle.data.media.images import load_image
from megatron_eagle.data.media.source import open_bytes, page_ref
from megatron_eagle.data.sample import VideoSource
from megatron_eagle.data.sampling.probe import VideoMetadata, probe_video
from megatron_eagle.data.store.reader import ImagePlan, SampleStore, StoredSample, VideoPlan
from megatron_eagle.data.text.template import Template
from megatron_eagle.data.text.tokenizer import load_tokenizer
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.grids import select_grid
from megatron_eagle.hf_model.media_files import DEFAULT_FPS, DEFAULT_MAX_FRAMES, DEFAULT_MIN_FRAMES
from megatron_eagle.hf_model.tiles import normalize
from megatron_eagle.hf_model.vllm_plugin.seen import medium_facts
from megatron_eagle.problems import Problem


@dataclass(frozen=True)
class Asked:
    """A sample to be put to every path.

    Attributes:
        line: of its annotation.
        training: what training sees of it.
        pixels: its tiles, fp32 [n, 3, S, S] in the order of the text; None without media.
        messages: for an exported processor.
        max_tiles: of a picture, as the store's token limit left them; None without pictures.
        refused: why it cannot be asked as training sees it.
        first_position: of its first token.
    """

    name: str
    line: int
    training: View
    pixels: Tensor | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    max_tiles: int | None = None
    refused: str | None = None
    first_position: int = 0


class AskedOfStore:
    """Samples of a store at its longest length, from packs that are spread over all of it.

    Args:
        cutting: how the export cuts pictures: `tile_size`, `tiling`, `max_tiles`.
        tokens_per_tile: of the export.

    Raises:
        UserError: no store, one without packs, or one that was made for another kind of model.
    """

    def __init__(self, path: Path, cutting: Mapping[str, Any], tokens_per_tile: int) -> None:
        self.store = SampleStore(path)
        self.manifest = manifest = self.store.manifest
        sides = {
            "tile size": (manifest.tile_size, cutting["tile_size"]),
            "tokens of a tile": (manifest.tokens_per_tile, tokens_per_tile),
            "rule of grids": (manifest.sampling.get("tiling", "iap"), cutting["tiling"]),
        }
        for what, (ours, theirs) in sides.items():
            if ours != theirs:
                raise UserError(
                    f"{path}: its {what} is {ours}, that of the export {theirs}; name a store of this model"
                )
        self._cutting = cutting
        self._tokenizer = load_tokenizer(path / "tokenizer")
        self._template, self._served = self._variant(manifest.template), self._variant("hf")
        config = DataConfig(str(path), self.store.length, prefetch=False, decoder="exact")
        self._loader: PackLoader[TilesAlone] = PackLoader(
            config, global_batch_size=1, data_parallel_rank=0, data_parallel_size=1, plan=_every_tile
        )

    def _variant(self, name: str) -> Template:
        return Template(self._tokenizer, name, self.manifest.tokens_per_tile)

    def by_design(self) -> list[str]:
        """What differs between training and answers in this store without being a fault."""
        manifest, found = self.manifest, []
        if manifest.template != "hf":
            found.append(
                f"template: the store has the variant {manifest.template!r}; ids are those of its samples "
                "written by training's code in the variant 'hf', as every processor writes them"
            )
            ours, theirs = self._template.default_system, self._served.default_system
            found.append(f"default system prompt: {ours!r} in the store, {theirs!r} in answers")
        settings = manifest.sampling
        found.append(
            f"frames of a video: {settings['min_frames']} to {settings['max_frames']} at "
            f"{settings['fps']:g} fps in the store, {DEFAULT_MIN_FRAMES} to {DEFAULT_MAX_FRAMES} at "
            f"{DEFAULT_FPS:g} fps in answers unless they are told; here they are told how many"
        )
        if settings["max_tiles"] != self._cutting["max_tiles"]:
            found.append(
                f"tiles of a picture: up to {settings['max_tiles']} in the store, up to "
                f"{self._cutting['max_tiles']} in answers unless they are told; here they are told"
            )
        return found

    def read(self, count: int | None) -> Iterator[Asked]:
        """So many samples, or as many as there are (None: all).

        Raises:
            UserError: a medium that cannot be read.
        """
        n_packs = self._loader.packs_per_epoch
        wanted = len(self.store) if count is None else min(count, len(self.store))
        n_read = min(n_packs, wanted)
        places = [i * n_packs // n_read for i in range(n_read)]
        sizes = [self._loader.n_samples(place) for place in places]
        each = next(n for n in itertools.count(1) if sum(min(size, n) for size in sizes) >= wanted)
        try:
            for place in places:
                batch = self._loader.step(place)
                for failed in batch.failures.values():
                    raise UserError(f"{failed.source}: {failed.reason}")
                (pack,) = batch.microbatches
                for sample in pack.samples[: min(each, wanted)]:
                    wanted -= 1
                    yield self._question(pack, sample)
        finally:
            self._loader.close()

    def _question(self, pack: LoadedPack[TilesAlone], place: PackedSample) -> Asked:
        row = self.store[place.row]
        before = sum(self.store[other.row].n_tiles for other in pack.samples if other.start < place.start)
        pixels = None
        if row.n_tiles:
            assert pack.pixel_values is not None, "every tile was asked for"
            pixels = normalize(pack.pixel_values[before : before + row.n_tiles])
        ids = pack.input_ids[place.start : place.end].tolist()
        facts = self._facts(row, pixels)
        name = f"{Path(row.file).name}:{row.line}"
        try:
            told = tell_back(row, self._template)
        except UntoldError as error:
            return Asked(name, row.line, View(ids, facts), pixels, refused=f"cannot be told back: {error}")
        if self.manifest.template != "hf":
            ids = told.encode(self._served)
        return self._asked(name, row, told, View(ids, facts), pixels)

    def _facts(self, row: StoredSample, pixels: Tensor | None) -> list[dict[str, Any]]:
        """Of its media, pictures first."""
        facts: dict[int, dict[str, Any]] = {}
        start = 0
        for number in row.media_order:
            assert pixels is not None, "media have tiles"
            plan = row.images[number] if number >= 0 else row.videos[-1 - number]
            tiles = plan.n_tiles if isinstance(plan, ImagePlan) else len(plan.frames)
            own = pixels[start : start + tiles]
            start += tiles
            if isinstance(plan, ImagePlan):
                facts[number] = medium_facts([[plan.columns, plan.rows]], [tiles], None, (), None, own)
            else:
                duration = Fraction(plan.duration_num, plan.duration_den)
                grids = [[1, 1]] * tiles
                fps = float(tiles / duration)
                facts[number] = medium_facts(grids, [1] * tiles, plan.frames, plan.times, fps, own)
        pictures = [facts[i] for i in range(len(row.images))]
        return pictures + [facts[-1 - i] for i in range(len(row.videos))]

    def _asked(
        self, name: str, row: StoredSample, told: Told, training: View, pixels: Tensor | None
    ) -> Asked:
        try:
            pictures = [_picture(plan.path, self.manifest.max_pixels) for plan in row.images]
            videos = [_video(plan) for plan in row.videos]
        except UntoldError as error:
            return Asked(name, row.line, training, pixels, refused=str(error))
        except (Problem, OSError) as error:
            raise UserError(f"{name}: {error}") from None
        messages = told.messages([*pictures, *videos])
        return Asked(name, row.line, training, pixels, messages, self._tile_limit(row))

    def _tile_limit(self, row: StoredSample) -> int | None:
        """The most tiles that give each picture the grid that it has; None: no pictures, or no such limit."""
        most = max(self._cutting["max_tiles"], self.manifest.sampling["max_tiles"])
        rule = {"tile_size": self.manifest.tile_size, "tiling": self._cutting["tiling"]}
        for limit in range(most, 0, -1):
            grids = [select_grid(*_size(plan), max_tiles=limit, **rule) for plan in row.images]
            if row.images and grids == [(plan.columns, plan.rows) for plan in row.images]:
                return limit
        return None


def _every_tile(tokens: TokenPack) -> TilesAlone:
    return TilesAlone(range(tokens.n_tiles))


def _size(plan: ImagePlan) -> tuple[int, int]:
    page = page_ref(plan.path)
    return (page.width, page.height) if page else (plan.width, plan.height)


def _picture(path: str, max_pixels: int) -> dict[str, Any]:
    """Its file; a page as it is drawn, which is what clients send."""
    if page_ref(path):
        drawn = io.BytesIO()
        load_image(path, max_pixels=max_pixels).save(drawn, "PNG")
        return {"type": "image", "image": drawn.getvalue()}
    with open_bytes(path) as file:
        return {"type": "image", "image": file.read()}


def _video(plan: VideoPlan) -> dict[str, Any]:
    """Its file, the clip and how many frames of it."""
    n = len(plan.frames)
    if n % 2:
        raise UntoldError(f"a video of {n} frames: an export shows an even number")
    probed = probe_video(VideoSource(plan.path))
    if probed.pictures or not Path(plan.path).is_file():
        raise UntoldError("a video that is no file by itself cannot be sent")
    part = {"type": "video", "video": Path(plan.path).read_bytes(), "nframes": n}
    duration = Fraction(plan.duration_num, plan.duration_den)
    if duration == probed.duration and (plan.frames[0], plan.frames[-1]) == (0, probed.last):
        return part
    return part | _clip(plan, probed, duration)


def _clip(plan: VideoPlan, probed: VideoMetadata, duration: Fraction) -> dict[str, float]:
    """Begin and end of a clip of which the first and the last frame and the duration are known."""
    times = [int(pts) * probed.table.time_base for pts in probed.table.pts]
    first, last = plan.frames[0], plan.frames[-1]
    after_start = times[first - 1] if first else times[0] - 1
    end = times[last + 1] if last + 1 < len(times) else times[0] + probed.duration
    middle = (max(after_start, times[last] - duration) + min(times[first], end - duration)) / 2
    for near in (times[first], end - duration, middle):
        for digits in range(7):
            start = round(float(near), digits)
            exact = Fraction(str(start))
            stop = float(exact + duration)  # as a request writes it
            if after_start < exact <= times[first] and times[last] < Fraction(str(stop)) <= end:
                return {"video_start": start, "video_end": stop}
    raise UntoldError("the clip of a video cannot be told from its frames")
