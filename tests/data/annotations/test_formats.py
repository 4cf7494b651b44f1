"""Every dialect becomes the same canonical sample; what cannot be used says why."""

import json
from fractions import Fraction

import numpy as np
import pytest

from megatron_eagle.data.annotations.formats import read_sample
from megatron_eagle.data.annotations.mixture import Dataset, read_recipe
from megatron_eagle.data.annotations.records import open_records
from megatron_eagle.data.sample import DocumentRef, ImageRef, Turn, VideoRef, VideoSource
from megatron_eagle.errors import UserError
from megatron_eagle.problems import Problem
from tests.data.helpers import conversation


def read(record, root="/media"):
    raw = record if isinstance(record, bytes) else json.dumps(record).encode()
    return read_sample(raw, root=root, file="f.jsonl", line=7)


def user(content):
    return {"role": "user", "content": content}


ANSWER = {"role": "assistant", "content": "A cat."}
EXPECTED = Turn("user", (ImageRef(0), "\nWhat?"))


@pytest.mark.parametrize(
    "record",
    [
        conversation("<image>\nWhat?", "A cat.", image="a.png"),
        conversation("<image-1>\nWhat?", " A cat.\n", image=["a.png"]),
        conversation("<image>\nWhat?", "A cat.", images=["a.png"]),
        conversation("<image>\nWhat?", "A cat.", data=[{"type": "image", "image_list": ["a.png"]}]),
        {"messages": [user("<image>\nWhat?"), ANSWER], "images": ["a.png"]},
        {
            "messages": [
                user([{"type": "image", "image": "a.png"}, {"type": "text", "text": "\nWhat?"}]),
                ANSWER,
            ]
        },
        {
            "messages": [
                user([{"type": "image_url", "image_url": {"url": "file:///media/a.png"}}, "\nWhat?"]),
                ANSWER,
            ]
        },
        {
            "messages": [user([{"type": "image"}, {"type": "text", "text": "\nWhat?"}]), ANSWER],
            "images": "a.png",
        },
    ],
)
def test_dialects_agree(record):
    sample = read(record)
    assert sample.turns == (EXPECTED, Turn("assistant", ("A cat.",)))
    assert sample.images == ("/media/a.png",)
    assert (sample.file, sample.line) == ("f.jsonl", 7)


@pytest.mark.parametrize(
    "record",
    [
        conversation("Why? <video>", "So.", video={"video": "v.mp4", "start_time": 0.1, "end_time": 2}),
        conversation(
            "Why? <video-1>",
            "So.",
            data={"type": "video", "video_list": [{"path": "v.mp4", "start": "0.1", "end": 2.0}]},
        ),
        {
            "messages": [
                user(
                    [
                        {"type": "text", "text": "Why? "},
                        {"type": "video", "video": "v.mp4", "video_start": 0.1, "video_end": 2},
                    ]
                ),
                {"role": "assistant", "content": [{"type": "text", "text": "So."}]},
            ]
        },
    ],
)
def test_clips(record):
    sample = read(record)
    assert sample.turns[0] == Turn("user", ("Why? ", VideoRef(0)))
    assert sample.videos == (VideoSource("/media/v.mp4", Fraction(1, 10), Fraction(2)),)


def test_placeholders_are_used_once_and_missing_ones_lead():
    sample = read(conversation("Compare <image-2> with <image>.", "Same.", image=["a", "b", "c"], video="v"))
    assert sample.turns[0].parts == (
        ImageRef(2),
        VideoRef(0),
        "Compare ",
        ImageRef(1),
        " with ",
        ImageRef(0),
        ".",
    )


def test_names_of_media_in_answers_system_turns_and_plain_messages_are_text():
    sample = read(
        {
            "system": "Say <image>.",
            "conversations": [
                {"from": "human", "value": "<image> hi"},
                {"from": "gpt", "value": "see <image> and <video-3>"},
            ],
            "image": "a.png",
        }
    )
    assert sample.turns[0] == Turn("system", ("Say <image>.",))
    assert sample.turns[2] == Turn("assistant", ("see <image> and <video-3>",))
    plain = read({"messages": [user("write an <image> tag"), ANSWER]})
    assert plain.turns[0].parts == ("write an <image> tag",)


