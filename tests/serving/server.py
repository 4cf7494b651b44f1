"""vLLM itself, started by `tools/serve_vllm.sh` in its own environment, and the demo's model to serve."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.paths import REPO

ENVIRONMENT = REPO / ".venv-vllm"
STARTED = 600  # seconds


def train_demo(folder: Path) -> Path:
    """The demo in `folder`, with attention heads of a size that vLLM has on a CPU; its runs/demo."""
    shutil.copytree(REPO / "examples" / "demo", folder / "examples" / "demo")
    (folder / "tools").symlink_to(REPO / "tools")
    config = folder / "examples" / "demo" / "train.yaml"
    text = config.read_text()
    assert "  preset: tiny" in text
    config.write_text(
        text.replace("  preset: tiny", "  text: {num_attention_heads: 2} # of 32\n  preset: tiny")
    )
    done = subprocess.run(
        [sys.executable, "examples/demo/run.py"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs" / "demo"


@contextmanager
def running(export: Path, log: Path, *options: str, length: int = 2048) -> Iterator[str]:
    """URL of a server of `export`, which ends with the block; `options` are `serve_vllm.sh`'s, `length` the
    tokens of a prompt with its answer, also beyond those that the model was trained for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VLLM", "TRITON", "TORCH"))
    }
    environment |= {
        "PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}",
        "PORT": str(port),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    }
    script = str(REPO / "tools" / "serve_vllm.sh")
    settings = ("--dtype", "float32", "--max-model-len", str(length), "--enforce-eager")
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as said:
        process = subprocess.Popen(
            ["bash", script, str(export), *options, *settings],
            cwd=log.parent,  # no checkout
            env=environment,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait(url, process, log)
            yield url
        finally:
            for signum in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, signum)
                    process.wait(timeout=60)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + STARTED
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"no server after {STARTED} s: {log.read_text()[-3000:]}")


def reply(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """All that the server says of a prompt and its answer, greedily decoded.

    Raises:
        RuntimeError: the server refuses; status and message.
    """
    body = {"model": "eagle2.5", "max_tokens": 40, "temperature": 0, "return_token_ids": True, **body}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            found: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{error.code}: {json.load(error)['error']['message']}") from None
    return found


def ask(url: str, body: dict[str, Any]) -> tuple[list[int], str]:
    """The prompt's ids and the answer.

    Raises:
        RuntimeError: as `reply`.
    """
    found = reply(url, body)
    return found["prompt_token_ids"], (found["choices"][0]["message"]["content"] or "").strip()
