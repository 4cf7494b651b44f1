"""The token store: everything that training needs of a data set, decided once, memory mapped.

D/manifest.json   what the data was made with (`DataManifest`)
D/tokenizer/      the tokenizer's files
D/dropped.jsonl   the ledger
D/<N>/            one folder per token limit N, rows in the order of the input:
    tokens.bin/.idx    int32 token ids          (Megatron's indexed-dataset format)
    answers.bin/.idx   uint16 answer per token, 1-based, 0 = unsupervised
    samples.arrow      one row a sample: counts, source, media plan (Arrow IPC file)
    packs.arrow        written by `packing`
D/media/           media that could be read quickly only once (see `media_files`)
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from megatron_eagle.data.media.frame_table import FrameIndex
from megatron_eagle.data.media.source import FileMetadata
from megatron_eagle.data.store.manifest import DataManifest, read_manifest
from megatron_eagle.data.store.media_names import absolute, is_own
from megatron_eagle.data.store.token_file import TokenFile
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.grids import tile_count

BATCH_ROWS = 1024  # rows per Arrow batch: row r is row r % 1024 of batch r // 1024


@dataclass(frozen=True)
class ImagePlan:
    """A picture, or a page of a document: its file when it was probed, its size as shown, its grid of tiles.

    `path` is as `media.source` names it; the size of a page of a PDF file is the one that its grid was chosen
    by.  A picture of several tiles is followed by a thumbnail of the whole.
    """

    path: str
    file_size: int
    mtime_ns: int
    width: int
    height: int
    columns: int
    rows: int

    @property
    def file(self) -> FileMetadata:
        """The file as it was."""
        return FileMetadata(self.path, self.file_size, self.mtime_ns)

    @property
    def n_tiles(self) -> int:
        return tile_count((self.columns, self.rows))


@dataclass(frozen=True)
class VideoPlan:
    """A video: its file when it was probed, and per shown frame its number in presentation order, its
    presentation time and that of the key frame to start decoding at, in units of the time base (num / den s).

    `duration_num / duration_den` is the clip's duration in seconds; the other columns are those of
    `frame_table.FrameIndex`.
    """

    path: str
    file_size: int
    mtime_ns: int
    fingerprint: int
    stream: int
    rotation: int
    time_base_num: int
    time_base_den: int
    duration_num: int
    duration_den: int
    n_frames: int
    open_gop: int
    linear_reason: str
    frames: tuple[int, ...]
    pts: tuple[int, ...]
    seek_points: tuple[int, ...]

    @property
    def times(self) -> list[float]:
        """Seconds of the shown frames on the file's own clock."""
        return [pts * self.time_base_num / self.time_base_den for pts in self.pts]

    @property
    def index(self) -> FrameIndex:
        """What decoding the shown frames, or some of them, takes."""
        return FrameIndex(
            file=FileMetadata(self.path, self.file_size, self.mtime_ns),
            fingerprint=self.fingerprint,
            stream=self.stream,
            rotation=self.rotation,
            time_base=Fraction(self.time_base_num, self.time_base_den),
            n_frames=self.n_frames,
            open_gop=bool(self.open_gop),
            linear_reason=self.linear_reason,
            numbers=np.array(self.frames, np.int64),
            pts=np.array(self.pts, np.int64),
            seek_points=np.array(self.seek_points, np.int64),
        )


Plan = TypeVar("Plan", ImagePlan, VideoPlan)


@dataclass(frozen=True)
class DocumentPlan:
    """A document: the 0-based numbers of the pages shown, of `n_pages` that it has.

    Page `pages[i]` is the sample's image `first_image + i`.
    """

    first_image: int
    pages: tuple[int, ...]
    n_pages: int


@dataclass(frozen=True)
class SampleColumns:
    """One row of samples.arrow.

    Attributes:
        source: number in the manifest's `sources`.
        answer_lengths: supervised tokens of each answer.
        images: the pictures, and after them the pages of the `documents`.
        media_order: the media as the text shows them: i is image i, -1 - j is video j.
    """

    source: int
    line: int
    n_tokens: int
    n_text: int
    n_visual: int
    n_supervised: int
    answer_lengths: tuple[int, ...]
    n_tiles: int
    tiles_wanted: int
    n_frames: int
    frames_wanted: int
    images: tuple[ImagePlan, ...]
    videos: tuple[VideoPlan, ...]
    documents: tuple[DocumentPlan, ...]
    media_order: tuple[int, ...]


@dataclass(frozen=True)
class StoredSample(SampleColumns):
    """A sample of the store: its columns, the source file, the number of its data set (an entry of the
    manifest's `datasets`), ids int32 [s] and answers uint16 [s]."""

    file: str
    dataset: int
    ids: np.ndarray
    answers: np.ndarray


