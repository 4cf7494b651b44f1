"""Story and clips: chapters or clips become training lines that the preprocessor reads."""

import asyncio
import json
import re
import subprocess
import sys
import time

import pytest

from megatron_eagle.data.annotations.formats import read_sample
from megatron_eagle.data.sample import USER, VideoRef
from megatron_eagle.eagle_video.anchors import AnchorWriter, context_question, leaked_words, time_anchor
from megatron_eagle.eagle_video.chapters import (
    BoundedChapter,
    Chapter,
    ChapteredVideo,
    chapters_within,
    read_chapters,
)
from megatron_eagle.eagle_video.client import Client
from megatron_eagle.eagle_video.prompts import Prompt, load_prompt, load_question_types
from megatron_eagle.eagle_video.records import Notes, clock, training_line
from megatron_eagle.eagle_video.transport import Endpoint
from megatron_eagle.errors import UserError
from megatron_eagle.files import to_line
from tests.data.helpers import make_video, write_jsonl
from tests.eagle_video.helpers import call_tool
from tests.eagle_video.server import serving
from tests.paths import REPO


def _text(request: dict) -> str:
    content = request["messages"][0]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def _pictures(request: dict) -> int:
    content = request["messages"][0]["content"]
    return 0 if isinstance(content, str) else len(content) - 1


def _model(request: dict) -> str:
    """Plays every model: tells the requests apart by their prompts."""
    text = _text(request)
    if '{"caption"' in text:
        return json.dumps({"caption": f"Seen: {re.search('titled this chapter: (.*)', text)[1]}"})
    if '{"anchor"' in text:
        # The first try names the answer, the second implies it, the third is good.
        tries = ["While the red ball lies there", "While strawberries lie there", "While a dog barks"]
        return json.dumps({"anchor": tries[text.count("Not this one")]})
    if '{"leaks"' in text:
        return json.dumps({"leaks": "strawberries" in text})
    if "type" in text and "for each of these kinds" in text:
        kinds = re.findall(r"^- ([^:]+):", text, re.MULTILINE)
        return json.dumps(
            {"qa": [{"type": k, "question": f"Which <image> {k}?", "answer": "Red."} for k in kinds]}
        )
    return json.dumps({"qa": [{"question": "What first?", "answer": "This."}] * 2})


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(_model) as running:
        yield running


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    make_video(folder / "aa.mp4", 60, fps=2)  # 30 s
    make_video(folder / "bb.mkv", 8, fps=2)  # 4 s
    return folder


def _annotate(step, server, output, *more):
    arguments = ["--endpoint", server.url, "--model", "tiny", "--output", output, "--side", 64, *more]
    return call_tool("annotate_videos", step, *arguments)


def _read(output):
    """All training lines, through the preprocessor's own reader."""
    raw = output.read_bytes().splitlines()
    return [
        read_sample(line, root=str(output.parent), file=str(output), line=i) for i, line in enumerate(raw, 1)
    ], [json.loads(line)["provenance"] for line in raw]


