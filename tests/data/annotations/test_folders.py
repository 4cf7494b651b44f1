"""The files of a folder that Hugging Face's tools have left: of one split, in order, or why there is none."""

import json
import os
import shutil

import pytest

from megatron_eagle.data.annotations.folders import annotation_files
from megatron_eagle.data.annotations.mixture import datasets_of, read_recipe
from megatron_eagle.errors import UserError
from tests.data.published_sets import cauldron, fine_vision, saved, saved_splits


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"PAR1")
    return folder


def names(files, folder):
    return [str(file.relative_to(folder)) for file in files]


def test_download(tmp_path):
    """What lies aside (.cache, README) is none of it; subsets of one split are one data set."""
    fine_vision(tmp_path / "a", files=3)
    found = names(annotation_files(tmp_path / "a"), tmp_path / "a")
    assert found == [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    cauldron(tmp_path / "b")
    assert [file.parent.name for file in annotation_files(tmp_path / "b", "train")] == ["ai2d", "vqav2"]


def test_not_all_of_it(tmp_path):
    """A download that was broken off is no smaller data set, unless it is asked for."""
    fine_vision(tmp_path / "a", files=3)
    (tmp_path / "a" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(UserError, match="a has 2 of 3 files of train, number 00001 is missing; fetch it, or"):
        annotation_files(tmp_path / "a")
    (tmp_path / "recipe.yaml").write_text("a: {annotation: a/*.parquet}\n")
    assert len(read_recipe(tmp_path / "recipe.yaml")) == 2


def test_img2dataset(tmp_path):
    """Beside each archive lie its counts and its texts as a table, which are no annotations of their own."""
    shards = ["00000.tar", "00001.tar"]
    folder = make(tmp_path / "a", *shards, "00000_stats.json", "00000.parquet", "00001_stats.json")
    assert names(annotation_files(folder), folder) == shards
    nested = make(tmp_path / "b", *(f"part/{name}" for name in (*shards, "00000.parquet", "00001.parquet")))
    assert names(annotation_files(nested), nested) == [f"part/{name}" for name in shards]
    make(folder, "00002.parquet")  # of no archive
    with pytest.raises(
        UserError,
        match=r"tables \(00002.parquet\) and tar archives \(00000.tar\), .*: a/\*.parquet or a/\*.tar",
    ):
        annotation_files(folder)
    make(nested, "more/x.parquet")
    with pytest.raises(UserError, match=r"name those that are: b/more/\*.parquet or b/part/\*.tar"):
        annotation_files(nested)
    make(tmp_path / "c", "images.tar", "images.json")  # media and what is said about them
    assert names(annotation_files(tmp_path / "c"), tmp_path / "c") == ["images.json"]


def test_links_of_the_hubs_cache(tmp_path):
    """A snapshot is a folder of links; each file has its name, not that of what it points to."""
    fine_vision(tmp_path / "blobs", files=1)
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    os.symlink("../../blobs/train-00000-of-00001.parquet", snapshot / "train-00000-of-00001.parquet")
    assert annotation_files(snapshot) == [snapshot / "train-00000-of-00001.parquet"]


def test_links_in_a_circle(tmp_path):
    make(tmp_path, "a/b/train.parquet")
    os.symlink("..", tmp_path / "a" / "up")
    os.symlink("a", tmp_path / "other")
    assert len(annotation_files(tmp_path)) == 1


FORMS = {
    "data/train-00000-of-00002.parquet": "train",
    "data/train-00001-of-00002.parquet": "train",
    "data/validation-00000-of-00001-0123456789abcdef.parquet": "validation",
    "default/test/0000.parquet": "test",
    "sub/test_mini.en-00000-of-00001.parquet": "test_mini.en",
}


def test_splits(tmp_path):
    folder = make(tmp_path, *FORMS)
    for split in FORMS.values():
        assert names(annotation_files(folder, split), folder) == [n for n in FORMS if FORMS[n] == split]
    with pytest.raises(UserError, match="holds the splits test, test_mini.en, train, validation; say which"):
        annotation_files(folder)
    with pytest.raises(UserError, match="has no split other; it has test, test_mini.en, train, validation"):
        annotation_files(folder, "other")
    make(folder, "dev.parquet")  # a file in the folder itself counts before what lies below it
    assert names(annotation_files(folder), folder) == ["dev.parquet"]
    (folder / "a.json").touch()
    with pytest.raises(UserError, match="holds JSON files and tables; say which are meant"):
        annotation_files(folder)


def test_saved_data_sets(tmp_path):
    """Files in the order of state.json; what `datasets` computed besides is none of them."""
    folder = saved(tmp_path / "a")
    (folder / "cache-0123.arrow").write_bytes(b"none")
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].reverse()
    (folder / "state.json").write_text(json.dumps(state))
    assert names(annotation_files(folder), folder) == [
        "data-00001-of-00002.arrow",
        "data-00000-of-00002.arrow",
    ]
    splits = saved_splits(tmp_path / "b")
    assert [file.parent.name for file in annotation_files(splits, "test")] == ["test", "test"]
    with pytest.raises(UserError, match="holds the splits train, test; say which is meant, .*split: train"):
        annotation_files(splits)
    with pytest.raises(UserError, match="has no split dev; it has train, test"):
        annotation_files(splits, "dev")
    shutil.rmtree(splits / "test")
    (splits / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert [file.parent.name for file in annotation_files(splits)] == ["train", "train"]


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("{", "state.json is no JSON object"),
        ('{"_data_files": []}', "names no data files"),
        ('{"_data_files": [{"filename": "../a.arrow"}]}', "names no data files"),
        ('{"_data_files": [{"filename": "b.arrow"}]}', "b.arrow is missing"),
        ('{"_data_files": [{"filename": "a.arrow"}], "_indices_data_files": [{}]}', "call flatten_indices"),
    ],
)
def test_broken_saved_data_sets(tmp_path, state, said):
    folder = saved(tmp_path / "a")
    (folder / "state.json").write_text(state)
    with pytest.raises(UserError, match=said):
        annotation_files(folder)


def test_in_a_recipe(tmp_path):
    saved_splits(tmp_path / "b")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("a: {annotation: b, split: test}\n")
    found = read_recipe(recipe)
    assert [dataset.annotation.name for dataset in found] == [
        f"data-0000{i}-of-00002.arrow" for i in range(2)
    ]
    assert {dataset.root for dataset in found} == {str(tmp_path / "b")}
    assert datasets_of(tmp_path / "b" / "test")[0].name == "test"
    for entry, said in (
        ("{annotation: b}", 'entry "a": .*holds the splits'),
        ("{annotation: b, split: [test]}", "split must be a name"),
        ("{annotation: b/test/data-00000-of-00002.arrow, split: test}", "split chooses files of a folder"),
        ("{annotation: empty}", "holds no .jsonl.*parquet"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        recipe.write_text(f"a: {entry}\n")
        with pytest.raises(UserError, match=said):
            read_recipe(recipe)
