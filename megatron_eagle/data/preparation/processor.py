"""One annotation line into the rows of every length: read, probe, plan, render.  What each worker runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_eagle.data.annotations.formats import read_sample
from megatron_eagle.data.annotations.parsing import Conventions
from megatron_eagle.data.annotations.records import open_records
from megatron_eagle.data.media.damage import need_simplejpeg
from megatron_eagle.data.media.documents import check_pages
from megatron_eagle.data.media.exact import read_frames
from megatron_eagle.data.media.images import DEFAULT_MAX_PIXELS, MAX_MAX_PIXELS, image_size
from megatron_eagle.data.media.remote.cache import CacheError
from megatron_eagle.data.media.remote.files import MediaAccess
from megatron_eagle.data.media.remote.settings import RemoteSettings
from megatron_eagle.data.media.source import file_metadata, fingerprint
from megatron_eagle.data.sample import DocumentRef, ImageRef, Sample, VideoRef
from megatron_eagle.data.sampling.ads import MediaPlan, SamplingSettings, plan_media
from megatron_eagle.data.sampling.probe import (
    ImageMetadata,
    PageMetadata,
    VideoMetadata,
    probe_document,
    probe_image,
    probe_video,
)
from megatron_eagle.data.store.reader import DocumentPlan, ImagePlan, SampleColumns, VideoPlan
from megatron_eagle.data.text.template import VARIANTS, ShownVideo, Template
from megatron_eagle.data.text.tokenizer import load_tokenizer
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.grids import tile_count
from megatron_eagle.problems import LedgerEntry, Problem


@dataclass(frozen=True)
class PreprocessSettings:
    """Everything that decides what a sample becomes, and how its media are had (`remote`).

    Raises:
        UserError: impossible values.
    """

    tokenizer: str
    lengths: tuple[int, ...]
    sampling: SamplingSettings = SamplingSettings()
    patch_size: int = 14
    template: str = "train"
    max_pixels: int = DEFAULT_MAX_PIXELS
    strict_jpeg: bool = False
    remote: RemoteSettings = RemoteSettings()

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1 or len(set(self.lengths)) < len(self.lengths):
            raise UserError(f"--max-tokens needs different positive lengths, got {list(self.lengths)}")
        if self.patch_size < 1 or self.sampling.tile_size % (2 * self.patch_size):
            raise UserError(
                f"the tile size must be a multiple of twice the patch size, "
                f"got {self.sampling.tile_size} and {self.patch_size}"
            )
        if not 1 <= self.max_pixels <= MAX_MAX_PIXELS:
            raise UserError(f"--max-pixels must be from 1 to {MAX_MAX_PIXELS}, got {self.max_pixels}")
        if self.strict_jpeg:
            need_simplejpeg()
        if self.template not in VARIANTS:
            raise UserError(f"--template must be one of {', '.join(VARIANTS)}, got {self.template}")

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens of one tile: its patches, 2 x 2 merged into one."""
        return (self.sampling.tile_size // self.patch_size // 2) ** 2


@dataclass(frozen=True)
class StoreRow:
    """What the store keeps of a sample at one length."""

    ids: np.ndarray
    answers: np.ndarray
    columns: SampleColumns


@dataclass(frozen=True)
class Task:
    """One record to be processed, and where it comes from.

    `raw` is its bytes or why there are none; None: they are read by whoever works on it.
    """

    raw: bytes | Problem | None
    source: int
    file: str
    line: int
    root: str
    overrides: Mapping[str, float]
    conventions: Conventions = field(default_factory=Conventions)


@dataclass(frozen=True)
class Outcome:
    """What became of a line: its row at each length that has one, ledger entries for the others."""

    rows: Mapping[int, StoreRow]
    dropped: tuple[LedgerEntry, ...]


class SampleProcessor:
    """Turns lines into rows.  Media are probed and text is tokenised once, then planned for every length."""

    def __init__(self, settings: PreprocessSettings):
        self._settings = settings
        self._template = Template(
            load_tokenizer(settings.tokenizer), settings.template, settings.tokens_per_tile
        )
        # Several questions about one video, document or picture usually follow each other.
        self._files = files = MediaAccess(settings.remote)
        limits = settings.max_pixels, settings.strict_jpeg, files
        self._probe_image = lru_cache(maxsize=1024)(lambda path: probe_image(path, *limits))
        self._probe_document = lru_cache(maxsize=32)(lambda document: probe_document(document, *limits))
        self._probe_video = lru_cache(maxsize=32)(lambda source: probe_video(source, files))
        self._records = lru_cache(maxsize=2)(open_records)

    def process(self, task: Task) -> Outcome:
        """Never raises for bad input: a sample that cannot be used becomes ledger entries.

        Raises:
            CacheError: the cache of remote media cannot be written.
        """
        rows: dict[int, StoreRow] = {}
        dropped = []

        def drop(problem: Problem, length: int | None = None) -> None:
            dropped.append(LedgerEntry(task.file, task.line, str(problem), problem.kind, length))

        try:
            if isinstance(task.raw, Problem):
                raise task.raw
            raw = self._records(Path(task.file)).read(task.line - 1) if task.raw is None else task.raw
            sample = read_sample(
                raw,
                root=task.root,
                file=task.file,
                line=task.line,
                overrides=task.overrides,
                conventions=task.conventions,
            )
            media = _Media(
                [self._probe_image(path) for path in sample.images],
                [self._probe_video(source) for source in sample.videos],
                [self._probe_document(document) for document in sample.documents],
            )
            plans: dict[int, MediaPlan] = {}
            for length in self._settings.lengths:
                try:
                    plans[length] = self._plan(sample, media, length)
                except Problem as problem:
                    drop(problem, length)
            self._check_frames(media.videos, list(plans.values()))
            self._check_pages(media.documents, list(plans.values()))
            for length, plan in plans.items():
                rows[length] = self._row(task, sample, media, plan)
        except CacheError:
            raise
        except Exception as error:  # one strange file must not end a run of millions; the summary counts it
            rows.clear()
            dropped.clear()
            unexpected = Problem("unexpected error", f"{type(error).__name__}: {error}")
            drop(error if isinstance(error, Problem) else unexpected)
        return Outcome(rows, tuple(dropped))

    def _sampling(self, sample: Sample) -> SamplingSettings:
        own: dict[str, Any] = dict(sample.overrides)
        return replace(self._settings.sampling, **own)

    def _plan(self, sample: Sample, media: "_Media", length: int) -> MediaPlan:
        def count(
            tiles: Sequence[int],
            frames: Sequence[Sequence[int]],
            documents: Sequence[Sequence[int]],
        ) -> int:
            return self._template.count(sample, tiles, media.shown(frames), documents)

        sampling = self._sampling(sample)
        return plan_media(
            [image.demand(sampling) for image in media.images],
            [video.demand(sampling) for video in media.videos],
            count,
            length,
            sampling,
            [[page.demand(sampling) for page in pages] for pages in media.documents],
        )

    def _check_frames(self, videos: list[VideoMetadata], plans: list[MediaPlan]) -> None:
        """Decode every frame that some plan shows, so that training never meets one that cannot be.

        A file that cannot be read by seeking is marked in `videos`, so that training does not try.
        """
        for i, video in enumerate(videos):
            frames = sorted({frame for plan in plans for frame in plan.frames[i]})
            if video.pictures:
                for frame in frames:
                    with self._files.local(video.pictures[frame]) as local:
                        image_size(
                            local,
                            max_pixels=self._settings.max_pixels,
                            strict_jpeg=self._settings.strict_jpeg,
                        )
                continue
            reasons: list[str] = []
            with self._files.local(video.file.path, video.file) as local:
                for _ in read_frames(local, video.table.index.select(frames), reasons.append):
                    pass
            if reasons:
                videos[i] = replace(video, table=replace(video.table, linear_reason=reasons[0]))

    def _check_pages(
        self, documents: "list[list[ImageMetadata] | list[PageMetadata]]", plans: list[MediaPlan]
    ) -> None:
        """Open every page of a PDF file that some plan shows, likewise."""
        for i, document in enumerate(documents):
            if isinstance(document[0], PageMetadata):
                pages = sorted({page for plan in plans for page in plan.pages[i]})
                file = document[0].file
                with self._files.local(file.path, file) as local:
                    check_pages(local, pages, max_pixels=self._settings.max_pixels)

    def _row(self, task: Task, sample: Sample, media: "_Media", plan: MediaPlan) -> StoreRow:
        tiles = [tile_count(grid) for grid in plan.grids]
        page_tiles = [[tile_count(grid) for grid in grids] for grids in plan.page_grids]
        encoded = self._template.encode(sample, tiles, media.shown(plan.frames), page_tiles)
        if len(encoded.ids) != plan.n_tokens:
            raise RuntimeError(
                f"planned {plan.n_tokens} tokens, rendered {len(encoded.ids)}: {task.file}:{task.line}"
            )
        answer_lengths = np.bincount(encoded.answers)[1:]
        n_frames = sum(map(len, plan.frames))
        n_tiles = sum(tiles) + sum(map(sum, page_tiles)) + n_frames
        n_visual = n_tiles * self._template.tokens_per_tile
        sampling = self._sampling(sample)
        documents = _document_plans(media, plan)
        columns = SampleColumns(
            source=task.source,
            line=task.line,
            n_tokens=plan.n_tokens,
            n_text=plan.n_tokens - n_visual,
            n_visual=n_visual,
            n_supervised=int(answer_lengths.sum()),
            answer_lengths=tuple(answer_lengths.tolist()),
            n_tiles=n_tiles,
            tiles_wanted=plan.tiles_wanted,
            n_frames=n_frames,
            frames_wanted=sum(video.demand(sampling).wanted for video in media.videos),
            images=(
                *(_image_plan(*picture, sampling) for picture in zip(media.images, plan.grids, strict=True)),
                *(
                    _image_plan(pages[number], grid, sampling)
                    for pages, shown, grids in zip(media.documents, plan.pages, plan.page_grids, strict=True)
                    for number, grid in zip(shown, grids, strict=True)
                ),
            ),
            videos=tuple(map(self._video_plan, media.videos, plan.frames)),
            documents=documents,
            media_order=_media_order(sample, documents),
        )
        return StoreRow(encoded.ids, encoded.answers, columns)

    def _video_plan(self, video: VideoMetadata, frames: tuple[int, ...]) -> VideoPlan:
        index = video.table.index.select(frames)
        if video.pictures:
            name = video.name(frames)
            with self._files.local(name) as local:
                file, mark = replace(file_metadata(local), path=name), fingerprint(local)
        else:
            file, mark = video.file, index.fingerprint
        return VideoPlan(
            path=file.path,
            file_size=file.size,
            mtime_ns=file.mtime_ns,
            fingerprint=mark,
            stream=index.stream,
            rotation=index.rotation,
            time_base_num=index.time_base.numerator,
            time_base_den=index.time_base.denominator,
            duration_num=video.duration.numerator,
            duration_den=video.duration.denominator,
            n_frames=index.n_frames,
            open_gop=int(index.open_gop),
            linear_reason=index.linear_reason,
            frames=frames,
            pts=tuple(index.pts.tolist()),
            seek_points=tuple(index.seek_points.tolist()),
        )


@dataclass(frozen=True)
class _Media:
    """The media of a sample, probed."""

    images: list[ImageMetadata]
    videos: list[VideoMetadata]
    documents: list[list[ImageMetadata] | list[PageMetadata]]

    def shown(self, frames: Sequence[Sequence[int]]) -> list[ShownVideo]:
        """What the text says of the videos if these frames are shown."""
        return [ShownVideo(v.duration, v.times(f)) for v, f in zip(self.videos, frames, strict=True)]


def _document_plans(media: _Media, plan: MediaPlan) -> tuple[DocumentPlan, ...]:
    first = len(media.images)
    plans = []
    for pages, shown in zip(media.documents, plan.pages, strict=True):
        plans.append(DocumentPlan(first, shown, len(pages)))
        first += len(shown)
    return tuple(plans)


def _media_order(sample: Sample, documents: Sequence[DocumentPlan]) -> tuple[int, ...]:
    order: list[int] = []
    for part in (part for turn in sample.turns for part in turn.parts):
        if isinstance(part, ImageRef):
            order.append(part.index)
        elif isinstance(part, VideoRef):
            order.append(-1 - part.index)
        elif isinstance(part, DocumentRef):
            document = documents[part.index]
            order += range(document.first_image, document.first_image + len(document.pages))
    return tuple(order)


def _image_plan(
    image: ImageMetadata | PageMetadata, grid: tuple[int, int], sampling: SamplingSettings
) -> ImagePlan:
    demand = image.demand(sampling)
    return ImagePlan(
        path=image.name(grid, sampling.tile_size),
        file_size=image.file.size,
        mtime_ns=image.file.mtime_ns,
        width=demand.width,
        height=demand.height,
        columns=grid[0],
        rows=grid[1],
    )
