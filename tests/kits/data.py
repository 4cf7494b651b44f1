"""Small data sets in the kits' own forms, and a kit run on an endpoint."""

import base64
import csv
import json
import os
import subprocess
from pathlib import Path
from typing import Literal

from megatron_eagle.evaluation.bridge import Bridge, write_bridge
from tests.convert.media import write_picture, write_video
from tests.paths import REPO

ENVIRONMENT = REPO / ".venv-kits-0.7.3"
FRAMES = 24  # of each video

TASK = """\
dataset_path: {form}
dataset_kwargs: {{data_files: {{test: {table}}}}}
task: {name}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 16}}
process_results: !function utils.score
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
"""
UTILS = """\
from PIL import Image


def visual(doc):
    return [Image.open(doc["picture"]).convert("RGB")] if doc["picture"] else [doc["video"]]


def score(doc, results):
    return {"right": float(results[0].strip() == doc["answer"])}
"""


def lmms_eval_tasks(folder: Path) -> Path:
    """Tasks `tiny_pictures` (json) and `tiny_videos` (parquet): two questions each, answers "A" and "B"."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    write_picture(folder / "p.png", 64, 48)
    write_video(folder / "v.mp4", frames=FRAMES)
    (folder / "utils.py").write_text(UTILS)
    for kind, form in (("picture", "json"), ("video", "parquet")):
        place = str(folder / {"picture": "p.png", "video": "v.mp4"}[kind])
        rows = [{"picture": None, "video": None, "question": f"{kind} {a}?", "answer": a} for a in "AB"]
        rows = [{**row, kind: place} for row in rows]
        table = folder / f"{kind}.{form}"
        if form == "json":
            table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
        name = f"tiny_{kind}s"
        (folder / f"{name}.yaml").write_text(TASK.format(form=form, table=table, name=name))
    return folder


def vlmevalkit_data(folder: Path) -> Path:
    """LMUData with a table of pictures, `tiny_pictures` (right: A, then B), and ERQA's."""
    folder.mkdir()
    write_picture(folder / "p.png", 64, 48)
    picture = base64.b64encode((folder / "p.png").read_bytes()).decode()
    tables = {
        "tiny_pictures": (["question", "A", "B", "answer"], [["Which?", "red", "blue", a] for a in "AB"]),
        "ERQA": (
            ["category", "question", "answer"],
            [["a", "<image> Which? A. red B. blue", a] for a in "AB"],
        ),
    }
    for name, (columns, rows) in tables.items():
        with (folder / f"{name}.tsv").open("w", newline="") as file:
            table = csv.writer(file, delimiter="\t")
            table.writerow(["index", *columns, "image"])
            table.writerows([[number, *row, picture] for number, row in enumerate(rows)])
    return folder


def hub_with_videos(folder: Path) -> Path:
    """A hub's cache with the one set of videos whose table VLMEvalKit does not hold against a checksum."""
    repository = folder / "hub" / "datasets--lmms-lab--VideoMMMU"
    snapshot = repository / "snapshots" / "0"
    (snapshot / "videos").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    write_video(snapshot / "videos" / "v.mp4", frames=FRAMES)
    row = {
        "index": 0,
        "id": "v",
        "category": "Perception",
        "question": "Which?",
        "options": '["red", "blue"]',
    }
    row |= {"answer": "A", "question_type": "multiple-choice", "video": "videos/v.mp4"}
    with (snapshot / "VideoMMMU.tsv").open("w", newline="") as file:
        table = csv.DictWriter(file, row, delimiter="\t")
        table.writeheader()
        table.writerow(row)
    return folder


def run_bridge(
    kit: str,
    folder: Path,
    url: str,
    tasks: list[str],
    data: Path,
    *options: str,
    max_frames: int = 8,
    videos: Literal["frames", "files"] = "frames",
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """`evaluate bridge`, and its script with the kits' Python and `options`, as a user would run it there."""
    write_bridge(kit, Bridge(url, "eagle2.5", tasks, max_frames, videos, data), folder)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OPENAI"))}
    own |= {"PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}", **environment}
    words = ["bash", str(folder / "evaluate.sh"), *options]
    return subprocess.run(words, env=own, cwd="/", capture_output=True, text=True, check=False)
