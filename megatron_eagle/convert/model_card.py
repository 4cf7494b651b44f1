"""The README.md of an export: what the model is, what it was trained on, how it is asked, its licences.

What is written is what the checkpoint, the checkpoints before it and the data's stores say where they still
lie; what is not known is said to be unknown.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_eagle.checkpoint import checkpoint_folder, has_checkpoint, read_train_state
from megatron_eagle.config import load_yaml
from megatron_eagle.data.store.manifest import read_manifest
from megatron_eagle.errors import UserError
from megatron_eagle.files import write_whole
from megatron_eagle.hf_model.vllm_plugin.certificate import certificate_line
from megatron_eagle.model.presets import EagleConfig

FILE = "README.md"
_CERTIFICATE = "## Is it served as it was trained?\n\n"
_UNCERTIFIED = "Not certified yet (`megatron-eagle convert certify`)."
_MOST_STAGES = 20  # a circle of checkpoints ends


@dataclass(frozen=True)
class Score:
    """What an evaluation of a published benchmark found, on how many of its questions; `frames` is the most
    that a video could have."""

    benchmark: str
    score: float | None
    asked: int
    expected: int
    frames: int | None


@dataclass(frozen=True)
class CardFacts:
    """What an export is told beside its checkpoint; `license` is the Hub's identifier, None: `other`."""

    license: str | None = None
    scores: Sequence[Score] = ()


def write_model_card(
    folder: Path,
    name: str,
    checkpoint: Path,
    config: EagleConfig,
    shapes: Iterable[tuple[int, ...]],
    facts: CardFacts,
) -> None:
    """Write `folder`/README.md.

    Args:
        name: of the model.
        shapes: of all tensors of the export.
    """
    head = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": facts.license or "other",
        "tags": ["eagle_2_5_vl", "video-text-to-text", "custom_code"],
    }
    stages = list(_stages(checkpoint))
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        _model(config, sum(map(math.prod, shapes))),
        _USE,
        "## Training\n\n" + _training(stages),
        "## Data\n\n" + _data(stages),
        "## Evaluation\n\n" + _evaluation(facts.scores),
        _CERTIFICATE.strip() + "\n\n" + _UNCERTIFIED,
        "## Licence\n\n" + _licence(facts),
    ]
    (folder / FILE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def rewrite_certificate(folder: Path) -> None:
    """Say in the card of an export what its certificate says, in place of what it said before.

    A folder without a card, or with one that has no such section, stays as it is.
    """
    path = folder / FILE
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    start = text.find(_CERTIFICATE)
    if start < 0:
        return
    end = text.find("\n## ", start + 1)
    note = certificate_line(folder) or _UNCERTIFIED
    text = f"{text[:start]}{_CERTIFICATE}{note}\n{'' if end < 0 else text[end:]}"
    write_whole(path, text)


def _model(config: EagleConfig, parameters: int) -> str:
    vision, text = config.vision, config.text
    return (
        f"An Eagle 2.5 of {parameters:,} parameters: a SigLIP encoder ({vision.num_hidden_layers} layers of "
        f"{vision.hidden_size}), pixel shuffle and a two-layer connector, and a {text.family.name} language "
        f"model ({text.num_hidden_layers} layers of {text.hidden_size}). A picture is cut into tiles of "
        f"{vision.image_size} pixels, a frame of a video is one tile, a tile costs {config.tokens_per_tile} "
        f"tokens. It is made for prompts of up to **{text.max_position_embeddings:,} tokens**."
    )


_USE = """\
## How to run it

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # of this file
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
content = [{"type": "image", "path": "photo.jpg"}, {"type": "text", "text": "What is shown in this picture?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
)
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=256), skip_special_tokens=True)[0])
```

A video is `{"type": "video", "path": "clip.mp4"}`, with `fps`, `max_frames`, `video_start` and `video_end`
where they are wanted, and `subtitles`, `[[start, end, text], ...]` in seconds, which then stand between the
frames. transformers 4.51 or newer; videos need `av`."""


def _stages(checkpoint: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and run files of the runs that led to a checkpoint, the last first, as far as they are there."""
    for _ in range(_MOST_STAGES):
        if not has_checkpoint(checkpoint):
            return
        try:
            run = load_yaml(checkpoint_folder(checkpoint) / "run.yaml")
            run["steps"] = read_train_state(checkpoint).iteration
        except UserError:
            return
        yield checkpoint.name, run
        before = (run.get("checkpoint") or {}).get("load")
        if not before:
            return
        checkpoint = Path(before)


def _training(stages: list[tuple[str, dict[str, Any]]]) -> str:
    rows = []
    for name, run in reversed(stages):
        if not {"data", "optimizer"} <= run.keys():  # weights as they were imported or made
            rows.append([name, "weights to begin with", "", "", "", ""])
            continue
        training, optimizer = run["training"], run["optimizer"]
        trained = optimizer.get("trainable") or ["all"]
        if run.get("lora"):
            trained = ["LoRA adapters"]
        length, batch = run["data"]["length"], training["global_batch_size"]
        rows.append(
            [name, f"{run['steps']:,}", f"{batch:,} packs of {length:,} tokens", _words(trained)]
            + [f"{optimizer['lr']:g}", training["precision"]]
        )
    lengths = [run["data"]["length"] for _, run in stages if "data" in run]
    longest = f"\n\nThe longest packs had {max(lengths):,} tokens." if lengths else ""
    head = ["run", "steps", "global batch", "trained", "learning rate", "precision"]
    return _table(head, rows) + longest


def _words(values: Any) -> str:
    return ", ".join(map(str, values)) if isinstance(values, list | tuple) else str(values)


def _data(stages: list[tuple[str, dict[str, Any]]]) -> str:
    rows = []
    for name, run in reversed(stages):
        data = run.get("data")
        if data is None:
            continue
        try:
            manifest = read_manifest(data["path"])
            counts: Mapping[str, Any] = manifest.counts[str(data["length"])]
        except (UserError, KeyError):
            rows.append([name, f"`{Path(data['path']).name}`: not at hand at the export", "", "", ""])
            continue
        tokens = [f"{counts[f'{kind}_tokens']:,}" for kind in ("text", "visual", "supervised")]
        rows.append(
            [name, ", ".join(dict.fromkeys(manifest.names)), f"{counts['rows']:,}", *tokens[:2], tokens[2]]
        )
    return _table(["run", "data sets", "samples", "text tokens", "visual tokens", "learned tokens"], rows)


def _evaluation(scores: Sequence[Score]) -> str:
    if not scores:
        return "Not given at the export (`--scores` of `megatron-eagle convert export`)."
    rows = [
        [
            score.benchmark,
            "" if score.score is None else f"{score.score:.2f}",
            f"{score.asked:,} of {score.expected:,}",
            "" if score.frames is None else str(score.frames),
        ]
        for score in scores
    ]
    return _table(["benchmark", "score", "questions", "frames at most"], rows)


def _licence(facts: CardFacts) -> str:
    stated = f"Given by who made the export: `{facts.license}`. " if facts.license else "Not stated. "
    return (
        f"{stated}The weights are bound by the licences of what they were made from: the language model, the "
        "vision encoder, and the data named above. Look them up before you publish this folder."
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return "Not known: no run file lies beside the weights."
    lines = [head, ["---"] * len(head), *(row + [""] * (len(head) - len(row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
