"""Every published form: a small file written by hand, its questions, and a score worked out by hand."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from megatron_eagle.errors import UserError
from megatron_eagle.evaluation import metrics
from megatron_eagle.evaluation.judge import SCALES, Judge
from megatron_eagle.evaluation.published.registry import BENCHMARKS
from megatron_eagle.evaluation.published.source import Source
from megatron_eagle.evaluation.summary import overall
from tests.evaluation.published_cases import CASES, PNG, write


class _Marks:
    """Replies with the mark that the answer asks for."""

    def answer(self, request, sampling):
        return re.search(r"judge: ([\d.]+)", request.prompt)[1]


@pytest.mark.parametrize("name", CASES)
def test_form_and_score(tmp_path, name):
    file, content, others, answers, score = CASES[name]
    write(tmp_path, file, content)
    for other, data in others.items():
        write(tmp_path, other, data)
    questions, problems = BENCHMARKS[name].questions(Source(tmp_path, tmp_path / "pictures"))
    assert len(questions) == len(answers)
    assert len(problems) == (name == "egoschema")
    assert all("no answer to compare" in problem.reason for problem in problems)
    judge = Judge(_Marks()) if any(q.metric in SCALES for q in questions) else None
    scored = [(q, q.score(text, judge)) for q, text in zip(questions, answers, strict=True)]
    assert overall(BENCHMARKS[name], scored, questions) == pytest.approx(score)
    # The first question's media were found, wherever they lie.
    first = questions[0].request
    for path in [*first.images, *(video["video"] for video in first.videos)]:
        assert str(path).startswith(str(tmp_path))
        assert any(path == str(tmp_path / other) for other in others) or "/pictures/" in path
    assert all(video["min_frames"] == 8 for q in questions for video in q.request.videos)


def read(tmp_path, name):
    return BENCHMARKS[name].questions(Source(tmp_path, tmp_path / "pictures"))


def test_parts_of_videos_and_tiled_frames(tmp_path):
    for name in ("cg-bench-clue", "hd-epic", "perception-test", "mvbench"):
        write(tmp_path / name, *CASES[name][:2])
    clips = read(tmp_path / "cg-bench-clue", "cg-bench-clue")[0][0].request.videos
    assert [(clip["start_time"], clip["end_time"]) for clip in clips] == [(1, 2), (5, 9)]
    question = read(tmp_path / "hd-epic", "hd-epic")[0][0]
    clip = question.request.videos[0]
    assert (clip["start_time"], clip["end_time"]) == (62.5, 64)
    assert question.question == "Times of video 1 count from 62.50s, where it begins.\nHow at 0.5 s?"
    assert read(tmp_path / "perception-test", "perception-test")[0][0].request.frame_tiles == 12
    first = read(tmp_path / "mvbench", "mvbench")[0][0].request
    assert (first.videos[0]["start_time"], first.videos[0]["end_time"]) == (1.5, 4) and not first.frame_tiles


def test_subtitles_come_before_the_question(tmp_path):
    file, content, others, *_ = CASES["video-mme"]
    write(tmp_path, file, content)
    srt = "1\n00:00:01,000 --> 00:00:02,500\n<i>Hello</i>\n\n2\n00:00:03,000 --> 00:00:04,000\nthere\n"
    write(tmp_path, "subtitle/abc.srt", srt)
    asked = read(tmp_path, "video-mme-subtitles")[0][0].request.prompt
    assert asked.startswith(
        "This video's subtitles are listed below:\nHello\nthere\n\nColour?\nA. red\nB. blue\n"
    )
    assert "subtitles" not in read(tmp_path, "video-mme")[0][0].request.prompt


def test_parquet_with_pictures_inside(tmp_path):
    rows = [
        {"index": 3, "question": "Which is it?\nOptions: A: a cat, B: a dog", "answer": "B"}
        | {"image": {"bytes": PNG, "path": None}, "category": "fine"}
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "val.parquet")
    (question,), problems = read(tmp_path, "mmstar")
    assert problems == [] and question.options == ("a cat", "a dog") and question.answer == "B"
    assert Path(question.request.images[0]).read_bytes() == PNG
    assert question.request.prompt.startswith("Which is it?\nA. a cat\nB. a dog\n")


def test_mmmu_places_its_pictures(tmp_path):
    picture = {"bytes": PNG, "path": "1.png"}
    row = {"id": "validation_Art_Theory_3", "question": "See <image 2>: is it <image 1> or <image 2>?"}
    row |= {"options": "['yes', '<image 3>']", "question_type": "multiple-choice", "answer": "B"}
    row |= {f"image_{i}": picture if i < 4 else None for i in range(1, 8)}
    essay = row | {"id": "validation_Art_Theory_4", "question": "How many?", "options": "[]", "answer": "8"}
    parquet.write_table(
        pa.Table.from_pylist([row, essay | {"question_type": "open"}]), tmp_path / "val.parquet"
    )
    (choice, free), problems = read(tmp_path, "mmmu")
    assert problems == [] and choice.category == "Art_Theory"
    assert choice.question == "See <image-1>: is it <image-2> or picture 1?"
    assert choice.options == ("yes", "<image-3>") and len(choice.request.images) == 3
    assert free.metric == "mmmu-open" and free.score("8.") == 1 and free.request.images == ()
    assert choice.score("It is (B).") == 1 and choice.score("A") == 0


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        Source(tmp_path / "none", tmp_path)
    with pytest.raises(UserError, match="none of the files cgbench.json"):
        read(tmp_path, "cg-bench-long")
    (tmp_path / "cgbench.json").write_text("{")
    with pytest.raises(UserError, match="cgbench.json: cannot be read"):
        read(tmp_path, "cg-bench-long")
    rows = [{"qid": 1}, CASES["cg-bench-clue"][1][0], CASES["cg-bench-clue"][1][0], "text"]
    (tmp_path / "cgbench.json").write_text(json.dumps(rows))
    questions, problems = read(tmp_path, "cg-bench-long")
    assert len(questions) == 1 and [p.line for p in problems] == [1, 3, 4]
    assert "video_uid" in problems[0].reason and "twice" in problems[1].reason


def test_a_missing_answer_costs_its_question_alone(tmp_path):
    item = {"id": 0, "question": "?", "options": ["a", "b"], "answer_id": 1}
    asked = [item | {"answer_id": None}, {k: v for k, v in item.items() if k != "answer_id"}, item]
    asked = [entry | {"id": number} for number, entry in enumerate(asked)]
    write(tmp_path, "mc_question_valid.json", {"v": {"mc_question": asked}})
    questions, problems = read(tmp_path, "perception-test")
    assert [q.id for q in questions] == ["v:2"] and questions[0].answer == "B"
    assert [p.reason for p in problems] == ["there is no answer to compare with"] * 2
    entry = {"question": "?", "imagename": "a.png", "capability": ["ocr"]}
    write(tmp_path, "mm-vet.json", {"v1_0": entry, "v1_1": entry | {"answer": "x"}})
    questions, problems = read(tmp_path, "mm-vet")
    assert [q.id for q in questions] == ["v1_1"] and len(problems) == 1


def test_hallusionbench_without_figures(tmp_path):
    row = {"category": "VS", "subcategory": "s", "set_id": 0, "figure_id": 0, "question_id": 1}
    row |= {"visual_input": "0", "gt_answer": "1", "question": "?", "filename": None}
    write(tmp_path, "HallusionBench.json", [row, row | {"question_id": 2}])
    questions, _ = read(tmp_path, "hallusionbench")
    scored = list(zip(questions, (1.0, 0.0), strict=True))
    assert overall(BENCHMARKS["hallusionbench"], scored, questions) == 50  # there is no figure


def test_pictures_are_written_anew_and_names_do_not_depend_on_their_place(tmp_path):
    row = {"question": "?", "answer": "2", "type": "human", "image": {"bytes": PNG}}
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "test.parquet")
    places = [Source(tmp_path, tmp_path / name) for name in ("a", "b")]
    (first,), (second,) = (BENCHMARKS["chartqa"].questions(place)[0] for place in places)
    assert first.id == second.id and first.request.images != second.request.images
    Path(first.request.images[0]).unlink()
    BENCHMARKS["chartqa"].questions(places[0])
    assert Path(first.request.images[0]).read_bytes() == PNG
    assert [path.suffix for path in (tmp_path / "a").iterdir()] == [".png"]


def test_of_several_splits_the_scored_one_is_read(tmp_path):
    picture = {"bytes": PNG, "path": "1.png"}
    row = {"question_id": 1, "question": "?", "answers": ["a"] * 10, "image": picture}
    for number, split in enumerate(("test", "train", "validation")):
        table = pa.Table.from_pylist([row | {"question_id": number}])
        parquet.write_table(table, tmp_path / f"{split}-00000.parquet")
    assert [q.id for q in read(tmp_path, "textvqa")[0]] == ["2"]


def test_a_number_counts_the_options_also_where_these_are_numbers(tmp_path):
    rows = [
        {"question": f"How many {i}?", "options": ["3", "0", "1"], "answer": answer, "image": {"bytes": PNG}}
        for i, answer in enumerate(("1", "0", "5"))
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    questions, problems = read(tmp_path, "ai2d")
    assert [q.answer for q in questions] == ["B", "A"] and len(problems) == 1


def test_names_cannot_leave_the_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.png").write_bytes(PNG)
    place = Source(tmp_path / "in", tmp_path / "pictures").place("../secret.png")
    assert place == str(tmp_path / "in" / "secret.png")


def test_new_scores():
    assert metrics.number_match("about 1,234.5", (1234.46, 1)) == 1
    assert metrics.number_match("none", (1.0, 0)) == 0
    assert metrics.intervals_iou([(0, 4), (2, 6)], [(4, 8)]) == pytest.approx(2 / 8)
    assert metrics.intervals_iou([], [(0, 1)]) == 0
    assert metrics.parse_intervals("0:10 to 0:20 and 30-40s") == [(10, 20), (30, 40)]


def test_every_reader_has_a_case():
    """Or a test of its own."""
    own = {"mmmu", "video-mme-subtitles", "cg-bench-long", "hourvideo-test"}
    tried = {BENCHMARKS[name].records for name in {*CASES, *own}}
    assert {name for name, published in BENCHMARKS.items() if published.records not in tried} == set()
