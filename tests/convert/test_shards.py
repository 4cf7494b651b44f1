"""Reading and writing sharded folders; every damage is one line that names the file."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_eagle.convert.shards import HF_INDEX, SINGLE, HfWeights, plan_shards, write_shards
from megatron_eagle.errors import UserError
from tests.convert.hf_folder import kinds_of


@pytest.fixture
def folder(tmp_path):
    tensors = {name: torch.full((4,), float(i)) for i, name in enumerate("abc")}
    weight_map = plan_shards(dict.fromkeys(tensors, 16), limit=32)
    write_shards(tmp_path, reversed(tensors.items()), weight_map, kinds_of(tensors))
    return tmp_path


def test_shards_read_as_written(folder):
    weights = HfWeights(folder)
    assert weights.weight_map == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00001-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }
    assert weights.read("b").tolist() == [1.0] * 4
    assert weights.dtypes == dict.fromkeys("abc", "F32")
    assert json.loads((folder / HF_INDEX).read_text())["metadata"] == {"total_size": 48}


def test_files_are_those_of_the_library(tmp_path):
    """Mixed types, shapes and names out of order: the same bytes."""
    generator = torch.Generator().manual_seed(0)
    kinds = (torch.bfloat16, torch.float32, torch.float16)
    tensors = {
        f"{'zyx'[i % 3]}.{i}": torch.randn([[], [3], [2, 5]][i % 3], generator=generator).to(kinds[i // 3])
        for i in range(9)
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    write_shards(tmp_path, tensors.items(), dict.fromkeys(tensors, SINGLE), kinds_of(tensors))
    assert (tmp_path / SINGLE).read_bytes() == (tmp_path / "theirs").read_bytes()
    weights = HfWeights(tmp_path)
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in tensors.items())


def test_what_does_not_fit_its_place_is_a_fault(tmp_path):
    kinds = {"a": ("F32", (1,))}
    with pytest.raises(ValueError, match="a is torch.float32"):
        write_shards(tmp_path, [("a", torch.zeros(2))], {"a": SINGLE}, kinds)
    with pytest.raises(ValueError, match="no tensors for .'a'."):
        write_shards(tmp_path, [], {"a": SINGLE}, kinds)


def test_one_shard_needs_no_index(tmp_path):
    write_shards(tmp_path, [("a", torch.zeros(1))], plan_shards({"a": 4}), {"a": ("F32", (1,))})
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    assert HfWeights(tmp_path).shapes == {"a": (1,)}


def _truncate(folder):
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def _rename(folder):
    index = json.loads((folder / HF_INDEX).read_text())
    index["weight_map"]["d"] = index["weight_map"].pop("c")
    (folder / HF_INDEX).write_text(json.dumps(index))


def _escape(folder):
    index = json.loads((folder / HF_INDEX).read_text())
    index["weight_map"]["c"] = "../model-00002-of-00002.safetensors"
    (folder / HF_INDEX).write_text(json.dumps(index))


def _only_pickle(folder):
    for path in folder.iterdir():
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "00002-of-00002.* it is missing"),
        (_truncate, "00002-of-00002.safetensors: truncated"),
        (
            lambda f: (f / "model-00001-of-00002.safetensors").write_text("text"),
            "00001-of.*: truncated or not",
        ),
        (_rename, "not those that the index names, as c, d"),
        (_escape, "is not a file name"),
        (lambda f: (f / HF_INDEX).write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / HF_INDEX).write_text("{}"), "no weight_map"),
        (_only_pickle, "no weights here.*pytorch_model.bin is a pickle"),
    ],
)
def test_damage_is_named(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        HfWeights(folder)
    assert "\n" not in str(error.value)


def test_other_types_are_refused(tmp_path):
    save_file({"a": torch.zeros(1, dtype=torch.int64)}, tmp_path / SINGLE)
    with pytest.raises(UserError, match="a is I64; supported: F32, F16, BF16"):
        HfWeights(tmp_path)
