"""What is asked is what the authors ask: inputs, times, boxes, subtitles, options and folders."""

import copy
import json
import os

import pytest

from megatron_eagle.evaluation.published import shown
from megatron_eagle.evaluation.published.options import inline_options, without_letters
from megatron_eagle.evaluation.published.registry import BENCHMARKS
from megatron_eagle.evaluation.published.source import Source
from megatron_eagle.hf_model.media_files import load_video
from megatron_eagle.hf_model.subtitles import between_frames, read_subtitles
from megatron_eagle.inference.generate import Sampling, video_item
from tests.data.helpers import make_video
from tests.evaluation.published_cases import CASES, PNG, write


def read(folder, name, **sampling):
    return BENCHMARKS[name].questions(Source(folder, folder / "pictures", **sampling))


def frames(video, **sampling):
    item = video_item(video, Sampling(**sampling))
    return load_video(item.pop("video"), **{k: v for k, v in item.items() if k != "type" and v is not None})


def hd_epic(folder, inputs, question="Q?", choices=("a", "b"), table="recipe_x"):
    item = {"inputs": inputs, "question": question, "choices": list(choices), "correct_idx": 1}
    write(folder, f"vqa-benchmark/{table}.json", {f"{table}_0": item})
    write(folder, "eye-gaze/priming_info.json", {"P01": {"start": 1}})  # the clone's other files
    (question,), problems = read(folder, "hd-epic", fps=2.0, max_frames=32)
    assert problems == []
    return question


def test_hd_epic_a_picture_is_one_frame_of_its_time(tmp_path):
    (tmp_path / "P01").mkdir()
    make_video(tmp_path / "P01" / "P01-1.mp4", 90, fps=30)
    question = hd_epic(
        tmp_path, {"image 1": {"id": "P01-1", "time": "00:00:01.5"}, "video 1": {"id": "P01-1"}}
    )
    whole, picture = question.request.videos
    assert len(frames(whole, fps=2.0, max_frames=32)) == 8
    moment = frames(picture, fps=2.0, max_frames=32)
    assert moment.timestamps == [pytest.approx(1.5)]
    assert question.question == "video 1: <video-1>\nimage 1: <video-2>\nQ?"


@pytest.mark.parametrize("rate", [1, 24, 30])
def test_a_moment_is_one_frame_at_any_rate(tmp_path, rate):
    path = str(make_video(tmp_path / "v.mp4", 4 * rate, fps=rate))
    for at in (0.0, 2.0, 2.0 + 0.4 / rate, 2.05):
        start, end = shown.moment(path, at)
        video = {"video": path, "start_time": start, "end_time": end, "nframes": 1}
        (time,) = frames(video).timestamps
        assert abs(time - at) <= 0.51 / rate


def test_hd_epic_inputs_stand_in_the_order_of_their_numbers_and_share_the_limit(tmp_path):
    names = [f"video {i}" for i in range(1, 13)]
    inputs = {name: {"id": f"P01-{name[6:]}"} for name in sorted(names)}
    assert list(inputs) != names
    question = hd_epic(tmp_path, inputs)
    assert [os.path.basename(v["video"]) for v in question.request.videos] == [
        f"P01-{i}" for i in range(1, 13)
    ]
    assert [v["max_frames"] for v in question.request.videos] == [2] * 12  # 32 for twelve
    (alone,) = hd_epic(tmp_path, {"video 1": {"id": "P01-1"}}).request.videos
    assert "max_frames" not in alone and alone["min_frames"] == 8  # the run's own limit


def test_frames_are_shared_by_length():
    clips = [{"video": "no.mp4", "start_time": 0.0, "end_time": end, "min_frames": 8} for end in (60.0, 20.0)]
    assert [clip["max_frames"] for clip in shown.share_frames(clips, 2.0, 40)] == [30, 10]
    assert [clip["max_frames"] for clip in shown.share_frames(clips, 2.0, 1000)] == [1000, 1000]
    still = clips[0] | {"nframes": 1}
    assert shown.share_frames([still, clips[1]], 2.0, 21) == [
        still,
        clips[1] | {"max_frames": 20, "min_frames": 8},
    ]