def test_story_from_chapters_to_training_lines(server, media, tmp_path):
    chapters = {
        "aa": {
            "duration": 30,
            "chapters": [
                {"time": 0, "label": "Intro"},
                {"time": 10, "label": "Work"},
                {"time": 40, "label": "Late"},
                {"time": 20, "label": " "},
            ],
        },
        "bb": {"duration": 4, "timestamps": [[0, 4]], "sentences": ["All"]},
        "cc": {"duration": 4, "timestamps": [[0, 4]], "sentences": ["Gone"]},
        "dd": {"duration": 4},
    }
    (tmp_path / "chapters.json").write_text(json.dumps(chapters))
    given = ["--chapters", tmp_path / "chapters.json", "--videos", media, "--max-frames", 15]
    output = tmp_path / "out" / "story.jsonl"

    estimate = _annotate("story", server, output, *given, "--dry-run", "--input-price", 1)
    assert estimate.returncode == 0, estimate.stderr
    assert "5 requests" in estimate.stdout and "cost" in estimate.stdout and not server.requests
    assert not output.exists()

    server.faults = [("text", "nonsense"), ("status", 500, {})]
    done = _annotate("story", server, output, *given, "--concurrency", 1)
    assert done.returncode == 0, done.stderr
    assert "4 samples" in done.stdout and "1 invalid" in done.stdout
    samples, origins = _read(output)
    assert [s.videos[0].path for s in samples] == [
        str(media / name) for name in ["aa.mp4"] * 2 + ["bb.mkv"] * 2
    ]
    assert samples[0].turns[0].role == USER and samples[0].turns[0].parts == (VideoRef(0), "\nWhat first?")
    assert origins[0]["chapters"] == [["Intro", 0.0, 10.0], ["Work", 10.0, 20.0]]
    assert origins[0]["model"] == "tiny" and origins[0]["prompts"]["story_caption"].startswith("v1-")
    captions = {_text(r): _pictures(r) for r in server.requests if '{"caption"' in _text(r)}
    assert sorted(captions.values()) == [8, 15, 15]  # 4 s at 2 fps; 10 s would be 20, the limit is 15
    joined = [_text(r) for r in server.requests if not _pictures(r)]
    assert any('00:00 to 00:10, Intro:\nSeen: "Intro"\n\n00:10 to 00:20, Work:' in text for text in joined)
    ledger = [json.loads(line) for line in output.with_suffix(".dropped.jsonl").open()]
    assert sorted(entry["kind"] for entry in ledger) == [
        "chapter beyond the end",
        "chapter without title",
        "missing media",
        "unknown chapter form",
    ]

    asked, written = len(server.requests), output.read_bytes()
    again = _annotate("story", server, output, *given)
    assert len(server.requests) == asked and output.read_bytes() == written
    assert "0 answers paid" in again.stdout


@pytest.mark.parametrize("says", ["Sure, here it is!", '{"caption": "  ", "qa": []}'])
def test_an_endpoint_that_never_answers_well_is_given_up(says, server, media, tmp_path):
    server.answer = lambda request: says
    story = _annotate("story", server, tmp_path / "story.jsonl", "--videos", media, "--max-frames", 2)
    write_jsonl(tmp_path / "kept.jsonl", [{"video": str(media / "aa.mp4"), "start": 0, "end": 10}])
    clips = _annotate("clips", server, tmp_path / "clips.jsonl", "--clips", tmp_path / "kept.jsonl")
    for done, name, lost in ((story, "story", 3), (clips, "clips", 1)):
        assert done.returncode == 0 and "0 samples" in done.stdout, done.stderr
        assert (tmp_path / f"{name}.jsonl").read_text() == ""
        entries = [json.loads(line) for line in (tmp_path / f"{name}.dropped.jsonl").open()]
        assert sum(entry["kind"] in ("no valid answer", "no questions") for entry in entries) == lost
    asked = len(server.requests)
    assert asked < 20
    _annotate("story", server, tmp_path / "story.jsonl", "--videos", media, "--max-frames", 2)
    assert len(server.requests) == asked  # nor asked again by the next run


def test_stopped_run_pays_for_the_rest_alone(server, media, tmp_path):
    write_jsonl(tmp_path / "kept.jsonl", [{"video": str(media / "aa.mp4"), "start": 0, "end": 10}])
    output = tmp_path / "clips.jsonl"
    given = ["--clips", tmp_path / "kept.jsonl", "--concurrency", 1, "--questions", 2]
    plain = server.answer

    def refuse_fifth(request):  # the endpoint turns the key down in the middle
        if len(server.requests) == 4:
            server.faults.append(("status", 401, {}))
        return plain(request)

    server.answer = refuse_fifth
    stopped = _annotate("clips", server, output, *given)
    assert stopped.returncode == 2 and stopped.stderr.startswith("error: ") and "401" in stopped.stderr
    assert not output.exists() and len(server.requests) == 5
    server.answer = plain
    done = _annotate("clips", server, output, *given)
    assert done.returncode == 0, done.stderr
    assert "4 from the cache" in done.stdout
    asked = [json.dumps(r) for r in server.requests]
    assert len(set(asked)) == len(asked) - 1  # only the refused one was sent twice


