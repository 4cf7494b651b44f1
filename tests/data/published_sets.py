"""Small data sets in the forms in which they are published: folders as Hugging Face's tools leave them.

Every picture is of one size and has its own colour, by its number.
"""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIZE = (56, 28)
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def picture(number: int) -> bytes:
    """A PNG of one colour."""
    stream = io.BytesIO()
    Image.new("RGB", SIZE, (number * 7 % 256, number * 31 % 256, number % 256)).save(stream, "PNG")
    return stream.getvalue()


def held(number: int, path: str | None = None) -> dict[str, Any]:
    """A picture as `datasets` stores it."""
    return {"bytes": picture(number), "path": path}


def write_parquet(path: Path, rows: list[dict[str, Any]], types: dict[str, Any], group: int = 4) -> Path:
    """Rows as a parquet file with row groups of some rows; what `types` does not name is told by the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        key: pa.array([row.get(key) for row in rows], types.get(key))
        for key in dict.fromkeys([*rows[0], *types])
    }
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def fine_vision(folder: Path, n: int = 10, files: int = 2) -> Path:
    """FineVision's form, one subset: `images`, `texts`, ratings; every fifth row is text alone."""
    turn = pa.struct({"user": pa.string(), "assistant": pa.string()})
    rows = [
        {
            "images": [held(k), held(k + 100)][: k % 5],
            "texts": [{"user": "What?", "assistant": f"Picture {k}."}] * (1 + k % 2),
            "source": "made",
            "relevance_ratings": [5],
            "relevance_min": 5,
            "formatting_ratings": None,
        }
        for k in range(n)
    ]
    per_file = -(-n // files)
    for i in range(files):
        name = f"train-{i:05d}-of-{files:05d}.parquet"
        part = rows[i * per_file : (i + 1) * per_file]
        write_parquet(folder / name, part, {"images": pa.list_(IMAGE), "texts": pa.list_(turn)})
    _downloaded(folder)
    return folder


def cauldron(folder: Path, n: int = 4) -> Path:
    """The Cauldron's form: a folder for each subset, turns with their source."""
    turn = pa.struct({key: pa.string() for key in ("user", "assistant", "source")})
    for subset in ("ai2d", "vqav2"):
        rows = [
            {
                "images": [held(k, f"{k}.png")],
                "texts": [
                    {"user": "Question?\nChoices", "assistant": f"Answer: {subset} {k}", "source": subset}
                ],
            }
            for k in range(n)
        ]
        name = f"{subset}/train-00000-of-00001-2ce340398c113b79.parquet"
        write_parquet(folder / name, rows, {"images": pa.list_(IMAGE), "texts": pa.list_(turn)})
    _downloaded(folder)
    return folder


def one_vision(folder: Path, n: int = 4) -> Path:
    """LLaVA-OneVision's form: one `image`, or null, and LLaVA's turns."""
    turn = pa.struct({"from": pa.string(), "value": pa.string()})
    rows = [
        {
            "id": f"{k:09d}",
            "image": None if k % 2 else held(k, f"{k}.png"),
            "conversations": [
                {"from": "human", "value": "Hello" if k % 2 else "<image>\nWhat?"},
                {"from": "gpt", "value": f"Answer {k}."},
            ],
            "data_source": "made",
        }
        for k in range(n)
    ]
    name = "CLEVR-Math(MathV360K)/train-00000-of-00001.parquet"
    write_parquet(folder / name, rows, {"image": IMAGE, "conversations": pa.list_(turn)})
    _downloaded(folder)
    return folder


def cambrian(folder: Path, n: int = 4) -> Path:
    """Cambrian's form as parquet: names of pictures that lie beside it as files."""
    turn = pa.struct({"from": pa.string(), "value": pa.string()})
    rows = []
    for k in range(n):
        place = folder / "coco" / f"{k}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(picture(k))
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"Answer {k}."}]
        rows.append({"image": f"coco/{k}.png", "conversations": turns, "source": "made.json"})
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", rows, {"conversations": pa.list_(turn)})
    return folder


def saved(folder: Path, n: int = 4, split: str = "train", first: int = 0) -> Path:
    """A data set of `messages` with pictures inside, as `datasets` saves it: Arrow streams of two batches."""
    part = pa.struct({"type": pa.string(), "text": pa.string(), "image": IMAGE})
    schema = pa.schema({"messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.list_(part)}))})
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
    for i, name in enumerate(names):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, schema) as out:
            for k in range(first + i * n // 2, first + (i + 1) * n // 2):
                asked = [{"type": "image", "image": held(k)}, {"type": "text", "text": "What?"}]
                answer = [{"type": "text", "text": f"Saved {k}."}]
                messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
                out.write_table(pa.Table.from_pylist([{"messages": messages}], schema))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "f", "_split": split}
    (folder / "state.json").write_text(json.dumps({**state, "_format_type": None}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}, "splits": None}))
    return folder


def saved_splits(folder: Path) -> Path:
    """A `DatasetDict`, saved likewise."""
    saved(folder / "train")
    saved(folder / "test", split="test", first=50)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    return folder


def _downloaded(folder: Path) -> None:
    """What `huggingface-cli download` leaves beside the files."""
    (folder / "README.md").write_text("---\nlicense: other\n---\n")
    (folder / ".gitattributes").write_text("*.parquet filter=lfs\n")
    left = folder / ".cache" / "huggingface" / "download"
    left.mkdir(parents=True)
    (left / "train-00000-of-00001.parquet").write_text("not one")