_INT, _LONG = pa.int32(), pa.int64()
_IMAGE = pa.struct({f.name: {"path": pa.string()}.get(f.name, _LONG) for f in fields(ImagePlan)})
_VIDEO = pa.struct(
    {
        f.name: {
            "path": pa.string(),
            "linear_reason": pa.string(),
            "frames": pa.list_(_INT),
            "pts": pa.list_(_LONG),
            "seek_points": pa.list_(_LONG),
        }.get(f.name, _LONG)
        for f in fields(VideoPlan)
    }
)
_DOCUMENT = pa.struct({"first_image": _INT, "pages": pa.list_(_INT), "n_pages": _INT})
_LISTS = {
    "images": pa.list_(_IMAGE),
    "videos": pa.list_(_VIDEO),
    "documents": pa.list_(_DOCUMENT),
    "answer_lengths": pa.list_(_INT),
    "media_order": pa.list_(_INT),
}
SCHEMA = pa.schema({f.name: _LISTS.get(f.name, _INT) for f in fields(SampleColumns)})

_PLANS = {"images": ImagePlan, "videos": VideoPlan, "documents": DocumentPlan}
_Reader = Callable[[int], Any]


def _reader(array: pa.Array, plan: type | None) -> _Reader:
    """A function from a place in `array` to its value as `SampleColumns` has it; structs become `plan`.

    Views of the mapped memory: far quicker than Arrow's own `as_py` of a row.
    """
    if pa.types.is_struct(array.type):
        assert plan is not None, "no plan holds structs of its own"
        readers = [_reader(array.field(i), None) for i in range(array.type.num_fields)]
        return lambda i: plan(*[read(i) for read in readers])
    if not pa.types.is_list(array.type):
        if pa.types.is_string(array.type):
            return lambda i: array[i].as_py()
        return np.asarray(array).item
    offsets = np.asarray(array.offsets)
    if pa.types.is_struct(array.type.value_type):
        read = _reader(array.values, plan)
        return lambda i: tuple([read(j) for j in range(offsets[i], offsets[i + 1])])
    values = np.asarray(array.values)
    return lambda i: tuple(values[offsets[i] : offsets[i + 1]].tolist())


def row_readers(batch: pa.RecordBatch) -> dict[str, "_Reader"]:
    """Of each column of some rows, a function from a place to its value as `SampleColumns` has it."""
    return {name: _reader(batch[name], _PLANS.get(name)) for name in SCHEMA.names}


def find_media(columns: dict[str, Any], store: Path) -> None:
    """Give the media of a row, in its columns, the names under which they are read."""
    for name in ("images", "videos"):
        columns[name] = tuple(
            replace(plan, path=absolute(plan.path, store)) if is_own(plan.path) else plan
            for plan in columns[name]
        )


class Rows(Protocol):
    """The rows of one length of a store: a `SampleStore`, or one that may still grow (`shards`)."""

    path: Path
    manifest: DataManifest
    length: int

    @property
    def folder(self) -> Path:
        """Of the length."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> StoredSample: ...

    def column(self, name: str, /) -> pa.ChunkedArray:
        """One column of all rows."""


class SampleStore:
    """The rows of one length; `store[i]` is a `StoredSample`.  Memory mapped: opening reads no sample.

    `length` defaults to the longest.

    Raises:
        UserError: a folder that is no store, and for a length that it was not made for, naming those it has.
    """

    def __init__(self, path: str | Path, length: int | None = None):
        self.path = Path(path)
        self.manifest = read_manifest(path)
        lengths = self.manifest.lengths
        length = max(lengths) if length is None else length
        if length not in lengths:
            raise UserError(f"{path} has no plan for length {length}; it has {', '.join(map(str, lengths))}")
        self.length = length
        self.folder = self.path / str(length)
        self._dataset_of_source = self.manifest.dataset_of_source
        self.tokens = TokenFile(self.folder / "tokens")
        self.answers = TokenFile(self.folder / "answers")
        try:
            self._file = pa.ipc.open_file(pa.memory_map(str(self.folder / "samples.arrow")))
        except (OSError, pa.ArrowInvalid):
            raise UserError(
                f"{self.folder}/samples.arrow cannot be read; preprocess the data again"
            ) from None
        self._readers = lru_cache(maxsize=64)(self._open_batch)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> StoredSample:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a store of {len(self)}")
        readers = self._readers(row // BATCH_ROWS)
        values = {name: read(row % BATCH_ROWS) for name, read in readers.items()}
        find_media(values, self.path)
        return StoredSample(
            **values,
            file=self.manifest.sources[values["source"]],
            dataset=self._dataset_of_source[values["source"]],
            ids=self.tokens[row],
            answers=self.answers[row],
        )

    def _open_batch(self, number: int) -> dict[str, "_Reader"]:
        return row_readers(self._file.get_batch(number))

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of all rows as it is stored, through a map of its own: what is read of it goes when the
        column does."""
        file = pa.ipc.open_file(pa.memory_map(str(self.folder / "samples.arrow")))
        batches = (file.get_batch(i) for i in range(file.num_record_batches))
        return pa.chunked_array([batch[name] for batch in batches], SCHEMA.field(name).type)
