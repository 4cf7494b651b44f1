"""What a global batch consists of, as sums that every rank adds its share to: FLOPs, lengths, what ADS kept.

The sums travel with the loss in one all-reduce. In fp64, where counts are exact up to 2^53.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from megatron_eagle.context_parallel.exchange_choice import EXCHANGE_KINDS, KeyUse
from megatron_eagle.data.loading.packs import TokenPack
from megatron_eagle.model.flops import training_flops
from megatron_eagle.model.presets import EagleConfig

_SHORTEST = 512  # upper end of the first bucket; every next one is twice as long
_SINGLE = (
    "flops_vision",
    "flops_language",
    "samples",
    "tokens",
    "frames",
    "frames_wanted",
    "tiles",
    "tiles_wanted",
    "keys",
    "foreign_keys",
    "attention_pairs",
    "exposed_pairs",
)


@dataclass(frozen=True)
class StepTotals:
    """Of one global batch, padding left out. `tiles` are those of pictures and pages, without frames."""

    flops_vision: float  # encoder and connector
    flops_language: float
    samples: int
    tokens: int
    frames: int
    frames_wanted: int  # without a token limit, as tiles_wanted
    tiles: int
    tiles_wanted: int
    keys: int  # that attention of all ranks reads; this and the next three: 0 where nobody exchanges keys
    foreign_keys: int  # of these, other ranks'
    attention_pairs: int  # its time, estimated
    exposed_pairs: int  # of this, the wait for keys
    samples_by_length: dict[str, int]  # by the upper end of the bucket of lengths
    tokens_by_length: dict[str, int]
    # By how their keys travel (context_parallel/exchange_choice.py); none where nobody exchanges keys.
    packs_by_exchange: dict[str, int]


def buckets(length: int) -> list[int]:
    """Upper ends, in tokens, of the buckets that samples of up to `length` are counted in."""
    ends = [_SHORTEST]
    while ends[-1] < length:
        ends.append(min(2 * ends[-1], length))
    return ends


def count_totals(
    batches: Sequence[TokenPack],
    eagle: EagleConfig,
    length: int,
    *,
    trainable: Collection[str],
    adapters: bool,
    keys: Sequence[KeyUse] = (),
) -> torch.Tensor:
    """fp64 vector of the totals of `batches`, packs of `length` tokens; `read_totals` names its sum.

    Args:
        keys: of each pack, where ranks exchange any.
    """
    lengths = [sample.end - sample.start for batch in batches for sample in batch.samples]
    n_tiles, n_frames, frames_wanted, tiles_wanted = (
        sum(getattr(batch, name) for batch in batches)
        for name in ("n_tiles", "n_frames", "frames_wanted", "tiles_wanted")
    )
    flops = training_flops(
        eagle,
        tokens=sum(lengths),
        sum_squared_lengths=sum(n * n for n in lengths),
        tiles=n_tiles,
        trainable=trainable,
        adapters=adapters,
    )
    single = {
        "flops_vision": flops.vision + flops.connector,
        "flops_language": flops.language_linear + flops.language_attention,
        "samples": len(lengths),
        "tokens": sum(lengths),
        "frames": n_frames,
        "frames_wanted": frames_wanted,
        "tiles": n_tiles - n_frames,
        "tiles_wanted": tiles_wanted,
        "keys": sum(use.keys for use in keys),
        "foreign_keys": sum(use.foreign for use in keys),
        "attention_pairs": sum(use.pairs for use in keys),
        "exposed_pairs": sum(use.exposed for use in keys),
    }
    ends = torch.tensor(buckets(length))
    place = torch.bucketize(torch.tensor(lengths, dtype=torch.long), ends)
    by_length = [
        torch.bincount(place, minlength=len(ends)).double(),
        torch.bincount(place, weights=torch.tensor(lengths).double(), minlength=len(ends)),
    ]
    kinds = [use.kind for use in keys]
    numbers = [single[name] for name in _SINGLE] + [kinds.count(kind) for kind in EXCHANGE_KINDS]
    return torch.cat([torch.tensor(numbers, dtype=torch.float64), *by_length])


def zero_totals(length: int) -> torch.Tensor:
    """What a rank adds that counts nothing."""
    return torch.zeros(len(_SINGLE) + len(EXCHANGE_KINDS) + 2 * len(buckets(length)), dtype=torch.float64)


def read_totals(vector: torch.Tensor, length: int) -> StepTotals:
    """The totals of a (summed) vector of `count_totals`."""
    ends = [str(end) for end in buckets(length)]
    values = vector.tolist()
    single = dict(zip(_SINGLE, values, strict=False))
    exchanges = dict(zip(EXCHANGE_KINDS, values[len(_SINGLE) :], strict=False))
    return StepTotals(
        **{name: value if name.startswith("flops") else int(value) for name, value in single.items()},
        samples_by_length=_by_length(ends, values[-2 * len(ends) : -len(ends)]),
        tokens_by_length=_by_length(ends, values[-len(ends) :]),
        packs_by_exchange={kind: int(packs) for kind, packs in exchanges.items() if packs},
    )


def _by_length(ends: list[str], values: list[float]) -> dict[str, int]:
    return {end: int(value) for end, value in zip(ends, values, strict=True)}
