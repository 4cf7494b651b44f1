"""Which of a sequence's packs the rows of a rank's hidden states are of: a router's loss is of a pack."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackRows:
    """Of the packs that lie end to end in a sequence. Padding is of none."""

    member: Tensor  # fp32 [packs, r]: 1 where this rank's row is a token of the pack, else 0
    tokens: Tensor  # fp32 [packs]: its tokens, on all ranks
    share: float  # of a pack in the step: 1 / the step's packs

    def to(self, device: torch.device) -> "PackRows":
        """The same on `device`."""
        return replace(
            self,
            member=self.member.to(device, non_blocking=True),
            tokens=self.tokens.to(device, non_blocking=True),
        )

    def pin_memory(self) -> "PackRows":
        """The same in pinned memory."""
        return replace(self, member=self.member.pin_memory(), tokens=self.tokens.pin_memory())


def rows_of_packs(filled: Tensor, held: Tensor, packs: int, step_packs: int) -> PackRows:
    """
    Args:
        filled: [S] bool: tokens of the sequence that are no padding.
        held: int64 [r]: the tokens of this rank's rows; -1: padding inside of documents.
        packs: in the sequence, equally long.
        step_packs: in the global batch.
    """
    length = len(filled) // packs
    number = torch.where((held >= 0) & filled[held], held // length, packs)
    member = (number == torch.arange(packs)[:, None]).float()
    # A pack may be nothing but padding: nothing is divided by 0.
    tokens = filled.view(packs, length).sum(1).clamp(min=1).float()
    return PackRows(member, tokens, 1 / step_packs)