def test_hd_epic_times_and_boxes_of_question_and_choices(tmp_path):
    clip = {"video 1": {"id": "P01-1", "start_time": "00:01:00.0", "end_time": "00:02:00"}}
    question = hd_epic(
        tmp_path,
        clip,
        "Where is <BBOX 140.8 704 1408 0.0 > at <TIME 00:01:3.25 video 1> after <pick up bowl>?",
        ["<TIME 00:01:10 video 1> to <TIME 01:01:10.5 video 1>", ["salt", "oil"]],
    )
    assert question.question == (
        "Times of video 1 count from 60.00s, where it begins.\n"
        "Where is (100, 500, 1000, 0) at 3.2 s after <pick up bowl>?"
    )
    assert question.options == ("10.0 s to 3610.5 s", "salt, oil")
    both = hd_epic(tmp_path, {"video 1": {"id": "a"}, "video 2": {"id": "b"}}, "At <TIME 0:0:5 video 2>?")
    assert both.question.endswith("\nAt 5.0 s of video 2?") and "count from" not in both.question


def test_hrvideobench_as_it_is_published(tmp_path):
    row = {"path": "frames/clip_1", "video_path": "videos/clip_1.mp4", "category": "object", "qa_type": "x"}
    row |= {"qa": {"question": "Which sign?", "answer": "red"}}
    row["mcq"] = {"correct_option": "B. red", "options": ["A. blue", "B. red", "C. grey"]}
    without = {key: value for key, value in row.items() if key != "video_path"}
    broken = row | {"mcq": {"options": row["mcq"]["options"]}}
    lines = [row, without | {"path": "v/1.mp4"}, broken, {"category": "object"}]
    write(tmp_path, "hrvideobench.jsonl", "\n".join(map(json.dumps, lines)))
    write(tmp_path, "videos/clip_1.mp4", b"")
    questions, problems = read(tmp_path, "hrvideobench")
    assert [q.answer for q in questions] == ["B", "B"] and questions[0].options == ("blue", "red", "grey")
    assert questions[0].request.videos[0]["video"] == str(tmp_path / "videos/clip_1.mp4")
    assert questions[0].request.prompt.startswith("Which sign?\nA. blue\nB. red\nC. grey\n")
    assert [(p.line, p.reason) for p in problems] == [(3, "no correct_option"), (4, "no mcq")]


MME = {"videoID": "v", "duration": "short", "question": "Q?", "options": ["A. x", "B. y"], "answer": "A"}
SRT = "\ufeff1\n00:00:00,900 --> 00:00:01,100\n<i>at one</i>\n\n2\n00:00:01,200 --> 00:00:01,300\nbetween\n\n"


def test_video_mme_shows_the_subtitles_of_the_frames_that_are_shown(tmp_path):
    make_video(tmp_path / "v.mp4", 4, fps=1)  # frames at 0, 1, 2 and 3 s
    write(tmp_path, "videomme.json", [MME | {"question_id": "1"}])
    write(tmp_path, "subtitle/v.srt", SRT + "3\n00:00:02,500 --> 00:00:03,500\nlast\n")
    ((question,), _) = read(tmp_path, "video-mme-subtitles", max_frames=512)
    assert question.question == "This video's subtitles are listed below:\nat one\nlast\n\nQ?"
    (tmp_path / "v.mp4").unlink()  # it will be missed when it is asked; until then all lines stand
    shown.header.cache_clear()
    ((question,), _) = read(tmp_path, "video-mme-subtitles", max_frames=512)
    assert "between" in question.question


