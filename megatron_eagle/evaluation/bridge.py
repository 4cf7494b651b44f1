"""Other evaluation kits on a served model: the script that runs one, and the configuration it needs.

`tools/serve_vllm.sh` serves an export; both kits talk to it as to OpenAI's API. They sample frames in their
own way and send them as pictures, so their numbers are not those of the native runner, unless a server with
the export's plugin reads the videos itself.
"""

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from megatron_eagle.errors import UserError
from megatron_eagle.evaluation import kit_answers
from megatron_eagle.evaluation.kit_names import named_by_kit, video_setting

# VLMEvalKit asks for as many as a model may have, 32,768, unless it is told: more than a prompt leaves.
_ANSWER_TOKENS = 1024
# The kits end with status 0 whatever happened.
_COUNTED = 'python {count} {kit} "$results"{tasks} || status=$?\nexit "${{status:-0}}"'
_RUNS = '[ -z "${VLMEVALKIT:-}" ] && run=(-m vlmeval) || run=("$VLMEVALKIT/run.py")'


@dataclass(frozen=True)
class Bridge:
    """What a kit is asked to do.

    Attributes:
        endpoint: URL of the server.
        model: its name there.
        tasks: as the kit names them, or as `evaluate list` does.
        max_frames: of a video, unless a task of VLMEvalKit names another number.
        videos: `frames`: the kit cuts them and sends pictures. `files`: it sends the file's place, and the
            server samples it as training did.
        data: the kit's data on this machine, if no hub is to be asked: lmms-eval's folder of task files,
            VLMEvalKit's LMUData.
    """

    endpoint: str
    model: str
    tasks: list[str]
    max_frames: int = 256
    videos: Literal["frames", "files"] = "frames"
    data: Path | None = None

    @property
    def base(self) -> str:
        """The URL up to /v1."""
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"{self.endpoint}: expected the URL of a server, as http://127.0.0.1:8000")
        base = self.endpoint.rstrip("/")
        return base if parts.path.strip("/") else f"{base}/v1"


def write_bridge(kit: str, asked: Bridge, folder: Path) -> str:
    """Write `folder`/evaluate.sh and what it needs; returns the script.

    Keys are taken from the environment when the script runs, not written down.

    Raises:
        UserError: the kit does not know a task, or cannot do what is asked.
    """
    asked_base = asked.base
    if asked.data is not None and not asked.data.is_dir():
        raise UserError(f"{asked.data}: not a folder of data for {kit}")
    tasks = list(dict.fromkeys(named_by_kit(kit, task) for task in asked.tasks))
    place = folder.resolve()  # the script runs from anywhere
    lines = ["#!/usr/bin/env bash", "set -euo pipefail"]
    if asked.data is not None:
        lines.append("export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1")
    # VLMEvalKit takes answers for its own that lie there already: another model's, after a new export.
    lines.append(f"results=${{RESULTS:-{shlex.quote(str(place / 'results'))}/$(date +%Y%m%d-%H%M%S)}}")
    config = None
    if kit == "lmms-eval":
        lines += _lmms_eval(asked, asked_base, tasks)
    else:
        config, more = _vlmevalkit(asked, asked_base, tasks, place)
        lines += more
    count = shlex.quote(str(place / "count_failures.py"))
    named = "" if kit == "lmms-eval" else f" {shlex.join(tasks)}"  # a group of lmms-eval answers as its tasks
    script = "\n".join([*lines, _COUNTED.format(kit=kit, tasks=named, count=count)]) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(kit_answers.__file__, folder / "count_failures.py")
    if config:
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    (folder / "evaluate.sh").write_text(script, encoding="utf-8")
    (folder / "evaluate.sh").chmod(0o755)
    return script


def _lmms_eval(asked: Bridge, base: str, tasks: list[str]) -> list[str]:
    """Its class for OpenAI's API; `python -m lmms_eval` takes the one for chats by that name."""
    if "," in asked.model:
        raise UserError(f"{asked.model}: lmms-eval takes no name with a comma; serve it under another")
    settings = f"model_version={asked.model},max_frames_num={asked.max_frames}"
    if asked.videos == "files":
        settings += ",pass_video_url=True"
    words = ["--model", "openai_compatible", "--model_args", settings, "--tasks", ",".join(tasks)]
    words += ["--batch_size", "1", "--log_samples"]
    if asked.data is not None:
        words += ["--include_path", str(asked.data.resolve())]
    return [
        f"export OPENAI_API_BASE={shlex.quote(base)}",
        'export OPENAI_API_KEY="${OPENAI_API_KEY:-none}"',
        f'{shlex.join(["python", "-m", "lmms_eval", *words])} --output_path "$results" "$@" || status=$?',
    ]


def _vlmevalkit(
    asked: Bridge, base: str, tasks: list[str], place: Path
) -> tuple[dict[str, Any] | None, list[str]]:
    """Videos by a configuration, pictures by name: see `kit_names`."""
    if "/" in asked.model:
        raise UserError(
            f"{asked.model}: VLMEvalKit names its files so; serve it under a name without a slash "
            "(vllm serve --served-model-name)"
        )
    settings = {task: video_setting(task, asked.max_frames) for task in tasks}
    videos = {task: setting for task, setting in settings.items() if setting is not None}
    if asked.videos == "files":
        own = [task for task, setting in videos.items() if setting.get("nframe") != asked.max_frames]
        if own:
            raise UserError(f"{own[0]}: with --videos files every video has --max-frames")
    lines = [
        'export LMDEPLOY_API_KEY="${LMDEPLOY_API_KEY:-none}"',
        # The distribution on PyPI else asks another hub for videos.
        'export VLMEVALKIT_USE_MODELSCOPE="${VLMEVALKIT_USE_MODELSCOPE:-0}"',
        # Choices are then matched, which else a model of OpenAI's reads off.
        '[ -n "${OPENAI_API_KEY:-}" ] && judge=() || judge=(--judge exact_matching)',
        _RUNS,
    ]
    if asked.data is not None:
        lines.append(f"export LMUData={shlex.quote(str(asked.data.resolve()))}")
    end = '--work-dir "$results" ${judge[@]+"${judge[@]}"} "$@" || status=$?'
    pictures = [task for task in tasks if task not in videos]
    if pictures:
        server = ["--model", asked.model, "--base-url", base, "--max-tokens", str(_ANSWER_TOKENS)]
        server += ["--temperature", "0"]
        lines.append(f'python "${{run[@]}}" {shlex.join(["--data", *pictures, *server])} {end}')
    if not videos:
        return None, lines
    model: dict[str, Any] = {"class": "LMDeployAPI", "model": asked.model}
    model |= {"api_base": f"{base}/chat/completions", "temperature": 0, "max_tokens": _ANSWER_TOKENS}
    model |= {"retry": 6, "timeout": 1800}  # as the kit's own for pictures
    if asked.videos == "files":
        model |= {"video_llm": True, "local_media": True}
        model |= {"media_io_kwargs": {"video": {"max_frames": asked.max_frames}}}
    lines.append(f'python "${{run[@]}}" {shlex.join(["--config", str(place / "config.json")])} {end}')
    return {"model": {asked.model: model}, "data": videos}, lines
