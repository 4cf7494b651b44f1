"""A video of more frames than a 128K pack holds, from its file to a server's answer: what each step takes.

A tiny model with the tiles of the real one (448 pixels, patches of 14, 256 tokens each) and a vocabulary that
cuts labels as Qwen2.5's does. Every step is a command as a user gives it, in a process of its own. Where
`vllm` is on the PATH (that of `make test-serving`: `PATH=$PWD/.venv-vllm/bin:$PATH`), `certify` and
`evaluate` also ask a server, started by `serve_vllm.sh`. Steps that are done are kept in `--kept DIR`.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import yaml
from benchmarks.report import REPO, Report, progress
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.data.text.tokenizer import RESERVED
from megatron_eagle.errors import UserError
from megatron_eagle.files import split_lines
from megatron_eagle.hf_model.prompt import frame_label

FRAMES, LENGTH = {False: 128, True: 512}, {False: 36_864, True: 143_360}
QUESTION, ANSWER = "Which colour fills the picture at the end?", "White."
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
STARTED = 600  # seconds that a server may take


def run(large: bool = False, kept: str | None = None) -> Report:
    """128 frames in packs of 36,864 tokens; `large`: 512 in packs of 143,360."""
    with tempfile.TemporaryDirectory() as temporary:
        steps = _Steps(Path(kept or temporary), FRAMES[large], LENGTH[large])
        steps.folder.mkdir(parents=True, exist_ok=True)
        rows = list(steps.rows())
        details = steps.facts()
    title = f"{FRAMES[large]} frames of 448 pixels, {details['tokens']:,} tokens, a tiny model on a CPU"
    return Report(title, rows, "--large" if large else "", details)


class _Steps:
    """The commands of one length, in a folder."""

    def __init__(self, folder: Path, frames: int, length: int) -> None:
        self.folder, self.frames, self.length = folder.resolve() / str(frames), frames, length
        self.vllm = shutil.which("vllm")

    def rows(self) -> Iterator[dict[str, Any]]:
        """Each step with what it took."""
        if not (self.folder / "train.yaml").exists():
            self._make_input()
        media = ("--video", "v.mp4", "--prompt", QUESTION, "--max-frames", str(self.frames))
        run_eagle, tokens = self._run, str(self.length)
        yield run_eagle(
            "preprocess", "run", "--recipe", "recipe.json", "--tokenizer", "tokenizer", "--output", "store",
            "--max-tokens", tokens, "--max-frames", str(self.frames), "--template", "hf", "--workers", "1",
        )  # fmt: skip
        yield run_eagle("pack", "--data", "store", "--length", tokens)
        yield run_eagle("train", "run", "--config", "train.yaml")
        yield run_eagle("convert", "export", "--checkpoint", "checkpoint", "--hf", "hf")
        yield run_eagle("generate", "--hf", "hf", *media, "--max-new-tokens", "8")
        certify = ("convert", "certify", "--hf", "hf", "--store", "store")
        evaluate = ["evaluate", "run", "--benchmark", "benchmark.jsonl", "--max-new-tokens", "8"]
        evaluate += ["--max-frames", str(self.frames)]
        if self.vllm is None:
            yield run_eagle(*certify)
        else:
            served = self.folder / "served.json"
            if not served.exists():
                with self._server() as (url, took):
                    asked = [run_eagle(*certify, "--endpoint", url)]
                    asked.append(run_eagle(*evaluate, "--endpoint", url, "--output", "served"))
                    served.write_text(json.dumps([*asked, took()]), encoding="utf-8")
            yield from json.loads(served.read_text(encoding="utf-8"))
        yield run_eagle(*evaluate, "--hf", "hf", "--output", "scores")

    def facts(self) -> dict[str, Any]:
        """Tokens of the sample, the certificate's numbers, and each answer."""
        store = SampleStore(self.folder / "store", self.length)
        certificate = json.loads((self.folder / "hf" / "certificate.json").read_text(encoding="utf-8"))
        found = {name: certificate[name] for name in ("green", "samples")}
        answers = {}
        for name in ("scores", "served"):
            if (file := self.folder / name / "answers.jsonl").exists():
                answers[name] = json.loads(split_lines(file.read_text(encoding="utf-8"))[-1])["answer"]
        return {"tokens": len(store[0].ids), "certificate": found, "answers": answers}

    def _make_input(self) -> None:
        _make_tokenizer(self.folder / "tokenizer")
        _make_clip(self.folder / "v.mp4", self.frames + 64)
        turns = [{"from": "human", "value": f"<video>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}]
        question = {"id": "1", "question": QUESTION, "answer": ANSWER, "metric": "exact", "videos": ["v.mp4"]}
        # One head of a size that vLLM has on a CPU: time is that of attention.
        text = {"hidden_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
        vision = {"image_size": 448, "patch_size": 14, "num_hidden_layers": 1}
        settings = {
            "model": {"preset": "tiny", "vision": vision, "text": text},
            "data": {"path": "store", "length": self.length},
            "training": {"train_iterations": 1, "global_batch_size": 1, "precision": "fp32"},
            "layers": {"loss": "fused"},
            "checkpoint": {"path": "checkpoint"},
        }
        for name, content in (
            ("data.jsonl", json.dumps({"conversations": turns, "video": "v.mp4"}) + "\n"),
            ("recipe.json", json.dumps({"data": {"annotation": "data.jsonl"}})),
            ("benchmark.jsonl", json.dumps(question) + "\n"),
            ("train.yaml", yaml.safe_dump(settings)),
        ):
            (self.folder / name).write_text(content, encoding="utf-8")

    def _run(self, *command: str) -> dict[str, Any]:
        """Run a command of `megatron-eagle`, or find what it took.

        Raises:
            UserError: it fails; the end of what it said.
        """
        name = " ".join(command[:2] if command[1][0] != "-" else command[:1])
        name += " --endpoint" * ("--endpoint" in command)
        kept = self.folder / f"{name.replace(' ', '_')}.json"
        if not kept.exists():
            progress(f"megatron-eagle {name}")
            log, start = kept.with_suffix(".log"), time.perf_counter()
            environment = {
                **os.environ,
                "PYTHONPATH": f"{REPO}:{REPO / 'kernels'}",
                "TORCHDYNAMO_DISABLE": "1",
            }
            with log.open("w") as said:
                process = subprocess.Popen(
                    [sys.executable, "-W", "ignore", "-m", "megatron_eagle", *command],
                    cwd=self.folder,
                    env=environment,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                )
                _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise UserError(f"megatron-eagle {' '.join(command)}: {log}:\n{log.read_text()[-2000:]}")
            took = _row(f"megatron-eagle {name}", time.perf_counter() - start, usage.ru_maxrss / 1e6)
            kept.write_text(json.dumps(took), encoding="utf-8")
        row: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        progress(f"  {row['minutes']:.1f} minutes, {row['peak GB']:.2f} GB")
        return row

    @contextmanager
    def _server(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """URL of vLLM with the export's plugin, and what the server has taken so far."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "VLLM", "TRITON", "TORCH"))
        }
        environment |= {
            "PORT": str(port),
            "MAX_FRAMES": str(self.frames),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        url, log, start = f"http://127.0.0.1:{port}", self.folder / "server.log", time.perf_counter()
        with log.open("w") as said:
            process = subprocess.Popen(
                [str(REPO / "tools" / "serve_vllm.sh"), "hf", "--dtype", "float32", "--enforce-eager"],
                cwd=self.folder,
                env=environment,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                _wait(url, process, log)
                yield (
                    url,
                    lambda: _row("serve_vllm.sh", time.perf_counter() - start, _group_peak(process.pid)),
                )
            finally:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(timeout=60)


def _row(step: str, seconds: float, gigabytes: float) -> dict[str, Any]:
    return {"step": step, "minutes": seconds / 60, "peak GB": gigabytes}


def _group_peak(group: int) -> float:
    """GB: the most memory of each process of a group, added up; pages that they share count in each."""
    found = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if os.getpgid(int(status.parent.name)) == group:
                lines = status.read_text().splitlines()
                found += next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
        except OSError:
            continue  # it has ended
    return found / 1e6


def _wait(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + STARTED
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10):
                return
        except OSError:
            time.sleep(1)
    raise UserError(f"no server: {log}:\n{log.read_text()[-2000:]}")


def _make_clip(path: Path, frames: int) -> None:
    """A clip of 160 x 90 at 2 frames a second, which fills with white from the left."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=2)
        stream.width, stream.height, stream.pix_fmt = 160, 90, "yuv420p"
        for k in range(frames):
            picture = np.zeros((90, 160, 3), np.uint8)
            picture[:, : k * 160 // frames] = 255
            picture[:, k * 160 // frames :, 0] = 8 * k % 256
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _make_tokenizer(folder: Path) -> None:
    """A small tokenizer that cuts digits and words as Qwen2.5's does, trained on labels."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=sorted(RESERVED),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([frame_label(1, 0.5), QUESTION, ANSWER] * 10, trainer)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
