"""Language layers under activation offload (`recompute.language: offload`)."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from eagle_kernels.activation_offload import HostStore, Replay, offloaded_layer
from megatron_eagle.context_parallel.attention import PackedSequence


@dataclass(frozen=True)
class Offload:
    """What the layers of a rank share."""

    store: HostStore
    keep_last: int  # layers at the end of each model chunk whose tensors stay on the device
    forwards_in_flight: int  # of model chunks

    def layers(self, specs: list[ModuleSpec]) -> list[ModuleSpec]:
        """The layers of a model chunk (all chunks of a rank have equally many), offloaded."""
        leaving = max(len(specs) - self.keep_last, 0)
        self.store.slots = leaving * self.forwards_in_flight
        return [
            replace(
                spec,
                module=OffloadedTransformerLayer,
                params=spec.params | {"store": self.store, "stays": number >= leaving},
            )
            for number, spec in enumerate(specs)
        ]


class OffloadedTransformerLayer(TransformerLayer):
    """Megatron's layer, run again in backward from tensors that waited on the host."""

    def __init__(self, *args, store: HostStore, stays: bool, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.store, self.stays = store, stays

    def forward(
        self, hidden_states: Tensor, *, packed_seq_params: PackedSequence, **others
    ) -> tuple[Tensor, None]:
        """hidden_states [r, 1, h] -> the same shape, and no context: the model has no cross-attention."""

        def run(x: Tensor, attention: Replay) -> Tensor:
            packed = replace(packed_seq_params, replay=attention)
            return super(OffloadedTransformerLayer, self).forward(x, packed_seq_params=packed, **others)[0]

        random = (_random_states, _set_random_states)
        return offloaded_layer(run, hidden_states, self.store, stays=self.stays, random=random), None


def _random_states() -> tuple[Any, ...]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(), get_cuda_rng_tracker().get_states()


def _set_random_states(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    torch.cuda.set_rng_state(states[1])
    get_cuda_rng_tracker().set_states(states[2])