def test_documents():
    pages = ("/media/1.png", "/media/2.png")
    expected = Turn("user", ("Read ", DocumentRef(0), "."))
    typed = user(
        [{"type": "text", "text": "Read "}, {"type": "document", "document": ["1.png", "2.png"]}, "."]
    )
    for record in (
        conversation("Read <document>.", "x", document=["1.png", "2.png"]),
        conversation("Read <document-1>.", "x", document=[["1.png", {"path": "2.png"}]]),
        conversation("Read <document>.", "x", documents=[["1.png", "2.png"]]),
        {"messages": [typed, ANSWER]},
    ):
        sample = read(record)
        assert sample.turns[0] == expected
        assert sample.documents == (pages,)
        assert sample.images == ()
    two = read(conversation("<document-2> <image>", "x", document=[["1.png"], ["2.png"]], image="3.png"))
    assert two.turns[0].parts == (DocumentRef(0), DocumentRef(1), " ", ImageRef(0))
    assert two.documents == (("/media/1.png",), ("/media/2.png",))
    typed = user([{"type": "document", "document": "a.pdf"}])
    for record in (
        conversation("<document>", "x", document="a.pdf"),
        conversation("<document>", "x", document=["a.pdf"]),
        conversation("<document>", "x", documents=["a.pdf"]),
        {"messages": [user([{"type": "document"}]), ANSWER], "document": "a.pdf"},
        {"messages": [typed, ANSWER]},
    ):
        sample = read(record)
        assert (sample.documents, sample.turns[0].parts) == (("/media/a.pdf",), (DocumentRef(0),))
    mixed = read(conversation("<document>", "x", document=["a.pdf", ["1.png"], "B.PDF"]))
    assert mixed.documents == ("/media/a.pdf", ("/media/1.png",), "/media/B.PDF")
    assert read(conversation("<document>", "x", document="scan.png")).documents == (("/media/scan.png",),)
    # A tag of that name means nothing where there is no document.
    assert read(conversation("see <document>", "x")).turns[0].parts == ("see <document>",)


def test_media_paths_are_plain():
    sample = read(conversation("hi", "ho", image="../a/./b.png"), root="/media/x/..")
    assert sample.images == ("/a/b.png",)
    picture = {"lmdb_file": "../db", "lmdb_key": "a/b ?.png"}
    assert read(conversation("hi", "ho", image=picture)).images == ("lmdb:///db?a%2Fb%20%3F.png",)
    assert read(conversation("hi", "ho", **picture)).images == ("lmdb:///db?a%2Fb%20%3F.png",)


