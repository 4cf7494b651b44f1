"""Language layers under activation offload (`recompute.language: offload`)."""

from dataclasses import replace
from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import ModuleSpec
from torch import Tensor

from eagle_kernels.activation_offload import HostStore, KeptResults, offloaded_layer
from megatron_eagle.context_parallel.attention import PackedSequence
from megatron_eagle.errors import UserError
from megatron_eagle.model.experts import LanguageLayer


def offloaded_specs(
    layers: list[ModuleSpec], store: HostStore, keep_last: int, forwards_in_flight: int
) -> list[ModuleSpec]:
    """The language layers of a model chunk, offloaded.

    Args:
        store: of the rank, whose chunks have equally many layers each. Gets its size here.
        keep_last: layers at the end of the chunk whose tensors stay on the device.
        forwards_in_flight: of model chunks that wait for their backward, at most.
    """
    offloaded = max(len(layers) - keep_last, 0)
    store.slots = offloaded * forwards_in_flight
    return [
        replace(
            layer,
            module=OffloadedTransformerLayer,
            params=layer.params | {"store": store, "stays": number >= offloaded},
        )
        for number, layer in enumerate(layers)
    ]


class OffloadedTransformerLayer(LanguageLayer):
    """Megatron's layer, run again in backward from tensors that waited on the host."""

    def __init__(self, *args: Any, store: HostStore, stays: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.store, self.stays = store, stays

    def forward(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: PackedSequence, **others: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [r, 1, h] -> the same shape, and no context: the model has no cross-attention.

        Raises:
            UserError: the host has too little memory.
        """

        def run(x: Tensor, attention: KeptResults) -> Tensor:
            packed = replace(packed_seq_params, replay=attention)
            forward = super(OffloadedTransformerLayer, self).forward
            y: Tensor = forward(x, *args, packed_seq_params=packed, **others)[0]
            return y

        random = (_random_states, _set_random_states)
        try:
            return offloaded_layer(run, hidden_states, self.store, stays=self.stays, random=random), None
        except MemoryError as error:
            raise UserError(str(error)) from None


def _random_states() -> tuple[Any, ...]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(), get_cuda_rng_tracker().get_states()


def _set_random_states(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    torch.cuda.set_rng_state(states[1])
    get_cuda_rng_tracker().set_states(states[2])
