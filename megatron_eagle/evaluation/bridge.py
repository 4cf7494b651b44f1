"""Other evaluation kits on a served model: the command, and the configuration it needs.

`tools/serve_vllm.sh` serves an export; both kits talk to it as to OpenAI's API. They sample frames in their
own way and send them as pictures, so their numbers are not those of the native runner.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_eagle.errors import UserError

KITS = ("lmms-eval", "vlmevalkit")
# VLMEvalKit's settings of data sets of videos, but for the number of frames.
_VIDEOS: dict[str, dict[str, Any]] = {
    "Video-MME": {"class": "VideoMME"},
    "MVBench": {"class": "MVBench"},
    "MVBench_MP4": {"class": "MVBench_MP4"},
    "MMBench-Video": {"class": "MMBenchVideo", "pack": False},
    "MLVU": {"class": "MLVU"},
    "LongVideoBench": {"class": "LongVideoBench"},
}


def write_bridge(
    kit: str, endpoint: str, model: str, tasks: list[str], folder: Path, max_frames: int = 256
) -> str:
    """Write `folder`/evaluate.sh (and VLMEvalKit's config.json); returns the script.

    Of a video the kit shows `max_frames`, unless a task of VLMEvalKit names another number. The key is taken
    from the environment when the script runs, not written down.
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"{endpoint}: expected the URL of a server, as http://127.0.0.1:8000")
    base = endpoint.rstrip("/") if parts.path.strip("/") else f"{endpoint.rstrip('/')}/v1"
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()  # the script runs from anywhere
    lines = ["#!/usr/bin/env bash", "set -euo pipefail", 'export OPENAI_API_KEY="${OPENAI_API_KEY:-none}"']
    if kit == "lmms-eval":
        lines.append(f"export OPENAI_API_BASE={shlex.quote(base)}")
        arguments = [
            "--model",
            "openai_compatible",
            "--model_args",
            f"model_version={model},max_frames_num={max_frames}",
        ]
        arguments += ["--tasks", ",".join(tasks), "--batch_size", "1"]
        arguments += ["--output_path", str(folder / "results"), "--log_samples"]
        lines.append(shlex.join(["python", "-m", "lmms_eval", *arguments]))
    else:
        settings: dict[str, Any] = {"class": "GPT4V", "model": model, "api_base": f"{base}/chat/completions"}
        settings |= {"temperature": 0, "retry": 3, "img_detail": "high"}
        data = {task: _dataset(task, max_frames) for task in tasks}
        config = {"model": {model.rsplit("/", 1)[-1]: settings}, "data": data}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        run = shlex.join(["--config", str(folder / "config.json"), "--work-dir", str(folder / "results")])
        lines.append(f'python "${{VLMEVALKIT:?the folder of a VLMEvalKit checkout}}/run.py" {run}')
    script = "\n".join(lines) + "\n"
    (folder / "evaluate.sh").write_text(script, encoding="utf-8")
    (folder / "evaluate.sh").chmod(0o755)
    return script


def _dataset(task: str, max_frames: int) -> dict[str, Any]:
    """VLMEvalKit's setting of a task; empty for one whose name it knows as a whole, as Video-MME_1fps."""
    name, _, frames = task.removesuffix("frame").rpartition("_")
    if task in _VIDEOS or (name in _VIDEOS and task.endswith("frame") and frames.isdecimal()):
        shown = max_frames if task in _VIDEOS else int(frames)
        name = task if task in _VIDEOS else name
        return {**_VIDEOS[name], "dataset": name, "nframe": shown}
    if re.search(r"_\d+frame|_[\d.]+fps", task):
        return {}
    classes = {
        **dict.fromkeys(("DocVQA", "InfoVQA", "ChartQA", "TextVQA"), "ImageVQADataset"),
        "OCRBench": "OCRBench",
        "MathVista": "MathVista",
        "MMVet": "MMVet",
        "MMMU": "MMMUDataset",
        "HallusionBench": "ImageYORNDataset",
    }
    if task.startswith(tuple(_VIDEOS)):
        raise UserError(f"{task}: unknown to VLMEvalKit; of videos it has {', '.join(_VIDEOS)}")
    kind = next((kind for start, kind in classes.items() if task.startswith(start)), "ImageMCQDataset")
    return {"class": kind, "dataset": task}
