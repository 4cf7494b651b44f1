"""The Eagle-Video pipeline from new clips to scores, each step a tool as a user would run it.

    run.py [--videos DIR] [--encoder DIR] [--endpoint URL/v1 --model NAME] [--hf EXPORT] [--output DIR]

What is not given is stood in for, and said so: the demo's two clips, an encoder with random weights, an
endpoint without a model.  Started again, it goes on; no network is used but the endpoint.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import yaml
from random_encoder import make_encoder
from stand_in import Server, answer, serving

from megatron_eagle.eagle_video.chapters import VIDEO_SUFFIXES
from megatron_eagle.errors import UserError, run_cli
from megatron_eagle.files import split_lines

HERE = Path(__file__).resolve().parent
REPO = HERE.parent.parent
DEMO = REPO / "examples" / "demo"
CLIPS = {"bigbuckbunny.mp4", "bikes.mp4"}  # of the demo
PORT = 18732  # the same every time: answers are kept by address
MAX_TOKENS, TILE_SIZE, PATCH_SIZE = 2048, 64, 16
QUESTIONS = 8  # at most, of the evaluation
STEPS = 6


def main() -> None:
    options = _arguments()
    out: Path = options.output.resolve()
    out.mkdir(parents=True, exist_ok=True)
    step(1, "New videos, what training has, and an encoder")
    videos = options.videos.resolve() if options.videos else copy_demo_clips(out / "videos")
    encoder = options.encoder or random_encoder(out / "encoder")
    new, old = write_lists(videos, out)
    tau = options.tau if options.tau is not None else 0.5 if options.encoder else 0.95
    step(2, f"Selection: clips whose highest cosine to what training has is below {tau:g}")
    tool(
        "select_videos",
        "--candidates",
        new,
        "--existing",
        old,
        "--encoder",
        encoder,
        "--output",
        out / "selection",
        "--tau",
        tau,
    )
    with ExitStack() as stack:
        asked = ["--endpoint", options.endpoint, "--model", options.model]
        if options.endpoint is None:
            asked = ["--endpoint", stack.enter_context(serving(stand_in())).url, "--model", "stand-in"]
        step(3, "Clip level: questions on the kept clips, lifted to their videos")
        clips = ["clips", "--clips", out / "selection" / "kept.jsonl", "--output", out / "clips.jsonl"]
        tool("annotate_videos", *clips, *asked, "--dry-run")
        tool("annotate_videos", *clips, *asked)
        step(4, "Story level: parts found by what changes on screen, captions, questions on the whole")
        story = ["--videos", videos, "--output", out / "story.jsonl", "--shortest-part", 3]
        tool("annotate_videos", "story", *story, *asked)
    step(5, "Samples to tokens to packs")
    lines = read_samples(out)
    tokenizer = options.tokenizer or train_tokenizer(lines, out / "tokenizer")
    pack(out, tokenizer)
    step(6, "Evaluation of an export, on questions of the samples")
    scored = evaluate(options.hf, lines, out)
    last_screen(out, options, scored)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--videos",
        type=Path,
        metavar="DIR",
        help="its first video plays the training set, the others are new",
    )
    add("--encoder", type=Path, metavar="DIR", help="CLIP or SigLIP folder (default: random weights)")
    add("--tau", type=float, help="default 0.5, as in the paper; 0.95 for random weights")
    add("--endpoint", metavar="URL", help="up to /v1 (default: one without a model, on this machine)")
    add("--model", metavar="NAME", help="the model's name there")
    add("--tokenizer", type=Path, metavar="DIR", help="default: one trained on the samples")
    add("--hf", type=Path, metavar="EXPORT", help="to evaluate (default: the demo's, if it has run)")
    add("--output", type=Path, default=REPO / "runs" / "eagle_video", help="default runs/eagle_video")
    options = parser.parse_args()
    if (options.endpoint is None) != (options.model is None):
        raise UserError("--endpoint and --model belong together")
    if options.videos is not None and not options.videos.is_dir():
        raise UserError(f"--videos {options.videos}: no such folder")
    return options


def copy_demo_clips(folder: Path) -> Path:
    sys.path.append(str(DEMO))
    from assets import copy_media

    copy_media(CLIPS, folder)
    say(f"no --videos: the demo's two clips, in {shown(folder)}")
    return folder


def random_encoder(folder: Path) -> Path:
    if not (folder / "preprocessor_config.json").is_file():
        make_encoder(folder)
    say("no --encoder: a tiny SigLIP with random weights; what it selects means nothing")
    return folder


def write_lists(videos: Path, out: Path) -> tuple[Path, Path]:
    """The lists of new videos and of those in training."""
    files = sorted(str(file) for file in videos.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES)
    if len(files) < 2:
        raise UserError(f"{videos}: {len(files)} videos; needs one for the training set and another")
    old = files[::3]
    new = [file for file in files if file not in old]
    for name, chosen in (("old.txt", old), ("new.txt", new)):
        (out / name).write_text("".join(f"{file}\n" for file in chosen))
    say(f"{len(old)} videos play the training set, {len(new)} are new")
    return out / "new.txt", out / "old.txt"


def stand_in() -> Server:
    """An endpoint without a model; this machine is asked directly, whatever proxy is set."""
    os.environ["no_proxy"] = ",".join(filter(None, [os.environ.get("no_proxy"), "127.0.0.1"]))
    try:
        server = Server(answer, PORT)
    except OSError:  # in use
        server = Server(answer)
    say(f"no --endpoint: a stand-in at {server.url}, which answers in the right form about nothing;")
    say("its samples show that the steps fit together and are worth nothing for training")
    return server


def read_samples(out: Path) -> dict[str, list[dict]]:
    """Samples by the file that holds them, without empty files."""
    found = {}
    for name in ("clips", "story"):
        if lines := split_lines((out / f"{name}.jsonl").read_text(encoding="utf-8")):
            found[name] = [json.loads(line) for line in lines]
    if not found:
        raise UserError(f"{out}: no samples; *.dropped.jsonl there say why")
    return found


def train_tokenizer(lines: dict[str, list[dict]], folder: Path) -> Path:
    sys.path.append(str(DEMO))
    from train_tokenizer import train_tokenizer

    texts = [turn["value"] for samples in lines.values() for s in samples for turn in s["conversations"]]
    say(f"no --tokenizer: {train_tokenizer(texts, folder)} rows, trained on the samples")
    return folder


def pack(out: Path, tokenizer: Path) -> None:
    recipe = {
        f"eagle_video_{name}": {"annotation": f"{name}.jsonl", "root": ".", "repeat_time": 1}
        for name in ("clips", "story")
        if (out / f"{name}.jsonl").stat().st_size
    }
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    tool(
        "preprocess_data",
        "run",
        "--recipe",
        out / "recipe.yaml",
        "--tokenizer",
        tokenizer,
        "--output",
        out / "data",
        "--max-tokens",
        MAX_TOKENS,
        "--tile-size",
        TILE_SIZE,
        "--patch-size",
        PATCH_SIZE,
        "--max-tiles",
        6,
        "--workers",
        2,
    )
    tool("pack_data", "--data", out / "data", "--length", MAX_TOKENS)


def evaluate(hf: Path | None, lines: dict[str, list[dict]], out: Path) -> bool:
    """Whether there was an export to evaluate."""
    hf = hf or REPO / "runs" / "demo" / "hf"
    if not hf.is_dir():
        say("left out: there is no export; run `make demo` first, or give --hf")
        return False
    questions = [
        {
            "id": f"{name} {number}",
            "question": sample["conversations"][0]["value"].removeprefix("<video>\n"),
            "answer": sample["conversations"][1]["value"],
            "metric": "anls",
            "videos": [sample["video"]],
            "category": name,
        }
        for name, samples in lines.items()
        for number, sample in enumerate(samples[: QUESTIONS // len(lines)], 1)
    ]
    path = out / "benchmark.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    tool(
        "evaluate",
        "run",
        "--hf",
        hf,
        "--benchmark",
        path,
        "--output",
        out / "scores",
        "--max-frames",
        8,
        "--max-new-tokens",
        16,
    )
    return True


def last_screen(out: Path, options: argparse.Namespace, scored: bool) -> None:
    rows = [
        ("selection/report.html", "kept and refused clips with pictures, histogram of cosines"),
        ("selection/kept.jsonl", "the clips that were annotated"),
        ("clips.jsonl, story.jsonl", "training samples, each with where it comes from"),
        ("*.dropped.jsonl", "what was left out, and why"),
        ("*.usage.json", "requests, tokens and cost"),
        ("data", "token store and packs, for `data.path` of tools/train.py"),
    ]
    rows += [("scores", "every answer, its score, the table")] if scored else []
    print(f"\nIn {shown(out)}:\n")
    print("\n".join(f"  {name:<26}{text}" for name, text in rows))
    if options.endpoint is None:
        print("\nThe samples are a stand-in's: worth nothing for training. With a model (vLLM serves one):")
        print(f"  {shown(HERE / 'run.py')} --videos DIR --encoder SIGLIP --endpoint URL/v1 --model NAME")


def tool(name: str, *arguments: object) -> None:
    """Print the command of a tool, run it. Raises UserError if it fails."""
    words = [f"tools/{name}.py", *(shown(a) if isinstance(a, Path) else str(a) for a in arguments)]
    print(f"      $ python {shlex.join(words)}", flush=True)
    status = run_tool(name, *arguments)
    if status:
        raise UserError(f"`{words[0]}` ended with status {status}; its message is above")


def run_tool(name: str, *arguments: object) -> int:
    """The status of a tool in a process of its own."""
    command = [sys.executable, REPO / "tools" / f"{name}.py", *arguments]
    return subprocess.run(list(map(str, command)), cwd=REPO).returncode


def step(number: int, title: str) -> None:
    print(f"\n[{number}/{STEPS}] {title}", flush=True)


def say(message: str) -> None:
    print(f"      {message}", flush=True)


def shown(path: Path) -> str:
    return str(path.relative_to(REPO)) if path.is_relative_to(REPO) else str(path)


if __name__ == "__main__":
    run_cli(main)
