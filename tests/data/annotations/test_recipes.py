"""Recipes: several files, globs and folders; those of EAGLE 2.5, InternVL, LLaVA and LLaMA-Factory."""

import json

import numpy as np
import pytest

from megatron_eagle.data.annotations.formats import read_sample
from megatron_eagle.data.annotations.mixture import Dataset, datasets_of, read_recipe
from megatron_eagle.data.annotations.records import numbered, open_records
from megatron_eagle.errors import UserError
from tests.data.helpers import conversation, write_jsonl


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("part/a.jsonl", "part/b.json", "other/c.jsonl"):
        path = tmp_path / "sub" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        records = [conversation("<image>q", name, image="x.png")]
        path.write_text(json.dumps(records) if name.endswith(".json") else json.dumps(records[0]) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(folder, content, name="r.json"):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return read_recipe(folder / name)


def names(datasets):
    return [dataset.annotation.name for dataset in datasets]


def samples(dataset):
    return [
        read_sample(
            raw,
            root=dataset.root,
            file="f",
            line=line,
            overrides=dataset.overrides,
            conventions=dataset.conventions,
        )
        for line, raw in numbered(open_records(dataset.annotation))
    ]


def test_an_entry_of_several_files(folder):
    part, other = str(folder / "sub/part"), str(folder / "sub/other")
    for annotation, root, found in (
        ("sub/part", None, ["a.jsonl", "b.json"]),
        ("sub/part/*.json*", None, ["a.jsonl", "b.json"]),
        (["sub/part/b.json", "sub/part/a.jsonl"], None, ["b.json", "a.jsonl"]),
        ("sub/**/*.jsonl", "sub/other", ["c.jsonl", "a.jsonl"]),
        (str(folder / "sub/part"), None, ["a.jsonl", "b.json"]),
    ):
        datasets = recipe(folder, {"mine": {"annotation": annotation, **({"root": root} if root else {})}})
        assert names(datasets) == found
        assert {d.root for d in datasets} == {other if root else part}
        assert {d.name for d in datasets} == {"mine"}


def test_files_in_several_folders_need_a_root(folder):
    with pytest.raises(UserError, match='entry "mine": files in several folders need a root'):
        recipe(folder, {"mine": {"annotation": "sub/*/*.jsonl"}})
    with pytest.raises(UserError, match="holds no .jsonl"):
        recipe(folder, {"mine": {"annotation": "sub"}})
    with pytest.raises(UserError, match="does not exist"):
        recipe(folder, {"mine": {"annotation": "sub/*.nope"}})


def test_the_recipe_that_eagle_documents(folder, capsys):
    """With weight, modality and descriptions; media are relative to what the annotation is relative to."""
    entry = {
        "root": "",
        "annotation": "sub/part/a.jsonl",
        "weight": 1,
        "weight_description": "Larger: later.",
        "repeat_time": 1,
        "repeat_time_description": "Times.",
        "length": 15500,
        "modality": ["image"],
        "length_description": "Reference only.",
    }
    (dataset,) = recipe(folder, {"LLaVAR": entry})
    assert (dataset.root, dataset.ignored) == (str(folder), ())
    assert samples(dataset)[0].images == (str(folder / "x.png"),)
    (folder / "deep").mkdir()
    (dataset,) = recipe(
        folder, {"LLaVAR": {**entry, "weight": 2}}, "deep/r.json"
    )  # found from here, as there
    assert (dataset.root, dataset.ignored) == (str(folder), ("weight",))


def test_the_meta_file_of_internvl(folder):
    entry = {"root": "sub/", "annotation": "sub/part/a.jsonl", "data_augment": False, "repeat_time": 0.5}
    (dataset,) = recipe(folder, {"x": {**entry, "max_dynamic_patch": 6, "length": 1}})
    assert dataset == Dataset("x", folder / "sub/part/a.jsonl", str(folder / "sub"), 0.5, {"max_tiles": 6})


def test_the_yaml_of_llava(folder):
    yaml = (
        "datasets:\n"
        "  - json_path: sub/part/b.json\n    sampling_strategy: first:50%\n"
        "  - json_path: sub/part/{a,b}.json\n    sampling_strategy: all\n"
        "  - {json_path: sub/part/b.json}\n"
    )
    (folder / "sub/part/a.json").write_text("[]")
    datasets = recipe(folder, yaml, "mid_stage.yaml")
    assert [(d.name, d.annotation.name, d.strategy) for d in datasets] == [
        ("b", "b.json", "first:50%"),
        *(("{a,b}", name, "all") for name in ("a.json", "b.json")),
        ("b-2", "b.json", "all"),
    ]
    inside = recipe(folder, {"ov": {"annotation": "mid_stage.yaml", "root": "sub/other", "repeat_time": 2}})
    assert [(d.name, d.root, d.repeat_time) for d in inside][::3] == [
        ("ov/b", str(folder / "sub/other"), 2),
        ("ov/b-2", str(folder / "sub/other"), 2),
    ]
    with pytest.raises(UserError, match="needs json_path"):
        recipe(folder, "datasets: [{path: a}]", "x.yaml")


def test_sampling_strategies():
    def taken(strategy, repeat_time=1.0, n=100):
        return Dataset("name", None, "", repeat_time, strategy=strategy).copies(n)

    assert np.flatnonzero(taken("first:7")).tolist() == list(range(7))
    assert np.flatnonzero(taken("end:10%")).tolist() == list(range(90, 100))
    assert np.flatnonzero(taken("first:0.5%".replace("0.5", "1"), n=30)).tolist() == [
        0
    ]  # rounded up, as there
    chosen = taken("random:25%")
    assert chosen.sum() == 25 and chosen[:25].sum() < 25
    np.testing.assert_array_equal(chosen, taken("random:25%"))
    assert taken("first:10", 2.5).tolist()[:10] != [2] * 10 and taken("first:10", 2.5).sum() == 25
    assert taken("end:1000").sum() == 100
    assert taken("all").sum() == 100


def test_the_dataset_info_of_llama_factory(folder):
    info = {
        "talk": {
            "file_name": "talk.json",
            "formatting": "sharegpt",
            "columns": {"messages": "chat", "images": "pictures"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "me", "assistant_tag": "it"},
        },
        "plain": {
            "file_name": "plain.jsonl",
            "columns": {"prompt": "ask", "response": "reply"},
            "num_samples": 1,
        },
        "far": {"hf_hub_url": "somebody/something"},
        "liked": {"file_name": "plain.jsonl", "ranking": True},
    }
    data = folder / "data"
    data.mkdir()
    turns = [{"role": "me", "content": "<image>q"}, {"role": "it", "content": "a"}]
    (data / "talk.json").write_text(json.dumps([{"chat": turns, "pictures": ["x.png"]}]))
    write_jsonl(data / "plain.jsonl", [{"ask": "q", "reply": "a"}])
    (data / "dataset_info.json").write_text(json.dumps(info))
    entry = {"annotation": "data/dataset_info.json", "datasets": ["talk", "plain"]}
    talk, plain = recipe(folder, {"lf": entry})
    assert [d.name for d in (talk, plain)] == ["lf/talk", "lf/plain"]
    (sample,) = samples(talk)
    assert sample.images == (str(data / "x.png"),) and sample.turns[1].parts == ("a",)
    assert [turn.parts for turn in samples(plain)[0].turns] == [("q",), ("a",)]
    del info["far"], info["liked"]
    (data / "dataset_info.json").write_text(json.dumps(info))
    assert [d.name for d in read_recipe(data / "dataset_info.json")] == ["talk", "plain"]
    for more, reason in (
        ({"far": {"hf_hub_url": "a/b"}}, '"far" lies elsewhere .hf_hub_url.'),
        ({"liked": {"file_name": "plain.jsonl", "ranking": True}}, '"liked" holds preferences'),
        ({"odd": {"file_name": "plain.jsonl", "formatting": "odd"}}, "neither alpaca nor sharegpt"),
        ({"odd": {"file_name": "plain.jsonl", "zzz": 1}}, 'unknown key "zzz"'),
    ):
        (data / "dataset_info.json").write_text(json.dumps({**info, **more}))
        with pytest.raises(UserError, match=reason):
            read_recipe(data / "dataset_info.json")
    with pytest.raises(UserError, match="has no data set none; it has talk"):
        recipe(folder, {"lf": {**entry, "datasets": ["none"]}})


def test_one_annotation_file_is_a_data_set(folder):
    for name in ("part/a.jsonl", "part/b.json"):
        (dataset,) = datasets_of(folder / "sub" / name)
        assert (dataset.name, dataset.root) == (name.split("/")[1], str(folder / "sub/part"))
    assert len(datasets_of_recipe := recipe(folder, {"x": {"annotation": "sub/part"}})) == 2
    assert datasets_of(folder / "r.json") == datasets_of_recipe


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"annotation": 3}, "needs annotation"),
        ({"annotation": ["a", 3]}, "needs annotation"),
        ({"annotation": "a", "sampling_strategy": "last:3"}, "sampling_strategy must be all"),
        ({"annotation": "a", "sampling_strategy": 3}, "sampling_strategy must be all"),
        ({"annotation": "a", "ignore": {"a": 1}}, "ignore must be a list of keys"),
        ({"annotation": "a", "columns": ["a"]}, "columns must map names to names"),
        ({"annotation": "a", "frames_fps": 0}, "frames_fps must be a positive number"),
        ({"annotation": "a", "data_augment": True}, "data_augment is not supported"),
        ({"annotation": "none.yaml"}, "cannot read the recipe"),
        ({"annotation": "r.yaml", "datasets": "a"}, "datasets must be a list of names"),
    ],
)
def test_mistakes_are_one_line(folder, entry, reason):
    if entry.get("annotation") == "a":
        entry = {**entry, "annotation": "sub/part/a.jsonl"}
    with pytest.raises(UserError, match=reason) as caught:
        recipe(folder, {"x": entry})
    assert "\n" not in str(caught.value)
