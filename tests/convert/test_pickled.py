"""Weights as `pytorch_model*.bin`: read where allowed, by a reader that runs nothing."""

import json
import os

import pytest
import torch

from megatron_eagle.convert.from_hf import import_hf
from megatron_eagle.convert.pickled import PickledWeights, open_weights
from megatron_eagle.convert.shards import HF_INDEX, SINGLE, HfWeights
from megatron_eagle.convert.to_hf import export_hf
from megatron_eagle.errors import UserError
from tests.convert.hf_folder import read_weights

FIRST, SECOND = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"


@pytest.fixture
def pickled(broken):
    """The source, its weights as two pickles."""
    tensors = read_weights(broken)
    (broken / SINGLE).unlink()
    names = sorted(tensors)
    weight_map = {name: FIRST if i < len(names) // 2 else SECOND for i, name in enumerate(names)}
    for file in (FIRST, SECOND):
        torch.save({n: t for n, t in tensors.items() if weight_map[n] == file}, broken / file)
    (broken / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return broken


def test_import_and_export(source, pickled, tmp_path):
    """The export holds the same weights, as safetensors in shards of the same names."""
    import_hf(pickled, tmp_path / "checkpoint", allow_pickle=True)
    export_hf(tmp_path / "checkpoint", tmp_path / "out")
    before, after = read_weights(source), read_weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before[n].dtype == after[n].dtype and torch.equal(before[n], after[n]) for n in before)
    files = set(json.loads((tmp_path / "out" / HF_INDEX).read_text())["weight_map"].values())
    assert files == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


def test_only_where_it_is_allowed(source, pickled, tmp_path):
    with pytest.raises(UserError, match="--allow-pickle"):
        import_hf(pickled, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
    assert isinstance(open_weights(source, allow_pickle=True), HfWeights)  # safetensors come first


class _Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_code_in_a_pickle_does_not_run(pickled, tmp_path):
    torch.save({"a": _Runs(tmp_path / "made")}, pickled / SECOND)
    with pytest.raises(UserError, match="00002.*more than tensors, which is not read"):
        PickledWeights(pickled)
    assert not (tmp_path / "made").exists()


def _add(folder):
    tensors = torch.load(folder / FIRST, weights_only=True)
    torch.save({**tensors, "extra": torch.zeros(1)}, folder / FIRST)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / FIRST).unlink(), "00001-of-00002.bin: this file of weights is missing"),
        (lambda f: (f / FIRST).write_bytes((f / FIRST).read_bytes()[:-900]), "00001.*: damaged"),
        (lambda f: (f / FIRST).write_bytes(b""), "00001.*: damaged"),
        (lambda f: torch.save({"a": 1}, f / FIRST), "00001.*holds more than tensors"),
        (lambda f: torch.save({"a": torch.ones(1).long()}, f / FIRST), "of the types F32, F16, BF16"),
        (_add, "not those that the index names, as extra"),
        (
            lambda f: (f / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../b.bin"}}'),
            "is not a file name",
        ),
    ],
)
def test_damage_is_named(pickled, damage, message):
    damage(pickled)
    with pytest.raises(UserError, match=message) as error:
        open_weights(pickled, allow_pickle=True)
    assert "\n" not in str(error.value)