def test_killed_run_keeps_what_it_paid_for(server, media, tmp_path):
    write_jsonl(tmp_path / "kept.jsonl", [{"video": str(media / "aa.mp4"), "start": 0, "end": 10}])
    output = tmp_path / "clips.jsonl"
    given = ["--clips", tmp_path / "kept.jsonl", "--concurrency", 1]
    server.faults = [(), (), (), (), ("sleep", 60)]
    command = [sys.executable, REPO / "tools" / "annotate_videos.py", "clips", "--endpoint", server.url]
    command += ["--model", "tiny", "--output", output, "--side", 64, *given]
    with subprocess.Popen(list(map(str, command))) as run:
        while len(server.requests) < 5:
            assert run.poll() is None
            time.sleep(0.05)
        run.kill()
    assert not output.exists()
    done = _annotate("clips", server, output, *given)
    assert done.returncode == 0 and "4 from the cache" in done.stdout
    asked = [json.dumps(r) for r in server.requests]
    assert len(set(asked)) == len(asked) - 1  # only the one under way was sent twice


def test_clips_get_time_and_context_anchors(server, media, tmp_path):
    clips = [
        {"video": str(media / "aa.mp4"), "start": 10.0, "end": 20.0},
        {"video": str(media / "no.mp4"), "start": 0, "end": 10},
    ]
    write_jsonl(tmp_path / "kept.jsonl", clips)
    (tmp_path / "types.yaml").write_text("colour: which colour\nshape: which shape\n")
    output = tmp_path / "clips.jsonl"
    given = ["--clips", tmp_path / "kept.jsonl", "--question-types", tmp_path / "types.yaml"]
    estimate = _annotate("clips", server, output, *given, "--dry-run")
    assert "5 requests" in estimate.stdout and not server.requests  # questions; 2 anchors, 2 verdicts
    done = _annotate("clips", server, output, *given)
    assert done.returncode == 0, done.stderr
    assert "missing media: 1" in done.stdout
    samples, origins = _read(output)
    assert [o["anchor"] for o in origins] == ["time", "context"] * 2
    assert {o["question_type"] for o in origins} == {"colour", "shape"}
    questions = [s.turns[0].parts[1].strip() for s in samples]
    assert re.match(r"Between 00:10 and 00:20 of the video: Which image (colour|shape)\?", questions[0])
    assert re.match(r"While a dog barks: Which image (colour|shape)\?", questions[1])
    assert samples[0].videos[0].start is None and _pictures(server.requests[0]) == 20
    assert len(origins[1]["requests"]) == 3 and set(origins[1]["prompts"]) > {"context_anchor", "leak_judge"}


@pytest.mark.parametrize(
    "anchor, question, answer, leaked",
    [
        ("While the red ball rolls", "What is thrown?", "A red ball.", ["red", "ball"]),
        ("While a dog barks", "What is thrown?", "A red ball.", []),
        ("When two people sit", "How many cups are there?", "2", ["2"]),
        ("While the man is running", "What does the man do?", "He runs.", []),
        ("While somebody paints a wall", "What does he do?", "Painting.", ["painting"]),
        (
            "While the man sits",
            "What does the man do?",
            "The man sleeps.",
            [],
        ),  # the question says man itself
        ("When yes is shouted", "Is it a dog?", "Yes", []),  # left to the judge
    ],
)
def test_lexical_leaks(anchor, question, answer, leaked):
    assert leaked_words(anchor, question, answer) == leaked


def test_an_anchor_that_always_leaks_is_given_up(server, tmp_path):
    server.answer = lambda request: '{"anchor": "While it is red", "leaks": true}'

    async def run(answer):
        with Client(Endpoint(server.url, "tiny"), tmp_path) as client:
            return await AnchorWriter(client, tries=2).write([], "Which colour?", answer)

    assert asyncio.run(run("Red")) is None  # by its words: the judge is not asked
    assert len(server.requests) == 2
    assert asyncio.run(run("Green")) is None and len(server.requests) == 2 + 3  # same phrase, same verdict


