"""Small artefacts of one version: `python -m tests.compatibility.make_fixture REPOSITORY VERSION`.

Made by the command lines of the checkout REPOSITORY alone, so that it works for any commit. A store names its
media by absolute paths: all is made in `place(VERSION)`. The result is VERSION.tar.xz beside this file.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from tests.convert.hf_folder import write_tokenizer
from tests.convert.media import write_video
from tests.data.helpers import make_image

CONVERSATIONS = [
    {"image": "wide.png", "question": "<image>\nWhat is in the picture?", "answer": "A cat."},
    {
        "image": ["tall.png", "wide.png"],
        "question": "<image><image>\nDescribe!",
        "answer": "A rocket, a cup.",
    },
    {"video": "clip.mp4", "question": "<video>\nDescribe the clip, please!", "answer": "A clip of coffee."},
    {"question": "You are a helpful assistant?", "answer": "A cup of coffee, please!"},
]
RUN = """\
model:
  vision:
    {image_size: 16, patch_size: 4, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1,
     num_attention_heads: 2}
  text:
    {hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2,
     num_key_value_heads: 1}
data: {path: store, length: 128, prefetch: false}
training: {train_iterations: 4, global_batch_size: 2, precision: fp32}
optimizer: {lr: 1.0e-2, lr_warmup_iterations: 1}
evaluation: {data: store, interval: 2}
checkpoint: {path: run, save_interval: 2, keep_last: 1}
logging: {progress: false, tensorboard: false}
"""


def archive(version: str) -> Path:
    """The artefacts of a version, packed."""
    return Path(__file__).with_name(f"{version}.tar.xz")


def place(version: str) -> Path:
    """Where they were made, and must lie again for the media to be found."""
    return Path(f"/tmp/megatron-eagle-{version}")


def main(repository: str, version: str) -> None:
    """Make them, and pack them."""
    root = place(version)
    shutil.rmtree(root, ignore_errors=True)
    (root / "media").mkdir(parents=True)
    make_image(root / "media/wide.png", (40, 20), 1)
    make_image(root / "media/tall.png", (16, 40), 2)
    write_video(root / "media/clip.mp4", frames=12)
    write_tokenizer(root / "tokenizer")
    lines = []
    for number, entry in enumerate(CONVERSATIONS):
        media = {name: entry[name] for name in ("image", "video") if name in entry}
        turns = [{"from": "human", "value": entry["question"]}, {"from": "gpt", "value": entry["answer"]}]
        lines.append(json.dumps({"id": number, **media, "conversations": turns}))
    (root / "conversations.jsonl").write_text("\n".join(lines) + "\n")
    (root / "recipe.yaml").write_text(
        "small: {annotation: conversations.jsonl, root: media, repeat_time: 2}\n"
    )
    (root / "run.yaml").write_text(RUN)

    def tool(name: str, *words: str) -> None:
        source = Path(repository).absolute()
        settings = {"PYTHONPATH": f"{source}:{source / 'kernels'}", "TORCHDYNAMO_DISABLE": "1"}
        command = [sys.executable, str(source / "tools" / f"{name}.py"), *words]
        subprocess.run(command, cwd=root, env=os.environ | settings, check=True)

    tool(
        "preprocess_data",
        "run",
        "--recipe",
        "recipe.yaml",
        "--tokenizer",
        "tokenizer",
        "--output",
        "store",
        "--max-tokens",
        "128",
        "--tile-size",
        "16",
        "--patch-size",
        "4",
        "--max-tiles",
        "4",
        "--fps",
        "2",
        "--min-frames",
        "2",
        "--workers",
        "1",
    )
    tool("pack_data", "--data", "store", "--length", "128")
    tool("train", "run", "--config", "run.yaml", "training.stop_at_iteration=2")
    shutil.copytree(root / "run", root / "stopped")
    tool("train", "run", "--config", "run.yaml")  # what a resume must give again
    tool("convert_hf", "export", "--checkpoint", "stopped", "--hf", "hf")
    (root / "run" / "logs" / "metrics.jsonl").rename(root / "expected.jsonl")
    shutil.rmtree(root / "run")
    (root / "stopped").rename(root / "run")
    shutil.rmtree(root / "run" / "logs" / "heartbeat")  # names the machine
    with tarfile.open(archive(version), "w:xz") as packed:
        for file in sorted(root.rglob("*")):
            packed.add(file, file.relative_to(root), recursive=False, filter=_of_nobody)
    shutil.rmtree(root)


def _of_nobody(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    main(*sys.argv[1:])
