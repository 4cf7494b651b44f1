"""Training runs on a real token store with several data sets: what no made-up pack can show."""

import json
import os
from pathlib import Path
from unittest.mock import patch

import yaml

from megatron_eagle.config import to_dict
from megatron_eagle.data.packing.index import write_packs
from megatron_eagle.training.resilience import faults
from megatron_eagle.training.run_config import load_run_config
from megatron_eagle.training.train import train
from tests.data.helpers import conversation, make_image, make_store, make_tokenizer, make_video
from tests.parallel.store_cells import model_for

LENGTH, PACKS = 160, 4


def write_mixture(
    folder: Path, names: tuple[str, str, str, str] = ("chat", "pictures", "clips", "rare")
) -> Path:
    """A store of text, pictures of several tiles, clips, and one sample of a fourth data set, in packs that
    mix them and end with padding."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in (("a.png", (112, 56)), ("b.png", (20, 20)), ("c.png", (84, 84))):
        make_image(folder / name, size, seed=len(name))
    make_video(folder / "v.mp4", 40)
    text = ["Yes.", "Yes, and no.", "No " * 5, "A " * 9]
    records = (
        [conversation(f"Hi {k}", text[k % 4]) for k in range(18)],
        [
            conversation("<image-2> or <image-1>?", "Both of them.", image=["a.png", "b.png"]),
            conversation("<image>", "Red.", image="c.png"),
            conversation("<image>What?", "A cat and a cup.", image="b.png"),
        ]
        * 4,
        [
            conversation("<video>", "A clip.", video="v.mp4"),
            conversation("<video>?", "Bars " * 3, video="v.mp4"),
        ]
        * 2,
        [conversation("Once?", "Never again.")],
    )
    store = make_store(
        folder,
        make_tokenizer(folder / "tokenizer"),
        dict(zip(names, records, strict=True)),
        (LENGTH,),
        sampling={"min_frames": 3, "fps": 1},
    )
    write_packs(store, LENGTH, seed=0)
    return store


def write_run(file: Path, store: Path, **sections: dict) -> None:
    """A run's file: fp32, batches of `PACKS` packs, saved in `run` beside it."""
    values = {
        "model": to_dict(model_for(str(store))),
        "data": {"path": str(store), "length": LENGTH, "prefetch": False, "on_media_error": "skip"},
        "training": {"train_iterations": 6, "global_batch_size": PACKS, "precision": "fp32"},
        "optimizer": {"lr": 5e-3, "lr_warmup_fraction": 0.2},
        "checkpoint": {"path": str(file.parent / "run")},
        "logging": {"progress": False, "tensorboard": False},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    file.write_text(yaml.safe_dump(values))


def train_cells(file: str, world_size: int, cells: list[tuple[list[str], list[dict]]]) -> None:
    """On each rank: `train` for one cell's overrides and faults after the other's."""
    for overrides, suffered in cells:
        with patch.dict(os.environ, {faults.VARIABLE: json.dumps(suffered)}):
            train(load_run_config(file, overrides, world_size=world_size))