def test_longvideobench_moves_its_subtitles_to_the_video_s_clock(tmp_path):
    (tmp_path / "videos").mkdir()
    make_video(tmp_path / "videos" / "x.mp4", 4, fps=1)
    row = {
        "id": "x_0",
        "video_path": "x.mp4",
        "subtitle_path": "x_en.json",
        "question": "Q?",
        "duration": 4.0,
    }
    row |= {"candidates": ["a", "b"], "correct_choice": 1, "duration_group": 15}
    row["starting_timestamp_for_subtitles"] = 100.0
    write(tmp_path, "lvb_val.json", [row])
    said = [{"timestamp": [99.0, 99.4], "text": "before"}, {"timestamp": [100.9, 101.3], "text": "one"}]
    write(tmp_path, "subtitles/x_en.json", [*said, {"timestamp": [102.8, None], "text": "open"}])
    ((question,), problems) = read(tmp_path, "longvideobench", max_frames=256)
    # The last has no end: that of the video, which on its clock lies before its start.
    expected = [[-1.0, 99.4 - 100, "before"], [pytest.approx(0.9), pytest.approx(1.3), "one"]]
    said = question.request.videos[0]["subtitles"]
    assert problems == [] and question.question == "Q?"
    assert said == [*expected, [pytest.approx(2.8), -96.0, "open"]]
    frames = [float(second) for second in range(4)]
    assert between_frames(read_subtitles(said), frames) == ((2, "one"),)
    write(tmp_path, "subtitles/x_en.json", [{"start": "00:01:42.1", "end": "00:01:43.9", "line": "clock"}])
    ((question,), _) = read(tmp_path, "longvideobench", max_frames=256)
    assert question.request.videos[0]["subtitles"] == [[pytest.approx(2.1), pytest.approx(3.9), "clock"]]
    assert question.question == "Q?" and question.answer == "B"
    write(tmp_path, "subtitles/x_en.json", [{"line": "no time"}])
    questions, (problem,) = read(tmp_path, "longvideobench")
    assert questions == [] and "x_en.json holds no subtitles" in problem.reason


def test_hourvideo_shows_pictures_as_options_and_no_future(tmp_path):
    file, content, others, *_ = copy.deepcopy(CASES["hourvideo"])
    for name, data in {file: content, **others}.items():
        write(tmp_path, name, data)
    questions, problems = read(tmp_path, "hourvideo")
    plain, pictures, predictive = questions
    assert problems == [] and "end_time" not in plain.request.videos[0] and not plain.request.images
    assert pictures.request.images == tuple(str(tmp_path / f"images/{i}.png") for i in range(1, 6))
    assert "\nB. <image-2>\n" in pictures.request.prompt and pictures.score("(D)") == 1
    assert predictive.request.videos[0]["end_time"] == 20 * 60 + 5
    del content["uid"]["benchmark_dataset"][2]["relevant_timestamps"]
    write(tmp_path, file, content)
    questions, (problem,) = read(tmp_path, "hourvideo")
    assert len(questions) == 2 and problem.reason == "no relevant_timestamps"


LETTER = "Please answer directly with only the letter of the correct option and nothing else."


@pytest.mark.parametrize(
    ("text", "stem", "options"),
    [
        (f"Which? A. one B. two C. three D. four. {LETTER}", "Which?", ["one", "two", "three", "four."]),
        (f"Which?\nA. one\nB. two\n{LETTER}", "Which?", ["one", "two"]),
        (
            f"Does (A) or (B) point left? A. (A) B. (B) C. both. {LETTER}",
            "Does (A) or (B) point left?",
            ["(A)", "(B)", "both."],
        ),
        ("Which?\n(A) left\n(B) right\nAnswer with the letter.", "Which?", ["left", "right"]),
        ("Which?\nOptions: A: a cat, B: a dog", "Which?", ["a cat", "a dog"]),
        ("Which way? (A) left (B) right", "Which way?", ["left", "right"]),
        ("Which? A. Select the options menu B. Choose", "Which?", ["Select the options menu", "Choose"]),
        ("Are the lines (A) and (B) equal? Answer yes or no.", None, []),
        ("Is vitamin A good?", None, []),
        ("Is A. B. Smith the author?", None, []),
        ("A. only", None, []),
    ],
)
def test_options_in_a_question(text, stem, options):
    assert inline_options(text) == (text if stem is None else stem, options)


def test_options_keep_letters_that_are_theirs():
    assert without_letters(["A. x", "B. y"]) == ["x", "y"]
    assert without_letters(["A. x", "y"]) == ["A. x", "y"]
    assert without_letters(["A", "B"]) == ["A", "B"] and without_letters([["a", "b"], "c"]) == ["a, b", "c"]


