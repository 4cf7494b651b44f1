"""A running vLLM that takes a run's next checkpoint answers as one that was started with it."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_eagle.checkpoint import TRACKER
from megatron_eagle.hf_model.vllm_plugin.reload import WEIGHTS_PATH
from megatron_eagle.inference.batch import read_requests
from megatron_eagle.inference.generate import ExportedModel, Sampling
from megatron_eagle.inference.server_client import ServedModel
from tests.convert.small_eagles import write_small_eagle
from tests.paths import REPO
from tests.serving.server import ENVIRONMENT, ask, running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ENVIRONMENT / ".complete").exists(), reason="no vLLM: make test-serving"),
]
SHORT = Sampling(max_new_tokens=40)
HEAD = "language_model.lm_head.weight"


@pytest.fixture
def command(tmp_path, monkeypatch):
    """This checkout's, which serve_vllm.sh --follow exports with."""
    file = tmp_path / "megatron-eagle"
    file.write_text(
        f'#!/bin/sh\nPYTHONPATH={REPO}:{REPO}/kernels exec {sys.executable} -m megatron_eagle "$@"\n'
    )
    file.chmod(0o755)
    monkeypatch.setenv("MEGATRON_EAGLE", str(file))


def served_iteration(url: str) -> int:
    with urllib.request.urlopen(f"{url}{WEIGHTS_PATH}", timeout=60) as reply:
        return json.load(reply)["iteration"]


def test_a_running_server_takes_the_next_checkpoint(demo, tmp_path, command):
    """While it is asked: each answer is that of the old export or of the new one, at the end of the new."""
    run, hf = tmp_path / "checkpoint", tmp_path / "hf"
    shutil.copytree(demo / "checkpoint", run)
    (run / TRACKER).write_text("100\n")
    questions = [request for _, _, request in read_requests(demo / "questions.jsonl")]
    new = [ExportedModel(demo / "hf").answer(request, SHORT) for request in questions]
    with running(hf, tmp_path / "log", "--follow", str(run)) as url:
        served = ServedModel(url)
        old = [ExportedModel(hf).answer(request, SHORT) for request in questions]
        bodies = [served.body(request, SHORT) for request in questions]
        ids, found = zip(*(ask(url, body) for body in bodies), strict=True)
        assert list(found) == old and served_iteration(url) == 100
        assert sum(a != b for a, b in zip(old, new, strict=True)) > len(questions) // 4  # the control

        (run / TRACKER).write_text("200\n")
        with ThreadPoolExecutor(4) as threads:
            end = time.monotonic() + 300
            while served_iteration(url) != 200:
                assert time.monotonic() < end, (tmp_path / "log").read_text()[-2000:]
                for i, (_, answer) in enumerate(threads.map(lambda body: ask(url, body), bodies[:4])):
                    assert answer in (old[i], new[i])
        again = [ask(url, body) for body in bodies]
        assert [answer for _, answer in again] == new and [asked for asked, _ in again] == list(ids)
        request = urllib.request.Request(f"{url}{WEIGHTS_PATH}", method="POST")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        assert refused.value.code == 403
    log = (tmp_path / "log").read_text()
    assert f"{hf}: iteration 200 exported in " in log and ": iteration 200 served after " in log


def in_process(old, new, way: str) -> list[float]:
    """Log probabilities of a prompt, of `reload_in_process.py`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VLLM", "TORCH"))}
    environment |= {
        "PYTHONPATH": str(old / "vllm_plugin"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    script = REPO / "tests" / "serving" / "reload_in_process.py"
    done = subprocess.run(
        [ENVIRONMENT / "bin" / "python", script, old, new, way],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])["after"]


def apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _demo(request) -> Path:
    """The demo's export, trained where it is needed."""
    return request.getfixturevalue("demo") / "hf"


def tie(folder) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[HEAD]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("kind", "wrong"), [("own head", "copy"), ("tied", "vllm"), ("experts", "vllm")])
def test_packed_layers_take_the_new_weights(request, tmp_path, kind, wrong):
    """Those of a tied output layer too, which vLLM's own reload leaves packed as they were, and of experts,
    which it does not pack. `wrong`: a way that does not load all is seen by the same comparison."""
    if kind == "experts":
        export = write_small_eagle("qwen3_moe, probabilities as they are", tmp_path)
    else:
        export = _demo(request)
    old, new = (shutil.copytree(export, tmp_path / name) for name in ("old", "new"))
    weights = load_file(new / "model.safetensors")
    changed = {name: tensor + tensor.roll(1, 0) / 8 for name, tensor in weights.items()}
    save_file(changed, new / "model.safetensors", metadata={"format": "pt"})
    if kind == "tied":
        for folder in (old, new):
            tie(folder)
    fresh = in_process(old, new, "fresh")
    assert apart(in_process(old, new, "reload"), fresh) < 1e-5
    assert apart(in_process(old, new, wrong), fresh) > 1e-3