def test_own_settings_of_a_sample():
    sample = read(conversation("hi", "ho", fps=0.5, max_dynamic_tiles=4, min_frames=2))
    assert sample.overrides == {"fps": 0.5, "max_tiles": 4, "min_frames": 2}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"", "empty line"),
        (b"  \n", "empty line"),
        (b'{"a": ', "broken JSON"),
        (b"\xff\xfe{}", "broken text: not UTF-8 at byte 0"),
        (b"[" * 100_000, "broken JSON"),
        (b"[1]", "not a record"),
        (b'{"conversations": [{"from": "human", "value": "\\ud800"}]}', "broken text"),
        ({"text": "hi"}, "unknown format"),
        ({"messages": []}, "bad turn"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "unknown role: 'robot' in turn 1"),
        ({"messages": [user(None), ANSWER]}, "bad turn: turn 1"),
        ({"messages": [user([{"type": "audio"}]), ANSWER]}, "bad turn: content part"),
        ({"messages": [user("hi")]}, "no answer"),
        (conversation("hi", "  "), "empty answer"),
        (conversation("<image><image>", "x", image="a"), "placeholder mismatch: 2 <image> for 1 images"),
        (conversation("<image-2>", "x", image="a"), "placeholder mismatch: <image-2> but there are 1 images"),
        (
            conversation("<image-1> <image-1>", "x", image=["a", "b"]),
            "placeholder mismatch: <image-1> is used twice",
        ),
        (conversation("<video>", "x"), "placeholder mismatch"),
        (conversation("<video>", "x", video={"video": "v", "start": 3, "end": 3}), "empty clip"),
        (conversation("<video>", "x", video={"video": "v", "start": "1e999999999"}), "bad clip"),
        (conversation("<image>", "x", image=3), "bad media reference"),
        (conversation("<image>", "x", image="http://a/b.png"), "unsupported media"),
        (conversation("<image>", "x", image={"lmdb_file": "f", "lmdb_key": 3}), "bad media reference: lmdb"),
        (conversation("<image>", "x", image={"lmdb_key": "k"}), "bad media reference"),
        (conversation("<video>", "x", video={"lmdb_file": "f", "lmdb_key": "k"}), "unsupported media: video"),
        (conversation("<document>", "x", document=["a.png", "b.PDF"]), "bad media reference: a document is"),
        (conversation("<document>", "x", document="http://a/b.pdf"), "unsupported media: http://a/b.pdf is"),
        (conversation("<document>", "x", document=3), "bad media reference: expected a file name"),
        (conversation("<document>", "x", document=[]), "bad media reference: a document is one PDF file"),
        (conversation("<document>", "x", document=[["a.png"], []]), "bad media reference"),
        (conversation("<document-2>", "x", document=["a.png"]), "placeholder mismatch: <document-2>"),
        (conversation("hi", "ho", fps=-1), "bad setting: fps"),
    ],
)
def test_what_cannot_be_used_says_why(record, reason):
    with pytest.raises(Problem) as caught:
        read(record)
    assert str(caught.value).startswith(reason)


def test_recipe(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").write_text("{}\n\n{}")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "one: {annotation: sub/a.jsonl, repeat_time: 0.5, max_dynamic_tiles: 6}\n"
        "two: {annotation: sub/a.jsonl, root: .}"
    )
    one, two = read_recipe(recipe)
    assert one == Dataset("one", tmp_path / "sub/a.jsonl", str(tmp_path / "sub"), 0.5, {"max_tiles": 6})
    assert two.root == str(tmp_path)


def test_repeat_time_takes_fixed_subsets():
    half, more = (Dataset("name", None, "", repeat).copies(1000) for repeat in (0.5, 2.25))
    assert half.sum() == 500
    assert set(half) == {0, 1}
    assert more.sum() == 2250
    assert set(more) == {2, 3}
    np.testing.assert_array_equal(half, Dataset("name", None, "", 0.5).copies(1000))
    assert (half != Dataset("other", None, "", 0.5).copies(1000)).any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "names no file"),
        ("[1]", "names no file"),
        ("{", "neither JSON nor YAML"),
        ("a: {root: x}", "needs annotation"),
        ("a: {annotation: nope.jsonl}", "does not exist"),
        ("a: {annotation: cut.json}", "JSON array does not end"),
        ("a: {annotation: good.jsonl, repeat: 2}", 'unknown key "repeat"'),
        ("a: {annotation: good.jsonl, repeat_time: often}", "repeat_time must be"),
        ("a: {annotation: good.jsonl, fps: 0}", "fps must be"),
    ],
)
def test_recipe_mistakes_are_one_line(tmp_path, content, message):
    (tmp_path / "cut.json").write_text("[{}")
    (tmp_path / "good.jsonl").write_text("{}")
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        for dataset in read_recipe(tmp_path / "r.yaml"):
            open_records(dataset.annotation)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot read the recipe"):
        read_recipe(tmp_path / "none.yaml")