def test_anchored_questions():
    assert time_anchor("Who? ", 3605.2, 3615) == "Between 1:00:05 and 1:00:15 of the video: Who?"
    assert context_question("Who?", "While it rains. ") == "While it rains: Who?"
    assert clock(83.4) == "01:23"


def test_vitt_and_other_chapter_forms(tmp_path, media):
    vitt = [
        {"id": "aa", "annotations": [{"timestamp": 16000, "tag": "B"}, {"timestamp": 260, "tag": "A"}]},
        {"id": "aa", "annotations": []},
    ]
    notes = Notes("f")
    (video,) = read_chapters(write_jsonl(tmp_path / "vitt.json", vitt), media, notes)
    assert [e.kind for e in notes.entries] == ["second annotation"]
    assert chapters_within(video, 30.0, notes) == [
        BoundedChapter("A", 0.26, 16.0),
        BoundedChapter("B", 16.0, 30.0),
    ]
    said = [{**vitt[0], "annotations": [{"timestamp": 0, "tag": f"{name}\u2028"}]} for name in "ab"]
    (tmp_path / "said.json").write_bytes(b"".join(map(to_line, said)))
    assert read_chapters(tmp_path / "said.json", media, notes)[0].chapters[0].title == "a\u2028"
    (tmp_path / "times.json").write_text(json.dumps({"bb": {"chapters": {"0:00:00": "A", "00:02": "B"}}}))
    (video,) = read_chapters(tmp_path / "times.json", media, notes)
    assert video.chapters == (Chapter("A", 0.0, None), Chapter("B", 2.0, None)) and video.path.endswith(
        "bb.mkv"
    )
    empty = ChapteredVideo("x", "x", (Chapter("A", 5.0, 5.0),))
    assert chapters_within(empty, 9.0, notes) == [] and notes.entries[-1].kind == "empty chapter"
    for text in ("[1]", "{", '{"id": 1}\n{'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match=r"bad\.json"):
            read_chapters(tmp_path / "bad.json", media, notes)


def test_prompts_are_versioned_and_replaceable(tmp_path):
    shipped = load_prompt("leak_judge")
    (tmp_path / "leak_judge.v2.txt").write_text("$anchor")
    (tmp_path / "leak_judge.v10.txt").write_text("ten $anchor")
    assert load_prompt("leak_judge", tmp_path).version.startswith("v10-")
    assert load_prompt("story_caption", tmp_path).version.startswith("v1-")
    assert shipped.fill(anchor="a", question="q $x", answer="r").count("q $x") == 1
    with pytest.raises(UserError, match="other.*known are"):
        Prompt("p", "v1", "$other").fill(anchor="a")
    with pytest.raises(UserError, match="no prompt"):
        load_prompt("no-such")
    assert len(load_question_types()) >= 10
    (tmp_path / "t.yaml").write_text("a: [1]")
    with pytest.raises(UserError, match="KIND"):
        load_question_types(tmp_path / "t.yaml")


def test_a_question_cannot_ask_for_media_of_its_own(tmp_path):
    line = training_line("v.mp4", "Is <image-2> a <video>?", " Yes <image> ", tmp_path / "o.jsonl", {})
    sample = read_sample(json.dumps(line).encode(), root=".", file="f", line=1)
    assert sample.turns[0].parts == (VideoRef(0), "\nIs image a video?")
    assert sample.turns[1].parts == ("Yes <image>",)


def test_mistakes_are_one_line(server, tmp_path):
    (tmp_path / "kept.jsonl").write_text('{"video": 1}\n')
    for more, problem in (
        (["--clips", tmp_path / "none"], "cannot read"),
        (["--clips", tmp_path / "kept.jsonl"], "as `megatron-eagle select` writes"),
        (["--clips", tmp_path / "kept.jsonl", "--fps", 0], "--fps must be positive"),
    ):
        done = _annotate("clips", server, tmp_path / "o.jsonl", *more)
        assert done.returncode == 2 and problem in done.stderr and done.stderr.count("\n") == 1
