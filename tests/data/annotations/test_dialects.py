"""Each dialect in the form in which it is published, read as the conversation that it is."""

import contextlib
import json
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eagle.data.annotations.dialects import DIALECTS, dialect_table
from megatron_eagle.data.annotations.formats import read_sample
from megatron_eagle.data.annotations.keys import METADATA, REFUSED, USED
from megatron_eagle.data.annotations.parsing import Conventions, read_record
from megatron_eagle.data.sample import ImageRef, Turn, VideoRef
from megatron_eagle.problems import Problem
from tests.data.helpers import conversation
from tests.paths import REPO


def read(record, root="/media", **conventions):
    raw = json.dumps(record).encode()
    return read_sample(raw, root=root, file="f", line=1, conventions=Conventions(**conventions))


def turns(*texts):
    """Turns that take turns, the user first."""
    return tuple(Turn(("user", "assistant")[i % 2], (text,)) for i, text in enumerate(texts))


PLAIN = turns("What?", "A cat.")
SHOWN = (Turn("user", (ImageRef(0), "\nWhat?")), Turn("assistant", ("A cat.",)))
FILMED = (Turn("user", (VideoRef(0), "\nWhat?")), Turn("assistant", ("A cat.",)))
CAPTION = (Turn("user", (ImageRef(0),)), Turn("assistant", ("A cat.",)))
PUBLISHED = [
    # LLaVA-Instruct, LLaVA-Video (whose <image> is a video), text without a picture, ShareGPT4V
    ("LLaVA", conversation("<image>\nWhat?", "A cat.", id="000000033471", image="a.jpg"), SHOWN),
    (
        "LLaVA",
        conversation("<image>\nWhat?", "A cat.", id="a-0", video="a.mp4", data_source="0_30_s_youtube"),
        FILMED,
    ),
    ("LLaVA", conversation("What?", "A cat.", id=1, image=""), PLAIN),
    ("ShareGPT", conversation("What?", "A cat.", images=[""]), PLAIN),
    ("ShareGPT", conversation("What?", "A cat.", id="x", model="m", images=None), PLAIN),
    # EAGLE 2.5's own
    (
        "Eagle",
        conversation("<image>\nWhat?", "A cat.", data=[{"type": "image", "image_list": ["a.jpg"]}]),
        SHOWN,
    ),
    # OpenAI, Qwen and what servers write: parts of all kinds
    *(
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": [part, {"type": "text", "text": "\nWhat?"}]},
                    {"role": "assistant", "content": "A cat."},
                ]
            },
            FILMED if "a.mp4" in str(part) else SHOWN,
        )
        for part in (
            {"type": "image_url", "image_url": {"url": "file:///media/a.jpg", "detail": "auto"}},
            {"type": "image", "value": "a.jpg"},
            {"image": "a.jpg"},
            {"type": "image", "image": "a.jpg", "text": None, "video": None},
            {"type": "image", "url": "a.jpg"},
            {"type": "video_url", "video_url": {"url": "a.mp4"}},
            {"type": "video", "value": "a.mp4"},
            {"video": "a.mp4"},
            {"type": "video", "path": "a.mp4"},
        )
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "input_text", "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "A cat."}]},
            ]
        },
        PLAIN,
    ),
    # ms-swift
    (
        "messages",
        {
            "messages": [{"role": "assistant", "content": "<image>A cat."}],
            "images": ["a.jpg"],
        },
        CAPTION,
    ),
    ("query/response", {"query": "<image>\nWhat?", "response": "A cat.", "images": ["a.jpg"]}, SHOWN),
    (
        "query/response",
        {"query": "And?", "response": "A dog.", "history": [["What?", "A cat."]]},
        turns("What?", "A cat.", "And?", "A dog."),
    ),
    ("conversation pairs", {"conversation": [{"human": "What?", "assistant": "A cat."}]}, PLAIN),
    (
        "conversation pairs",
        {"conversation": [{"system": "Be brief.", "input": "What?", "output": "A cat."}]},
        (Turn("system", ("Be brief.",)), *PLAIN),
    ),
    # LLaMA-Factory
    ("alpaca", {"instruction": "What?", "input": "", "output": "A cat."}, PLAIN),
    (
        "alpaca",
        {
            "instruction": "<image>",
            "input": "What?",
            "output": "A cat.",
            "system": None,
            "history": [],
            "images": ["a.jpg"],
        },
        SHOWN,
    ),
    # FineVision and The Cauldron
    (
        "texts",
        {"texts": [{"user": "What?", "assistant": "A cat.", "source": "vqav2"}], "images": []},
        PLAIN,
    ),
    # VideoChat2, Video-ChatGPT
    (
        "VideoChat2",
        {
            "video": "a.mp4",
            "QA": [{"i": "Look.", "q": "What?", "a": "A cat."}, {"i": "Look.", "q": "And?", "a": "A dog."}],
        },
        (Turn("user", (VideoRef(0), "Look.\nWhat?")), PLAIN[1], *turns("And?", "A dog.")),
    ),
    (
        "Video-ChatGPT",
        {"q": "\nWhat?", "a": "A cat.", "video_id": "v_x"},
        (Turn("user", (VideoRef(0), "What?")), PLAIN[1]),
    ),
    # questions, prompts, captions
    ("question/answer", {"question": "<image>\nWhat?", "answer": "A cat.", "image": "a.jpg"}, SHOWN),
    ("prompt/completion", {"prompt": "What?", "completion": "A cat."}, PLAIN),
    (
        "prompt/completion",
        {
            "prompt": [{"role": "user", "content": "What?"}],
            "completion": [{"role": "assistant", "content": "A cat."}],
        },
        PLAIN,
    ),
    ("caption", {"image": "a.jpg", "caption": "A cat."}, CAPTION),
    ("caption", {"images": ["a.jpg"], "text": "A cat."}, CAPTION),
    (
        "messages",
        {
            "messages": [
                {
                    "role": "assistant",
                    "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "A cat."}],
                }
            ]
        },
        CAPTION,
    ),
]


