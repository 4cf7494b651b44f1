"""A small table of every published benchmark as its authors write it, with answers and their score."""

import base64
import csv
import json

import pyarrow as pa
import pyarrow.parquet as parquet

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
    "cg-bench-open": (
        "cgbench.json",
        [
            {"video_uid": "v", "qid": 7, "question": "Q", "answer": "white", "choices": ["p"]}
            | {"clue_intervals": [[1, 2]], "domain": "life"},
            {"video_uid": "v", "qid": 8, "question": "Q", "answer": "black", "choices": ["p"]}
            | {"clue_intervals": [[1, 2]], "domain": "life"},
        ],
        {"cg_videos_720p/v.mp4": b""},
        ["judge: 0", "judge: 1"],
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
                    {"qid": "q2", "task": "navigation/room_to_room_image", "question": "Q"}
                    | {f"answer_{i}": f"images/{i}.png" for i in range(1, 6)}
                    | {"correct_answer_label": "D"},
                    {"qid": "q3", "task": "reasoning/predictive", "question": "Q"}
                    | {f"answer_{i}": f"a{i}" for i in range(1, 6)}
                    | {"correct_answer_label": "A", "relevant_timestamps": "00:20:05 - 00:21:00"},
                ]
            }
        },
        {"videos/uid.mp4": b""} | {f"images/{i}.png": PNG for i in range(1, 6)},
        ["D", "(D)", "B"],
        200 / 3,
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
    """A file in a form that its name tells; rows of a .parquet are objects."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(content), path)
    elif path.suffix == ".tsv" and isinstance(content, list):
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(content[0]), delimiter="\t")
            table.writeheader()
            table.writerows(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
