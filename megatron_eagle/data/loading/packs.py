"""A pack on its way to the model, a type for each phase: its tokens, planned for a rank, loaded with pixels.

Packs of the index that ranks share as one sequence lie end to end in one pack here. Each is frozen and filled
in one place: tokens by `batch.assemble` and `join`, plans by the loader, pixels by the media reader. A later
phase has all of an earlier one and shares its tensors.

Shapes: s tokens of a pack, n tiles, S tile size in pixels.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from megatron_eagle.data.loading.identity import DataIdentity


class RankPlan(Protocol):
    """What a rank derives from a pack's tokens before media are read (training passes in who does it)."""

    @property
    def tiles(self) -> range | None:
        """The tiles of the pack that this rank decodes; None where it takes no pixels."""


@dataclass(frozen=True)
class TilesAlone:
    """The plan of who asks for tiles and for nothing else."""

    tiles: range | None


P = TypeVar("P", bound=RankPlan, covariant=True)
Q = TypeVar("Q", bound=RankPlan)  # of who takes such packs back


@dataclass(frozen=True)
class PackedSample:
    """A sample in a pack: one of its documents."""

    number: int
    """Among the samples of the global batch."""
    row: int
    """Of the store."""
    start: int
    """Its first token in the pack."""
    end: int
    """The token after its last."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenPack:
    """A pack of exactly s tokens, as host tensors.

    `loss_weights[i]` is the weight of predicting `labels[i]`, already divided by the global batch's
    normaliser; it is 0 across document bounds and in the padding, which is a document of its own wherever a
    pack of the index ends with some.
    """

    input_ids: Tensor
    """int64 [s]."""
    labels: Tensor
    """int64 [s]: the next token, 0 at the end of a pack of the index."""
    loss_weights: Tensor
    """float32 [s]."""
    group_ids: Tensor
    """int64 [s]: the losses of tokens with the same number are also summed apart.  The number of the sample's
    data set; 0 in the padding, which has no weight."""
    position_ids: Tensor
    """int64 [s], from 0 in each document."""
    document_bounds: Sequence[int]
    """0, ..., s."""
    n_tiles: int
    """Of the whole pack."""
    samples: Sequence[PackedSample]
    """In the order of their tokens; without the padding."""
    n_frames: int = 0
    """Of the tiles, those that are frames; the others are of pictures and pages."""
    frames_wanted: int = 0
    """Frames without a token limit."""
    tiles_wanted: int = 0
    """Tiles of pictures and pages without a token limit."""

    @property
    def sample_rows(self) -> list[int]:
        """Store rows of the samples."""
        return [sample.row for sample in self.samples]

    @property
    def nbytes(self) -> int:
        """Bytes of its tokens' tensors."""
        tensors = self.input_ids, self.labels, self.loss_weights, self.group_ids, self.position_ids
        return sum(tensor.nbytes for tensor in tensors)

    def pin_memory(self) -> "TokenPack":
        """The same in pinned memory, so that nobody waits for copies to the device."""
        return replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            labels=self.labels.pin_memory(),
            loss_weights=self.loss_weights.pin_memory(),
            group_ids=self.group_ids.pin_memory(),
            position_ids=self.position_ids.pin_memory(),
        )


def no_tiles(_tokens: TokenPack) -> TilesAlone:
    """The plan of who asks for tokens alone."""
    return TilesAlone(None)


@dataclass(frozen=True, eq=False, kw_only=True)
class PlannedPack(TokenPack, Generic[P]):
    """Tokens, and what this rank does with them."""

    plan: P


@dataclass(frozen=True, eq=False, kw_only=True)
class LoadedPack(PlannedPack[P]):
    """All that the model takes."""

    pixel_values: Tensor | None
    """uint8 [i, 3, S, S], in the order of the image tokens: the tiles of `plan.tiles`; None where it has
    none."""


@dataclass(frozen=True)
class FailedMedium:
    """A medium that could not be read; it takes the sample of this store row out of training."""

    row: int
    source: str
    """FILE:LINE of the annotation."""
    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class PlannedBatch(Generic[P]):
    """What one rank has of a global batch, before media are read."""

    first_pack: int
    """Packs consumed before it."""
    packs: Sequence[PlannedPack[P]]
    total: float
    """The sum of the whole global batch's loss weights before it divided them."""
    nbytes: int
    """Bytes of its packs' tensors once media are read."""


@dataclass(frozen=True, eq=False)
class GlobalBatch(Generic[P]):
    """What one rank has of a global batch."""

    first_pack: int
    """Packs consumed before it."""
    microbatches: Sequence[LoadedPack[P]]
    total: float
    """The sum of the whole global batch's loss weights before it divided them."""
    failures: Mapping[int, FailedMedium] = field(default_factory=dict)
    """By number of the sample in the global batch: what of this rank's media could not be read."""


class BatchLoader(Protocol[Q]):
    """What training reads its batches from: `PackLoader`, or what has its interface and reads other data."""

    def identity(self, first_pack: int, /) -> DataIdentity:
        """What the global batch that starts at `first_pack` is read from, and in which order."""

    @property
    def datasets(self) -> list[str]:
        """Names of the mixture's data sets, by their numbers in `TokenPack.group_ids`."""

    @property
    def decoder(self) -> str:
        """How media are decoded, and why."""

    @property
    def packs_per_epoch(self) -> int:
        """Packs that there are."""

    def step(self, consumed_packs: int, /) -> GlobalBatch[Q]:
        """This rank's share of the global batch that starts at `consumed_packs`."""

    def n_samples(self, consumed_packs: int, /) -> int:
        """Samples of a global batch; they are numbered from 0 in the order of its packs."""

    def leave_out(self, batch: GlobalBatch[Q], samples: Collection[int], /) -> GlobalBatch[Q]:
        """The batch without the weights and pixels of samples, by their numbers in the global batch."""

    def close(self) -> None:
        """Stop the background work."""