@pytest.mark.parametrize(("dialect", "record", "expected"), PUBLISHED)
def test_published_forms(dialect, record, expected):
    assert read_record(json.dumps(record).encode(), Conventions())[1].name == dialect
    sample = read(record)
    assert sample.turns == expected
    assert set(sample.images) <= {"/media/a.jpg"}
    assert {video.path for video in sample.videos} <= {"/media/a.mp4", "/media/v_x.mp4"}


def test_every_dialect_is_among_them():
    assert {name for name, *_ in PUBLISHED} == {dialect.name for dialect in DIALECTS}


def test_the_documentation_has_the_table():
    assert dialect_table() in (REPO / "docs" / "data.md").read_text(encoding="utf-8")


def test_tools_are_turns():
    """Calls are answers, results are observations; of all who write them."""
    expected = (
        Turn("system", ("Use tools.",)),
        Turn("user", ("Weather?",)),
        Turn("assistant", ('{"name": "w"}',)),
        Turn("observation", ("rain",)),
        Turn("assistant", ("It rains.",)),
    )
    texts = [turn.parts[0] for turn in expected]
    for roles in (
        ("system", "human", "function_call", "observation", "gpt"),
        ("developer", "user", "tool_call", "tool", "assistant"),
        ("system", "user", "assistant", "tool_response", "assistant"),
    ):
        sharegpt = [{"from": role, "value": text} for role, text in zip(roles, texts, strict=True)]
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        assert read({"conversations": sharegpt, "tools": "[]"}).turns[1:] == expected[1:]
        assert read({"messages": messages, "tools": None}).turns == expected


def test_a_picture_is_shown_in_answers_only_where_nobody_asks():
    asked = read({"messages": [*_messages("<image>What?", "see <image>")], "images": ["a.jpg"]})
    assert asked.turns[1].parts == ("see <image>",)
    with pytest.raises(Problem, match="holds media"):
        read({"messages": [{"role": "assistant", "content": "A cat <image>"}], "images": ["a.jpg"]})
    both = {"messages": [{"role": "assistant", "content": "A cat."}], "images": ["a.jpg"], "video": "b.mp4"}
    assert read(both).turns == (
        Turn("user", (ImageRef(0), VideoRef(0))),
        Turn("assistant", ("A cat.",)),
    )


def _messages(question, answer):
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}


def test_system_prompts():
    for system in ("Be brief.", ["Be ", "brief."], [{"type": "text", "text": "Be brief."}]):
        assert read({**conversation("a", "b"), "system": system}).turns[0] == Turn("system", ("Be brief.",))
    twice = {"messages": [{"role": "system", "content": "Be brief."}, *_messages("a", "b")]}
    assert len(read({**twice, "system": "Be brief."}).turns) == 3
    with pytest.raises(Problem, match='unsupported key: "system"'):
        read({**twice, "system": "Be long."})
    with pytest.raises(Problem, match='"system" holds something else'):
        read({**conversation("a", "b"), "system": [{"type": "image", "image": "a"}]})