def mvbench(task, video):
    return [{"video": video, "question": "Q?", "candidates": ["x", "y"], "answer": "y"}]


def test_mvbench_takes_the_video_of_the_task_s_own_folder(tmp_path):
    for task in ("moving_count", "action_count"):
        write(tmp_path, f"json/{task}.json", mvbench(task, "video_1.mp4"))
    for folder in ("clevrer/video_validation", "perception/videos"):
        write(tmp_path, f"video/{folder}/video_1.mp4", folder.encode())
    questions, problems = read(tmp_path, "mvbench")
    found = {q.category: os.path.relpath(q.request.videos[0]["video"], tmp_path) for q in questions}
    assert problems == [] and found == {
        "moving_count": "video/clevrer/video_validation/video_1.mp4",
        "action_count": "video/perception/videos/video_1.mp4",
    }
    write(tmp_path, "json/action_count.json", mvbench("action_count", "video_2.mp4"))
    for folder in ("one", "two"):  # neither is the authors' folder
        write(tmp_path, f"video/{folder}/video_2.mp4", folder.encode())
    questions, (problem,) = read(tmp_path, "mvbench")
    assert len(questions) == 1 and "have the same name; which one is meant" in problem.reason
    write(tmp_path, "video/two/video_2.mp4", b"one")  # a copy is no other video
    assert len(read(tmp_path, "mvbench")[0]) == 2


def test_mvbench_takes_no_video_of_another_task_s_folder(tmp_path):
    """Where its own was not downloaded: it is missed when it is asked."""
    write(tmp_path, "json/action_count.json", mvbench("action_count", "video_1.mp4"))
    write(tmp_path, "video/clevrer/video_validation/video_1.mp4", b"")
    ((question,), _) = read(tmp_path, "mvbench")
    assert question.request.videos[0]["video"] == str(tmp_path / "perception/videos/video_1.mp4")
    write(tmp_path, "video/elsewhere/video_1.mp4", b"")
    (tmp_path / "video/clevrer/video_validation/video_1.mp4").unlink()
    ((question,), _) = read(tmp_path, "mvbench")
    assert question.request.videos[0]["video"] == str(tmp_path / "video/elsewhere/video_1.mp4")


def test_hallusionbench_takes_no_picture_of_another_folder(tmp_path):
    """Nine of its figures are named `1_1.png`, and so is one of the clone's examples."""
    file, rows, *_ = copy.deepcopy(CASES["hallusionbench"])
    for row in rows:
        row["filename"] = "./VD/math/1_1.png"
    write(tmp_path, file, rows)
    write(tmp_path, "examples/1_1.png", PNG)
    write(tmp_path, "VS/math/1_1.png", PNG)
    questions, problems = read(tmp_path, "hallusionbench")
    assert problems == [] and {p for q in questions for p in q.request.images} == {
        str(tmp_path / "VD/math/1_1.png")
    }
    write(tmp_path, "hallusion_bench/VD/math/1_1.png", PNG)
    questions, _ = read(tmp_path, "hallusionbench")
    assert {p for q in questions for p in q.request.images} == {
        str(tmp_path / "hallusion_bench/VD/math/1_1.png")
    }


def test_ocrbench_takes_no_picture_of_another_set(tmp_path):
    row = {"question": "Text?", "answers": ["x"], "type": "Regular Text Recognition"}
    paths = [f"{name}/imgs/000000229.jpg" for name in ("IC13_857", "IC15_1811")]
    write(tmp_path, "OCRBench.json", [row | {"image_path": path} for path in paths])
    write(tmp_path, f"OCRBench_Images/{paths[0]}", PNG)
    questions, problems = read(tmp_path, "ocrbench")
    shown = [os.path.relpath(question.request.images[0], tmp_path) for question in questions]
    assert problems == [] and shown == [f"OCRBench_Images/{paths[0]}", paths[1]]


