"""No key passes unseen: it is used, or refused by its name, or known to change nothing, or unknown."""

import json

import pytest

from megatron_eagle.data.annotations.formats import read_sample
from megatron_eagle.data.annotations.keys import METADATA, REFUSED, SWITCHES, USED
from megatron_eagle.data.annotations.parsing import Conventions
from megatron_eagle.data.preparation.preprocess import preprocess
from megatron_eagle.data.preparation.processor import PreprocessSettings
from megatron_eagle.data.sampling.ads import SamplingSettings
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.errors import UserError
from megatron_eagle.problems import Problem
from tests.data.helpers import call_tool, conversation, make_store, write_jsonl

PLACES = ("record", "turn", "part", "medium")
# Values that say something, for keys that take no "x".
VALUES = {
    **dict.fromkeys(SWITCHES, 0),
    **dict.fromkeys(("start", "start_time", "video_start"), 1),
    **dict.fromkeys(("end", "end_time", "video_end"), 2),
    **dict.fromkeys(("fps", "sample_fps", "min_frames", "max_frames", "nframes"), 3),
    **dict.fromkeys(("max_tiles", "max_dynamic_tiles", "max_dynamic_patch"), 3),
    **dict.fromkeys(("times", "timestamps", "frame_times", "frame_timestamps"), [0, 7]),
    "clip": [1, 2],
    "data": [{"type": "image", "image_list": ["x.png"]}],
    "documents": ["x.pdf"],
    "document": "x.pdf",
    "type": "image",
}


def read(record, **conventions):
    raw = json.dumps(record).encode()
    return read_sample(raw, root="/m", file="f", line=1, conventions=Conventions(**conventions))


def with_key(place, key, value, **more):
    """A conversation about a video, with a key more at one place."""
    record = {
        "videos": [{"path": "v.mp4"}],
        "messages": [
            {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "q"}]},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "q2"},
            {"role": "assistant", "content": "b"},
        ],
    }
    places = (record, record["messages"][1], record["messages"][0]["content"][0], record["videos"][0])
    places[PLACES.index(place)].update({key: value, **more})
    return record


@pytest.mark.parametrize("place", PLACES)
def test_a_key_that_changes_the_meaning_is_refused_by_its_name(place):
    plain = json.dumps(with_key(place, "id", 1))
    for key in REFUSED - USED[place] - METADATA[place]:
        with pytest.raises(Problem) as caught:
            read(with_key(place, key, VALUES.get(key, "x")))
        assert str(caught.value) == f'unsupported key: "{key}" of a {place}'
        assert read(with_key(place, key, None)) == read(with_key(place, "id", 1))
        if f'"{key}"' not in plain:
            assert read(with_key(place, key, "x"), ignore=(key,)) == read(with_key(place, "id", 1))


@pytest.mark.parametrize("place", PLACES)
def test_metadata_change_nothing(place):
    plain = read(with_key(place, "id", 1))
    for key in METADATA[place] - {"detail"}:
        assert read(with_key(place, key, "x")) == plain, key


@pytest.mark.parametrize("place", PLACES)
def test_an_unknown_key_is_named(place):
    with pytest.raises(Problem) as caught:
        read(with_key(place, "zzz", 0))
    assert str(caught.value) == f'unknown key: "zzz" of a {place}'
    read(with_key(place, "zzz", 0), ignore=("zzz",))


@pytest.mark.parametrize("place", PLACES)
def test_a_used_key_has_an_effect(place):
    """The siblings of the keys that were once passed over: whatever is called used does something."""
    plain = read(with_key(place, "id", 1))
    # In a list of media they are keys of pictures, of Eagle's `data`, or where it is from.
    elsewhere = {"url", "image", "type", "image_list", "video_list", "text"} if place == "medium" else set()
    for key in USED[place] - elsewhere:
        try:
            assert read(with_key(place, key, VALUES.get(key, "x"))) != plain, (place, key)
        except Problem as problem:
            assert problem.kind not in ("unknown key", "unexpected error")


