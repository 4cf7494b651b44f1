"""Weights from a model that trains straight into a running vLLM, by vLLM's own transfer: no files between.

Written, not yet run: both ways need GPUs. "nccl" sends to a server's workers on other GPUs, "ipc" hands them
over on the same ones (vLLM then reads pickled handles: VLLM_ALLOW_INSECURE_SERIALIZATION=1, on one machine
and among processes that trust each other). The training's environment has vLLM installed for it. The server:

    VLLM_SERVER_DEV_MODE=1 tools/serve_vllm.sh H --weight-transfer-config '{"backend": "nccl"}'

whose control endpoints answer everybody who reaches them: leave HOST at 127.0.0.1, or guard the network.
`convert.follow` goes by files instead, and needs neither.
"""

import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from megatron_eagle.checkpoint.content import unwrapped
from megatron_eagle.convert.mapping import ModelMapping
from megatron_eagle.convert.streaming import stream_weights
from megatron_eagle.errors import UserError
from megatron_eagle.model.lora import LoraConfig
from megatron_eagle.runtime.agreement import agreed

Way = Literal["nccl", "ipc"]
_CACHES = ("prefix", "mm", "encoder")
_TIMEOUT = 600  # seconds: answers that are being written are waited for


class Declared(NamedTuple):
    """What vLLM is told of a tensor before it comes (its `ParamMeta`)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class LiveSource:
    """A vLLM `WeightSource` of the model: what is declared, and the tensors in the same order.

    Args:
        models: this rank's chunks, with their wrappers or without.
        lora: the run's adapters, which are merged.
    """

    def __init__(self, models: Sequence[torch.nn.Module], lora: LoraConfig | None = None) -> None:
        self._models, self._lora = models, lora

    def metadata(self) -> list[Declared]:
        """Every tensor; nothing is exchanged."""
        (_, model), *_ = unwrapped(self._models)
        dtype = next(parameter.dtype for parameter in model.parameters())
        shapes = ModelMapping(model.eagle, has_head=False).hf_shapes
        return [Declared(name, dtype, shape) for name, shape in shapes.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Collective over all ranks."""
        return stream_weights(self._models, lora=self._lora)


class VllmTransfer:
    """A server that takes the weights whenever `send` is called. Collective over all ranks, also to make.

    Args:
        source: of this rank's model.
        url: the server's, as rank 0 reaches it.
        way: see the module.
        address, port: of rank 0, for the server's workers ("nccl" alone).
        workers: the server's GPUs ("nccl" alone).

    Raises:
        UserError: vLLM is not installed here, or the server refuses.
    """

    def __init__(
        self,
        source: LiveSource,
        url: str,
        way: Way = "nccl",
        *,
        address: str = "",
        port: int = 0,
        workers: int = 1,
    ) -> None:
        self._url, self._rank = url.rstrip("/").removesuffix("/v1"), torch.distributed.get_rank()
        with agreed():
            try:
                from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
                from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
                from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
                from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
            except ImportError as error:
                raise UserError(
                    f"vLLM's weight transfer is missing here: {error}; install vllm 0.32"
                ) from None
        info: Any
        if way == "ipc":
            info = IPCTrainerInitInfo(rank=self._rank)
        else:
            info = NCCLTrainerInitInfo(address, port, workers + 1, rank=self._rank)
        client = HTTPVLLMWeightSyncClient(self._url, timeout=_TIMEOUT)
        self._engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)

    def send(self) -> None:
        """Between two steps: the server finishes its answers, takes the weights, empties its caches, goes on.

        Raises:
            UserError: it does not answer, or refuses; on every rank.
        """
        with agreed():
            if self._rank == 0:
                self._post("pause?mode=wait")
        self._engine.send_weights()
        with agreed():
            if self._rank == 0:
                for cache in _CACHES:
                    self._post(f"reset_{cache}_cache")
                self._post("resume")

    def _post(self, path: str) -> None:
        request = urllib.request.Request(f"{self._url}/{path}", method="POST")
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT):
                pass
        except (urllib.error.URLError, OSError) as error:
            raise UserError(
                f"{request.full_url}: {error}; is it started as `convert.vllm_transfer` says?"
            ) from None