def test_an_answer_in_words_is_an_option_even_where_it_is_a_letter(tmp_path):
    """Of readers whose tables have the right option's text; letters are those of other options here."""
    row = {"video": "v.mp4", "question": "Which letter?", "candidates": ["B", "C", "A"]}
    rows = [row | {"answer": answer} for answer in ("A", "B", "D")]
    write(tmp_path / "mvbench", "json/character_order.json", rows)
    write(tmp_path / "mlvu", "json/3_ego.json", [one | {"question_type": "ego"} for one in rows])
    for name in ("mvbench", "mlvu"):
        questions, problems = read(tmp_path / name, name)
        assert problems == [] and [q.answer for q in questions] == ["C", "A", ""], name
        assert questions[2].score("A") == 0  # none is right, as in their scripts
    write(tmp_path / "mvbench", "json/character_order.json", [row | {"answer": None}])
    questions, (problem,) = read(tmp_path / "mvbench", "mvbench")
    assert questions == [] and "no answer" in problem.reason


def test_mlvu_takes_the_video_of_the_task_s_own_folder(tmp_path):
    row = {"video": "1.mp4", "question": "Q?", "candidates": ["x", "y"], "answer": "y"}
    for task, folder in (("ego", "3_ego"), ("count", "4_count")):
        write(tmp_path, f"json/{folder}.json", [row | {"question_type": task}])
        write(tmp_path, f"video/{folder}/1.mp4", folder.encode())
    questions, problems = read(tmp_path, "mlvu")
    assert problems == [] and {q.category: q.request.videos[0]["video"] for q in questions} == {
        "ego": str(tmp_path / "video/3_ego/1.mp4"),
        "count": str(tmp_path / "video/4_count/1.mp4"),
    }


def test_of_two_files_of_a_name_that_beside_the_table_is_meant(tmp_path):
    for split in ("test", "train"):
        write(tmp_path, f"{split}/png/1.png", split.encode())
    write(tmp_path, "test/test_human.json", [{"imgname": "1.png", "query": "Q?", "label": "3"}])
    ((question,), _) = read(tmp_path, "chartqa")
    assert question.request.images == (str(tmp_path / "test/png/1.png"),)


def test_folders_behind_links_are_searched_once(tmp_path):
    write(tmp_path / "elsewhere", "deep/h.mp4", b"")
    table = {
        "path": "h.mp4",
        "qa": {"question": "Q?"},
        "mcq": {"options": ["A. x", "B. y"], "correct_option": "A. x"},
    }
    write(tmp_path / "tables", "hr.jsonl", json.dumps(table))
    write(tmp_path / "set", ".cache/hr.jsonl", "{")  # a download's own notes
    write(tmp_path / "set", "old-run/answers.jsonl", "{")  # an evaluation
    for name in ("tables", "elsewhere"):
        (tmp_path / "set" / name).symlink_to(tmp_path / name)
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "set")  # a link into itself
    questions, problems = read(tmp_path / "set", "hrvideobench")
    assert problems == [] and len(questions) == 1
    assert questions[0].request.videos[0]["video"] == str(tmp_path / "set/elsewhere/deep/h.mp4")


def test_erqa_places_its_pictures_by_characters(tmp_path):
    question = f"Before and after. What moved? A. cup B. pan. {LETTER}"
    row = {"question": question, "answer": "A", "question_type": "State", "question_id": "ERQA_1"}
    png = [{"bytes": b"\x89PNG" + bytes([i]), "path": None} for i in range(2)]
    rows = [row | {"images": png, "visual_indices": at} for at in ([17, 6], [0, 0], [], [17])]
    rows = [one | {"question_id": str(number)} for number, one in enumerate(rows)]
    write(tmp_path, "test.parquet", rows)
    questions, (problem,) = read(tmp_path, "erqa")
    assert [q.question for q in questions] == [
        "Before<image-2> and after.<image-1> What moved?",
        *["Before and after. What moved?"] * 2,
    ]
    assert all(q.options == ("cup", "pan.") and q.answer == "A" for q in questions)
    assert (problem.line, problem.reason) == (4, "1 visual_indices of 2 pictures")