def test_detail_is_watched():
    part = {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}
    record = {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a"}]}
    with pytest.raises(Problem, match='unsupported key: "detail" of a medium'):
        read(record)
    part["image_url"]["detail"] = "high"
    read(record)


def test_an_id_may_stand_for_a_medium_that_is_not_named():
    with pytest.raises(Problem, match='unknown key: "video_id" of a record'):
        read(conversation("q", "a", video_id="v1"))
    read(conversation("<video>q", "a", video_id="v1", video="v1.mp4"))


@pytest.mark.parametrize("key", SWITCHES)
def test_answers_whose_loss_is_off_are_not_learned(key):
    """In every dialect that has several answers, and of a whole record."""
    texts = [{"user": "q", "assistant": "a", key: 0}, {"user": "q2", "assistant": "b", key: 1}]
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", key: False},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "b", key: True},
    ]
    pairs = [{"human": "q", "assistant": "a", key: 0}, {"human": "q2", "assistant": "b"}]
    questions = [{"q": "q", "a": "a", key: 0}, {"q": "q2", "a": "b"}]
    old = [
        {"from": "human", "value": "q", key: 0},
        {"from": "gpt", "value": "a", key: 0},
        {"from": "human", "value": "q2"},
        {"from": "gpt", "value": "b"},
    ]
    for record in (
        {"texts": texts},
        {"messages": turns},
        {"conversations": old},
        {"conversation": pairs},
        {"QA": questions},
        {"prompt": turns[:2], "completion": turns[2:]},
    ):
        assert [turn.learned for turn in read(record).turns if turn.role == "assistant"] == [False, True]
    with pytest.raises(Problem, match=f'unsupported key: "{key}" of turn 2 is 0.5'):
        read({"messages": [turns[0], {**turns[1], key: 0.5}]})
    with pytest.raises(Problem, match="nothing to learn"):
        read({"messages": turns[:2]})
    with pytest.raises(Problem, match="nothing to learn"):
        read({"query": "q", "response": "a", key: False})
    with pytest.raises(Problem, match="turn 1 .user. is to be learned; only answers are"):
        read({"messages": [{**turns[0], key: 1}, *turns[1:]]})
    assert read({"query": "q", "response": "a", key: 1}).turns[1].learned


def test_what_is_not_learned_is_read_and_has_no_label(tmp_path, tokenizer_dir, tokenizer):
    """The same ids whether learned or not; the answers that are left are numbered anew."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate("qanbmc")]
    off = [dict(turn) for turn in turns]
    off[3]["loss"] = False
    store = SampleStore(make_store(tmp_path, tokenizer_dir, [{"messages": turns}, {"messages": off}]))
    whole, part = store[0], store[1]
    assert part.ids.tolist() == whole.ids.tolist()
    kept = whole.answers != 2
    expected = whole.answers * kept
    expected[expected == 3] = 2
    assert part.answers.tolist() == expected.tolist()
    assert part.answer_lengths == (whole.answer_lengths[0], whole.answer_lengths[2])
    assert part.n_supervised == whole.n_supervised - whole.answer_lengths[1]
    learned = [tokenizer.decode(part.ids[part.answers == n].tolist()) for n in (1, 2)]
    assert learned == ["a<|im_end|>", "c<|im_end|>"]


@pytest.fixture
def run(tmp_path, tokenizer_dir):
    def run(records, entry=""):
        write_jsonl(tmp_path / "a.jsonl", records)
        (tmp_path / "r.yaml").write_text(f"mine: {{annotation: a.jsonl{entry}}}")
        settings = PreprocessSettings(str(tokenizer_dir), (256,), SamplingSettings(tile_size=28))
        return preprocess(tmp_path / "r.yaml", tmp_path / "store", settings)

    return run


def test_unknown_keys_stop_preprocessing_early(run, tmp_path, capsys):
    records = [conversation("q", "a", mood="good"), conversation("q", "a", mood="bad", zip="x")]
    with pytest.raises(UserError, match="2 unknown keys in the first 1,000 records.*ignore") as caught:
        run(records)
    assert "\n" not in str(caught.value) and not (tmp_path / "store").exists()
    assert capsys.readouterr().out.splitlines() == [
        'entry "mine": unknown key "mood" of a record, 2 times',
        'entry "mine": unknown key "zip" of a record, 1 times',
    ]
    assert run(records, ", ignore: [mood, zip]").counts["256"]["kept"] == 2


def test_unknown_keys_that_come_later_cost_their_samples(run, capsys, monkeypatch):
    monkeypatch.setattr("megatron_eagle.data.annotations.unknown_keys.FIRST", 3)
    records = [conversation("q", "a")] * 3 + [conversation("q", "a", mood="good")] * 2
    counts = run(records).counts["256"]
    assert (counts["kept"], counts["dropped"]) == (3, {"unknown key": 2})
    assert 'entry "mine": unknown key "mood" of a record, 2 times; these samples' in capsys.readouterr().out


def test_lint_counts_unknown_keys_and_says_how_files_were_read(tmp_path):
    records = [
        conversation("q", "a", mood=1),
        conversation("q", "a", mood=1),
        {"query": "q", "response": "a"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    lint = call_tool("preview_data", "lint", tmp_path / "a.json")
    assert lint.returncode == 1, lint.stderr
    assert lint.stdout.splitlines() == [
        f"{tmp_path}/a.json: JSON array, 3 records, read as ShareGPT (2), query/response (1)",
        'entry "a.json": unknown key "mood" of a record, 2 times',
        "3 lines, 2 with a problem; unknown key: 2",
    ]
