"""What a run reads, in a few values: where these are equal, so are packs, order and weights."""

import hashlib
from dataclasses import asdict, dataclass, fields

import numpy as np

from megatron_eagle.data.packing.index import PackIndex
from megatron_eagle.data.store.reader import SampleStore

_FOLLOWED = ("shards_per_window", "window", "window_start")
_FILES = ("samples.arrow", "tokens.bin", "answers.bin")


@dataclass(frozen=True)
class DataIdentity:
    """`store` and `packs` are the beginnings of SHA-256: of the length's rows, tokens and answers, and of the
    rows of every pack.  `path` says where the store lay, not what it is.

    Of a store that is followed (`shards_per_window` is not 0), they are those of a batch, and `window` and
    `window_start` are its place: see `follow.Read`.
    """

    path: str
    length: int
    seed: int
    loss_weighting: str
    multi_turn: bool
    store: str
    packs: str
    shards_per_window: int = 0
    window: int = 0
    window_start: int = 0

    def difference(self, other: "DataIdentity") -> str | None:
        """What `other` reads otherwise, in words; None: nothing."""
        for f in fields(self):
            here, there = getattr(self, f.name), getattr(other, f.name)
            if f.name != "path" and here != there:
                return f"{f.name} {here} there, {there} here"
        return None

    def to_dict(self) -> dict[str, int | str | bool]:
        """As it stands in metrics.jsonl."""
        values: dict[str, int | str | bool] = asdict(self)
        return values if self.shards_per_window else {k: v for k, v in values.items() if k not in _FOLLOWED}


def identify(
    store: SampleStore, index: PackIndex, *, seed: int, loss_weighting: str, multi_turn: bool
) -> DataIdentity:
    """The identity of a store's length, read in the order of `seed`.

    The store's hashes are those of its manifest; the pack index is hashed here.
    """
    hashes = [store.manifest.files[f"{store.length}/{name}"]["sha256"] for name in _FILES]
    rows = index.table["rows"].combine_chunks()
    packs = hashlib.sha256(np.asarray(rows.offsets).tobytes())
    packs.update(np.asarray(rows.values).tobytes())
    return DataIdentity(
        path=str(store.path),
        length=store.length,
        seed=seed,
        loss_weighting=loss_weighting,
        multi_turn=multi_turn,
        store=hashlib.sha256("".join(hashes).encode()).hexdigest()[:16],
        packs=packs.hexdigest()[:16],
    )
