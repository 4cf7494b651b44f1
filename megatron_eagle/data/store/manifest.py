"""What a token store was made with and what it holds: its manifest.json."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_eagle.data.store.signs import growing_folder
from megatron_eagle.errors import UserError
from megatron_eagle.files import from_record, write_whole

FORMAT_VERSION = 3


@dataclass(frozen=True)
class DataManifest:
    """What a store was made with and what it holds.

    Attributes:
        fingerprint: of tokenizer, template and tokens per tile: data and model must agree on it.
        counts: each length (as text) -> the numbers of the summary.
        files: each file -> its bytes and SHA-256; none before the store is complete.
        names: those that the recipe gives to the `sources`.
        input_key: stands for everything that the store follows from, except the media themselves.
        shard_rows: rows of a shard if no line is dropped (see `shards`); 0: the store cannot be followed.
        n_takes: rows of the whole store if no line is dropped, where it can be followed.
    """

    fingerprint: str
    template: str
    tile_size: int
    patch_size: int
    tokens_per_tile: int
    vocab_size: int
    image_token_id: int
    pad_token_id: int
    lengths: list[int]
    sources: list[str]
    sampling: dict[str, Any]
    max_pixels: int
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    input_key: str = ""
    shard_rows: int = 0
    n_takes: int = 0
    format_version: int = FORMAT_VERSION

    @property
    def patches_per_tile(self) -> int:
        """Vision patches of one tile."""
        return (self.tile_size // self.patch_size) ** 2

    @property
    def datasets(self) -> list[str]:
        """The data sets of the mixture: each name once, in the recipe's order.  Several sources may have one
        name; a store without names has its sources."""
        return list(dict.fromkeys(self.names or self.sources))

    @property
    def dataset_of_source(self) -> list[int]:
        """The number of each source's data set among `datasets`."""
        numbers = {name: number for number, name in enumerate(self.datasets)}
        return [numbers[name] for name in self.names or self.sources]

    def save(self, folder: Path) -> None:
        """Write manifest.json, which is there completely or not at all.

        Raises:
            OSError: it cannot be written.
        """
        write_whole(folder / "manifest.json", json.dumps(asdict(self), indent=1) + "\n")


def store_format(folder: str | Path) -> int:
    """The format of the token store in a folder.

    Raises:
        UserError: it holds none, of whatever format.
    """
    return int(_manifest_content(folder)["format_version"])


def read_manifest(folder: str | Path) -> DataManifest:
    """Read manifest.json.

    Raises:
        UserError: a folder that is no token store of this version.
    """
    content = _manifest_content(folder)
    if content["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{folder} has store format {content['format_version']}, not {FORMAT_VERSION}; "
            "run preprocess_data again"
        )
    return from_record(DataManifest, content)


def _manifest_content(folder: str | Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
        if isinstance(content.get("format_version"), int):
            return content
    except (OSError, ValueError, AttributeError):
        pass
    partial = growing_folder(folder)
    if not Path(folder).exists() and partial.exists():
        how = ", or train with data.follow" if (partial / "manifest.json").is_file() else ""
        raise UserError(f"{folder} is not complete yet: wait until preprocess has made it{how}")
    raise UserError(f"{folder} is no token store: no readable manifest.json; run preprocess_data")
