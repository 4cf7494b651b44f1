"""The run of a tiny model on real packs that all have a picture: one step takes a sixth of a second."""

from pathlib import Path

import yaml

from megatron_eagle.data.packing.index import write_packs
from tests.data.helpers import conversation, make_image, make_store, make_tokenizer

LENGTH, PACKS, TOKENS, LR = 64, 4, 371, 1e-3


def write_picture_run(folder: Path) -> Path:
    """The run's file in `folder`, beside the store that it reads; it saves in `folder/run`."""
    records = []
    for k in range(PACKS):
        make_image(folder / f"{k}.png", (40, 30), k)
        records.append(conversation("<image>\nWhat is shown?", "A cat. " * (k + 1), image=f"{k}.png"))
    store = make_store(folder, make_tokenizer(folder / "tokenizer"), records, (LENGTH,))
    write_packs(store, LENGTH, seed=0)
    sections = {
        "model": {
            "preset": "tiny",
            "vision": {"image_size": 28, "patch_size": 14},
            "text": {"num_hidden_layers": 2},
        },
        "data": {"path": str(store), "length": LENGTH},
        "training": {"train_iterations": 2, "stop_at_iteration": 1, "precision": "fp32"},
        "optimizer": {"lr": LR, "lr_warmup_fraction": 0, "weight_decay": 0},
        "checkpoint": {"path": str(folder / "run")},
        "logging": {"progress": False, "tensorboard": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(sections))
    return folder / "run.yaml"
