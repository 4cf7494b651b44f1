"""Every published form: a small file written by hand, its questions, and a score worked out by hand."""

import base64
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

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
PNG64 = base64.b64encode(PNG).decode()
AB = ["A. red", "B. blue"]

# Benchmark -> file, content, other files, an answer to each question, the score (in parts of the scale).
CASES = {
    "video-mme": (
        "videomme.json",
        [
            {
                "video_id": "001",
                "duration": "short",
                "domain": "K",
                "videoID": "abc",
                "questions": [
                    {"question_id": "001-1", "question": "Colour?", "options": AB, "answer": "B"},
                    {"question_id": "001-2", "question": "Shade?", "options": AB, "answer": "A"},
                ],
            }
        ],
        {"data/abc.mp4": b""},
        ["B", "B"],
        50,
    ),
    "mvbench": (
        "json/action_count.json",
        [
            {"video": "a.mp4", "question": "How many?", "candidates": ["2", "3"], "answer": "3", "start": 1.5}
            | {"end": 4},
            {"video": "b.webm", "question": "How many?", "candidates": ["2", "3"], "answer": "2"},
        ],
        {
            "video/perception/a.mp4": b"",
            "json/scene.json": b'[{"video": "a.mp4", "question": "Where?", '
            b'"candidates": ["in", "out"], "answer": "in"}]',
        },
        ["B", "B", "A"],
        75,  # (1/2 + 1) / 2
    ),
    "mlvu": (
        "json/1_plotQA.json",
        [
            {
                "video": "m.mp4",
                "duration": 9.0,
                "question": "Who?",
                "candidates": ["I", "you"],
                "answer": "you",
            }
            | {"question_type": "plotQA"},
            {"video": "m.mp4", "question": "Summarise", "answer": "Text", "question_type": "summary"},
        ],
        {"video/1_plotQA/m.mp4": b""},
        ["(B) you"],
        100,
    ),
    "hrvideobench": (
        "hrvideobench.jsonl",
        "\n".join(
            json.dumps(
                {"path": "h.mp4", "category": "object", "qa_type": "x"}
                | {
                    "qa": {"question": question, "answer": "a"},
                    "mcq": {"options": AB, "correct_option": right},
                }
            )
            for question, right in (("What?", "B. blue"), ("Who?", "A. red"))
        ),
        {"videos/h.mp4": b""},
        ["B", "B. blue"],
        50,
    ),
    "longvideobench": (
        "lvb_val.json",
        [
            {"id": "x_0", "video_path": "x.mp4", "subtitle_path": "x_en.json", "question": "What?"}
            | {"candidates": ["a cat", "a dog", "a cow"], "correct_choice": 2, "duration_group": 600}
        ],
        {"videos/x.mp4": b"", "subtitles/x_en.json": b'[{"start": "00:01", "end": "00:02", "line": "Moo."}]'},
        ["C"],
        100,
    ),
    "egoschema": (
        "questions.json",
        [
            {"q_uid": "u1", "question": "Why?", **{f"option {i}": f"reason {i}" for i in range(5)}},
            {"q_uid": "u2", "question": "Why?", **{f"option {i}": f"reason {i}" for i in range(5)}},
        ],
        {"subset_answers.json": b'{"u1": 4}', "videos/u1.mp4": b""},
        ["E"],
        100,
    ),
    "perception-test": (
        "mc_question_valid.json",
        {
            "video_10": {
                "mc_question": [
                    {"id": 0, "question": "Does it?", "options": ["yes", "no", "maybe"], "answer_id": 1}
                    | {"area": "physics", "reasoning": "descriptive", "tag": []}
                ],
                "metadata": {"video_id": "video_10"},
            }
        },
        {"videos/video_10.mp4": b""},
        ["B"],
        100,
    ),
    "cg-bench-clue": (
        "cgbench.json",
        [
            {"video_uid": "v", "qid": 7, "question": "Q", "choices": ["p", "q"], "right_answer": "A"}
            | {"clue_intervals": [[1, 2], [5, 9]], "domain": "life", "sub_category": "s", "duration": 60}
        ],
        {"cg_videos_720p/v.mp4": b""},
        ["B"],
        0,
    ),
    "cg-bench-miou": (
        "cgbench.json",
        [
            {"video_uid": "v", "qid": 7, "question": "Q", "choices": ["p", "q"], "right_answer": "A"}
            | {"clue_intervals": [[0, 10], [20, 30]], "domain": "life"}
        ],
        {"cg_videos_720p/v.mp4": b""},
        ["5 to 10, 20 to 25 seconds"],  # covers 10 of 20
        50,
    ),
    "hourvideo": (
        "dev_v1.0_annotations.json",
        {
            "uid": {
                "benchmark_dataset": [
                    {"qid": "q1", "task": "summarization", "question": "Q"}
                    | {f"answer_{i}": f"a{i}" for i in range(1, 6)}
                    | {"correct_answer_label": "D"},
                    {"qid": "q2", "task": "navigation", "question": "Q"}
                    | {f"answer_{i}": f"{i}.png" for i in range(1, 6)}
                    | {"correct_answer_label": "D"},
                ]
            }
        },
        {"videos/uid.mp4": b""},
        ["D"],
        100,
    ),
    "charades-sta": (
        "charades_sta_test.txt",
        "3MSZA 24.3 30.4##person turn a light on.\nAB 0.0 10.0##person sits.\n",
        {"3MSZA.mp4": b""},
        ["24.3 to 30.4", "5 - 15"],
        (1 + 5 / 15) / 2 * 100,
    ),
    "hd-epic": (
        "fine_grained_how_recognition.json",
        {
            "fine_0": {
                "inputs": {"video 1": {"id": "P01-1", "start_time": "00:01:02.5", "end_time": "00:01:04"}},
                "question": "How at <TIME 00:01:03.0 video 1>?",
                "choices": ["slowly", "fast"],
                "correct_idx": 1,
            }
        },
        {"Videos/P01/P01-1.mp4": b""},
        ["fast"],
        100,
    ),
    "egoplan": (
        "EgoPlan_validation.json",
        [
            {"sample_id": 115, "video_source": "EpicKitchens", "video_id": "P01_13", "task_goal": "store"}
            | {"question": "Next?", **{f"choice_{c}": f"do {c}" for c in "abcd"}, "golden_choice_idx": "C"}
        ],
        {"115.mp4": b""},
        ["C"],
        100,
    ),
    "mmb-video": (
        "MMBench-Video.tsv",
        "index\tvideo\tvideo_type\tquestion\tanswer\tdimensions\tvideo_path\n"
        "0\tzz_processed\tNews\tWhat?\tA storm\t['CP']\t./video/zz_processed.mp4\n",
        {"video/zz_processed.mp4": b""},
        ["judge: 2"],
        2,
    ),
    "openeqa": (
        "open-eqa-v0.json",
        [
            {"question": "Where?", "answer": "Sofa", "extra_answers": ["Couch"], "question_id": "e1"}
            | {"category": "spatial", "episode_history": "hm3d-v0/000-hm3d-A"}
        ],
        {"frames/hm3d-v0/000-hm3d-A.mp4": b""},
        ["judge: 5"],
        100,
    ),
    "docvqa": (
        "val_v1.0_withQT.json",
        {
            "dataset_name": "docvqa",
            "data": [
                {"questionId": 1, "question": "Name?", "image": "documents/p_1.png", "answers": ["Ann Lee"]},
                {"questionId": 2, "question": "Town?", "image": "documents/p_1.png", "answers": ["kitten"]},
            ],
        },
        {"documents/p_1.png": PNG},
        ["ann  lee", "sitten"],
        (1 + 5 / 6) / 2 * 100,
    ),
    "textvqa": (
        "TextVQA_0.5.1_val.json",
        {
            "data": [
                {
                    "question_id": 5,
                    "question": "Brand?",
                    "image_id": "f0",
                    "answers": ["nokia"] * 3 + ["x"] * 7,
                }
            ]
        },
        {"train_images/f0.jpg": b""},
        ["Nokia"],
        # without one of the three: 2/3; without another: 1
        (3 * 2 / 3 + 7) / 10 * 100,
    ),
    "chartqa": (
        "test_human.json",
        [
            {"imgname": "1.png", "query": "Total?", "label": "100"},
            {"imgname": "1.png", "query": "Peak?", "label": "2010"},
        ],
        {"png/1.png": PNG, "test_augmented.json": b'[{"imgname": "1.png", "query": "Low?", "label": "Yes"}]'},
        ["no", "104", "2200"],
        25,  # augmented 0, human 1/2
    ),
    "ocrbench": (
        "OCRBench.json",
        [
            {"dataset_name": "I", "image_path": "I/1.jpg", "question": "Text?", "answers": ["CENTRE"]}
            | {"type": "Regular Text Recognition"},
            {"dataset_name": "H", "image_path": "H/2.jpg", "question": "Formula?", "answers": "x ^ 2 + Y"}
            | {"type": "Handwritten Mathematical Expression Recognition"},
        ],
        {"I/1.jpg": b""},
        ["The word is centre.", "$x^2+y$"],
        500,
    ),
    "infovqa": (
        "infographicsVQA_val_v1.0_withQT.json",
        {
            "dataset_name": "infographicVQA",
            "data": [
                {
                    "questionId": 9,
                    "question": "Share?",
                    "image_local_name": "9.jpeg",
                    "answers": ["20%", "20"],
                }
            ],
        },
        {"images/9.jpeg": PNG},
        ["20"],
        100,
    ),
    "erqa": (
        "ERQA.tsv",
        "index\tcategory\timage\tquestion\tanswer\n"
        f'0\tAction\t["{PNG64}", "{PNG64}"]\t<image> then <image> which? A. left B. right. Please answer '
        "directly with only the letter of the correct option and nothing else.\tB\n",
        {},
        ["B"],
        100,
    ),
    "mmstar": (
        "MMStar.tsv",
        "index\tquestion\tA\tB\tC\tD\tanswer\tcategory\tl2_category\timage\n"
        f"0\tWhich?\tcat\tdog\tcow\tpig\tD\tcoarse\tx\t{PNG64}\n",
        {},
        ["pig"],
        100,
    ),
    "mmbench-1.1": (
        "MMBench_DEV_EN_V11.tsv",
        "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsplit\n"
        f"4\tWhich?\tLook.\tcat\tdog\tcow\t\tB\tattribute\t{PNG64}\tdev\n"
        "1000004\tWhich?\tLook.\tdog\tcow\tcat\t\tA\tattribute\t4\tdev\n"
        f"5\tWhich?\t\tcat\tdog\t\t\tA\tattribute\t{PNG64}\tdev\n",
        {},
        ["dog", "dog", "dog", "A", "A"],  # all turns of the first, one of two of the second
        50,
    ),
    "mm-vet": (
        "mm-vet.json",
        {
            "v1_0": {
                "imagename": "v1_0.png",
                "question": "x?",
                "answer": "2<OR>two",
                "capability": ["ocr", "math"],
            }
        },
        {"images/v1_0.png": PNG},
        ["judge: 0.4"],
        40,
    ),
    "hallusionbench": (
        "HallusionBench.json",
        [
            {"category": "VD", "subcategory": "chart", "visual_input": v, "set_id": "0", "figure_id": f}
            | {"question_id": q, "question": f"Q{q}?", "gt_answer": a, "filename": f"./VD/0_{f}.png"}
            for v, f, q, a in [
                ("1", "1", "0", "1"),
                ("1", "1", "1", "0"),
                ("1", "2", "0", "0"),
                ("0", "0", "0", "1"),
            ]
        ],
        {"hallusion_bench/VD/0_1.png": PNG},
        ["Yes.", "yes", "No", "Yes"],
        # answers 3/4; figures with pictures: 1 wrong, 2 right: 1/2; questions: 0 right, 1 wrong: 1/2
        (3 / 4 + 1 / 2 + 1 / 2) / 3 * 100,
    ),
    "mathvista": (
        "testmini.json",
        {
            "1": {
                "question": "How far?",
                "image": "images/1.jpg",
                "choices": None,
                "unit": "m",
                "precision": 1.0,
            }
            | {
                "answer": "1.2",
                "question_type": "free_form",
                "answer_type": "float",
                "metadata": {"task": "g"},
            },
            "2": {
                "question": "Which?",
                "image": "images/1.jpg",
                "choices": ["145°", "90°"],
                "precision": None,
            }
            | {"answer": "145°", "question_type": "multi_choice", "answer_type": "text"}
            | {"metadata": {"task": "g"}},
        },
        {"images/1.jpg": b""},
        ["It is 1.23 m", "(B) 90°"],
        50,
    ),
}


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


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
    refused = {"egoschema": "no answer to compare", "hourvideo": "options are pictures"}
    assert [p.reason for p in problems] == ([] if name not in refused else [problems[0].reason])
    assert all(refused[name] in p.reason for p in problems)
    judge = Judge(_Marks()) if any(q.metric in SCALES for q in questions) else None
    scored = [(q, q.score(text, judge)) for q, text in zip(questions, answers, strict=True)]
    assert overall(BENCHMARKS[name], scored) == pytest.approx(score)
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
    questions, _ = read(tmp_path, "hallusionbench")  # as a --limit may leave them
    scored = list(zip(questions, (1.0, 0.0), strict=True))
    assert overall(BENCHMARKS["hallusionbench"], scored) == 50


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
    own = {"mmmu", "video-mme-subtitles", "cg-bench-long"}
    tried = {BENCHMARKS[name].records for name in {*CASES, *own}}
    assert {name for name, published in BENCHMARKS.items() if published.records not in tried} == set()