def test_clips_of_other_dialects():
    """InternVL's `clip`, VideoChat2's `start` and `end`, `start_time`: all beside the video."""
    for keys in ({"clip": [1, 2.5]}, {"start": 1, "end": "2.5"}, {"start_time": 1.0, "end_time": 2.5}):
        (video,) = read(conversation("<video>", "x", video="v.mp4", **keys)).videos
        assert (video.start, video.end) == (1, Fraction(5, 2))
    two = read(conversation("<video><video>", "x", video=["v.mp4", "w.mp4"], clip=[[0, 1], [2, 3]]))
    assert [(v.start, v.end) for v in two.videos] == [(0, 1), (2, 3)]
    for media in ({"video": ["v.mp4", "w.mp4"]}, {"image": "a.jpg"}, {}):
        for keys in ({"clip": [1, 2]}, {"start": 1}):
            with pytest.raises(Problem, match="bad clip"):
                read(conversation("hi", "x", **media, **keys))
    with pytest.raises(Problem, match="bad clip: clip must be"):
        read(conversation("hi", "x", video="v.mp4", clip=[1, 2, 3]))


def test_settings_of_a_video_in_its_part():
    def ask(*parts):
        return {"messages": [*_messages([*parts, "hi"], "x")]}

    video = {"type": "video", "video": "v.mp4"}
    assert read(ask({**video, "fps": 4, "max_frames": 6})).overrides == {"fps": 4, "max_frames": 6}
    assert read(ask({**video, "nframes": 6})).overrides == {"min_frames": 6, "max_frames": 6}
    assert read(ask({**video, "fps": 4}, {**video, "fps": 4})).overrides == {"fps": 4}
    with pytest.raises(Problem, match="unsupported key: fps of one video among several"):
        read(ask({**video, "fps": 4}, video))


def test_columns_and_tags_of_a_recipe():
    record = {
        "talk": [{"who": "me", "what": "<image>\nWhat?"}, {"who": "it", "what": "A cat."}],
        "pics": ["a.jpg"],
    }
    tags = {"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "it"}
    assert read(record, columns={"messages": "talk", "images": "pics"}, tags=tags).turns == SHOWN
    for role in (None, ["me"]):  # tags say nothing of such
        broken = {"talk": [{"who": role, "what": "x"}]}
        with pytest.raises(Problem, match="unknown role"):
            read(broken, columns={"messages": "talk"}, tags=tags)
    asked = {"ask": "What?", "reply": "A cat."}
    assert read(asked, columns={"instruction": "ask", "output": "reply"}).turns == PLAIN
    with pytest.raises(Problem, match='"ask" is to be read as "instruction", which is there too'):
        read({**asked, "instruction": "x"}, columns={"instruction": "ask"})


def test_a_video_by_its_name(tmp_path):
    (tmp_path / "v_x.mkv").write_bytes(b"")
    record = {"q": "What?", "a": "A cat.", "video_id": "v_x"}
    assert read(record, root=str(tmp_path)).videos[0].path == str(tmp_path / "v_x.mkv")
    assert read({**record, "video": "other.mp4"}).videos[0].path == "/media/other.mp4"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "hi"}, "unknown format"),
        ({"query": "a", "response": "b", "history": ["c"]}, 'bad turn: "history"'),
        ({"instruction": ["a"], "output": "b"}, "bad turn"),
        ({"conversation": ["a"]}, "bad turn: turn 1"),
        ({"texts": []}, 'bad turn: "texts" must be a list'),
        ({"QA": [{"q": 1, "a": "b"}]}, "bad turn: turn 1"),
        ({"image": "a.jpg", "caption": None, "text": 3}, "bad turn"),
        ({"prompt": "a", "completion": ""}, "empty answer"),
    ],
)
def test_what_cannot_be_used_says_why(record, reason):
    with pytest.raises(Problem) as caught:
        read(record)
    assert str(caught.value).startswith(reason)


ODD = st.sampled_from(
    [None, "", [], {}, 0, -1, 2.5, True, False, "x", ["x"], [["x"]], {"a": 1}, [None], [{}], "x.jpg"]
    + [["a.jpg", "b.jpg"], [1, 2], {"path": "x"}, {"url": None}, float("nan"), float("inf"), "nan", "<image>"]
    + [[{"type": "text"}], "\ud800"]
)
KEYS = sorted({*REFUSED, *(key for place in USED for key in (*USED[place], *METADATA[place]))})


@st.composite
def spoiled(draw, value):
    """A record in which some values are others, some keys are gone, and some are more."""
    if draw(st.integers(0, 9)) == 0:
        return draw(ODD)
    if isinstance(value, dict):
        kept = {key: draw(spoiled(inner)) for key, inner in value.items() if draw(st.integers(0, 19))}
        more = draw(st.dictionaries(st.sampled_from(KEYS), ODD, max_size=1))
        return {**kept, **more}
    return [draw(spoiled(inner)) for inner in value] if isinstance(value, list) else value


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([record for _, record, _ in PUBLISHED]).flatmap(spoiled))
def test_whatever_stands_anywhere_is_a_sample_or_a_problem(record):
    for conventions in ({}, {"tags": {"role_tag": "from", "user_tag": "x"}, "columns": {"image": "path"}}):
        with contextlib.suppress(Problem):
            assert read(record, **conventions).turns
