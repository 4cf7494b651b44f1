"""What vLLM is told of the weights before they come is what comes; the transfer itself needs GPUs."""

import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megatron_eagle.checkpoint import load_checkpoint, read_model_config
from megatron_eagle.convert.vllm_transfer import LiveSource, VllmTransfer
from megatron_eagle.errors import UserError
from megatron_eagle.model.eagle import build_model
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from tests.convert.hf_folder import read_weights
from tests.parallel.harness import launch

_PACKAGE = "vllm.distributed.weight_transfer"


def sent(source: str) -> list[str]:
    """On each rank of TP2: the names, after a transfer by a stand-in of vLLM's trainer."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_POST(self):
            asked.append(self.path)
            self.send_response(404 if "refused" in self.path else 200)
            self.end_headers()

    class Engine:
        def __init__(self, info, client, source):
            assert (info.address, info.port, info.world_size, info.rank) == (
                "n1",
                5,
                9,
                torch.distributed.get_rank(),
            )
            self.source = source

        def send_weights(self):
            for declared, (name, tensor) in zip(self.source.metadata(), self.source, strict=True):
                assert declared == (name, tensor.dtype, tuple(tensor.shape))
                names.append(name)

    names: list[str] = []
    contents = {
        "clients": {"HTTPVLLMWeightSyncClient": lambda url, timeout: url},
        "factory": {"WeightTransferTrainerFactory": SimpleNamespace(trainer_init=Engine)},
        "ipc_engine": {"IPCTrainerInitInfo": None},
        "nccl_engine": {
            "NCCLTrainerInitInfo": lambda address, port, world_size, rank: SimpleNamespace(
                address=address, port=port, world_size=world_size, rank=rank
            )
        },
    }
    config = read_model_config(source)
    with model_parallel(ParallelConfig(tensor_model_parallel_size=2)) as mesh:
        models = build_model(config, mesh, torch.device("cpu"))
        load_checkpoint(source, models=models)
        live = LiveSource(models)
        with pytest.raises(UserError, match="vLLM's weight transfer is missing here"):
            VllmTransfer(live, "http://h")
        for name, content in contents.items():
            module = ModuleType(f"{_PACKAGE}.{name}")
            vars(module).update(content)
            sys.modules[module.__name__] = module
        for name in ("vllm", "vllm.distributed", _PACKAGE):
            sys.modules[name] = ModuleType(name)
        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        VllmTransfer(live, f"{url}/v1", address="n1", port=5, workers=8).send()
        with pytest.raises(UserError, match="refused/pause.*404"):
            VllmTransfer(live, f"{url}/refused", address="n1", port=5, workers=8).send()
        server.shutdown()
    first = torch.distributed.get_rank() == 0
    order = ["/pause?mode=wait", "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/resume"]
    assert asked == ([*order, "/refused/pause?mode=wait"] if first else [])
    return names


def test_what_is_declared_is_what_comes(checkpoint, exported):
    for names in launch(sent, 2, str(checkpoint)):
        head = "vision_model.vision_model.head."
        assert set(names) == {name for name in read_weights(exported) if not name.startswith(head)}
