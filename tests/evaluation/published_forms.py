"""What `huggingface-cli download` brings of benchmarks: parquet, archives of videos, ERQA's TFRecord.

As small as `published_cases`, with the columns that the files have.
"""

import io
import struct
import tarfile
import zipfile

from tests.evaluation.published_cases import PNG

PICTURE = {"bytes": PNG, "path": None}
AB = ["A. red", "B. blue"]
MOVIE = b"no video, but bytes that are looked for " * 9


def zipped(**members):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


def tarred(mode="w", **members):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def varint(value):
    data = b""
    while value >= 0x80:
        data, value = data + bytes([value & 0x7F | 0x80]), value >> 7
    return data + bytes([value])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def tfrecord(*examples):
    """Examples of features: lists of bytes, or of integers, packed as TensorFlow packs them."""
    data = b""
    for example in examples:
        features = b""
        for name, values in example.items():
            if all(isinstance(value, int) for value in values):
                feature = field(3, field(1, b"".join(map(varint, values))))
            else:
                feature = field(1, b"".join(field(1, value) for value in values))
            features += field(1, field(1, name.encode()) + field(2, feature))
        message = field(1, features)
        data += struct.pack("<QI", len(message), 0) + message + bytes(4)
    return data


ERQA = (
    "Before and after. What moved? A. cup B. pan. Answer directly with only the letter of the correct option."
)
DOC = {"questionId": "1", "question": "Name?", "image": PICTURE, "answers": ["Ann Lee"]}
CHOICE = {"index": 3, "question": "Which?", "A": "cat", "B": "dog", "C": "cow", "D": "pig", "category": "c"}
MATH = {"pid": "1", "question": "How far?", "image": "images/1.jpg", "decoded_image": PICTURE, "unit": "m"}
MATH |= {"choices": None, "precision": 1.0, "answer": "1.2", "question_type": "free_form"}
MATH |= {"answer_type": "float", "metadata": {"task": "g", "skills": ["x"]}}
HALLUSION = {"category": "VD", "subcategory": "chart", "visual_input": "1", "set_id": "0", "figure_id": "1"}
HALLUSION |= {
    "question_id": "0",
    "question": "Q?",
    "gt_answer": "1",
    "filename": "./VD/0_1.png",
    "image": PICTURE,
}
MMMU = {"id": "validation_Art_3", "question": "See <image 1>?", "options": "['yes', 'no']", "answer": "B"}
MMMU |= {"question_type": "multiple-choice", "image_1": PICTURE, "image_2": None}
VIDEO_MME = {
    "videoID": "abc",
    "duration": "short",
    "question_id": "001-1",
    "question": "Colour?",
    "answer": "B",
}
LVB = {
    "id": "x_0",
    "video_path": "x.mp4",
    "subtitle_path": "x_en.json",
    "question": "What?",
    "duration_group": 15,
}
LVB |= {"correct_choice": 1, "duration": 9.0, "starting_timestamp_for_subtitles": 0.0}

# Benchmark -> file, rows, other files, an answer to each question, the score (in parts of the scale).
HUB = {
    "video-mme": (
        "videomme/test-00000-of-00001.parquet",
        [VIDEO_MME | {"options": AB}],
        {"videos_chunked_01.zip": zipped(**{"data/abc.mp4": MOVIE})},
        ["B"],
        100,
    ),
    "mlvu": (
        "data/test-00000-of-00001.parquet",
        [{"video_name": "ego_1.mp4", "question": "Who?\n(A) I\n(B) you", "answer": "B", "task_type": "ego"}],
        {"videos.tar": tarred(**{"videos/ego_1.mp4": MOVIE})},
        ["(B) you"],
        100,
    ),
    "longvideobench": (
        "data/validation-00000-of-00001.parquet",
        [LVB | {"option0": "a cat", "option1": "a dog", "option2": "N/A", "option3": None, "option4": None}],
        {
            "videos.tar": tarred(**{"videos/x.mp4": MOVIE}),
            "subtitles.tar": tarred(**{"subtitles/x_en.json": b"[]"}),
        },
        ["B"],
        100,
    ),
    "egoschema": (
        "Subset/test-00000-of-00001.parquet",
        [
            {
                "question_idx": "0",
                "question": "Why?",
                "video_idx": "u1",
                "option": list("vwxyz"),
                "answer": "4",
            }
        ],
        {"videos_chunked_01.zip": zipped(**{"videos/u1.mp4": MOVIE})},
        ["E"],
        100,
    ),
    "perception-test": (
        "mc_question_val/validation-00000-of-00001.parquet",
        [
            {"video_name": "video_10", "question_id": "0", "question": "Does it?", "answer_id": "1"}
            | {"options": ["yes", "no", "maybe"], "area": "physics"}
        ],
        {"videos.tar.gz": tarred("w:gz", **{"video_10.mp4": MOVIE})},
        ["B"],
        100,
    ),
    "charades-sta": (
        "data/test-00000-of-00001.parquet",
        [{"video": "AB.mp4", "caption": "person sits.", "timestamp": [0.0, 10.0]}],
        {"Charades_v1_480.zip": zipped(**{"Charades_v1_480/AB.mp4": MOVIE})},
        ["5 - 15"],
        5 / 15 * 100,
    ),
    "hrvideobench": (
        "data/test-00000-of-00001.parquet",
        [
            {"path": "h.mp4", "category": "object", "qa": {"question": "What?", "answer": "blue"}}
            | {"mcq": {"options": AB, "correct_option": "B. blue"}}
        ],
        {"videos.zip": zipped(**{"videos/h.mp4": MOVIE})},
        ["B"],
        100,
    ),
    "egoplan": (
        "data/validation-00000-of-00001.parquet",
        [
            {
                "sample_id": 115,
                "task_goal": "store",
                "answer": "C",
                **{f"choice_{c}": f"do {c}" for c in "abcd"},
            }
        ],
        {"115.mp4": b""},
        ["C"],
        100,
    ),
    "docvqa": ("DocVQA/validation-00000-of-00006.parquet", [DOC | {"docId": "1"}], {}, ["ann lee"], 100),
    "infovqa": (
        "InfographicVQA/validation-00000-of-00006.parquet",
        [DOC | {"operation/reasoning": []}],
        {},
        ["no"],
        0,
    ),
    "textvqa": (
        "data/validation-00000-of-00003.parquet",
        [
            {
                "question_id": 5,
                "question": "Brand?",
                "image_id": "f0",
                "image": PICTURE,
                "answers": ["nokia"] * 10,
            }
        ],
        {"data/test-00000-of-00003.parquet": b"no table, and not looked at"},
        ["Nokia"],
        100,
    ),
    "chartqa": (
        "data/test-00000-of-00001.parquet",
        [
            {"image": PICTURE, "query": "Total?", "label": ["100"], "human_or_machine": 0},
            {"image": PICTURE, "query": "Low?", "label": ["Yes"], "human_or_machine": 1},
        ],
        {"data/train-00000-of-00003.parquet": b"no table, and not looked at"},
        ["104", "no"],
        50,
    ),
    "ocrbench": (
        "data/test-00000-of-00001.parquet",
        [
            {
                "dataset": "I",
                "question": "Text?",
                "question_type": "Regular Text Recognition",
                "image": PICTURE,
            }
            | {"answer": ["CENTRE"]}
        ],
        {},
        ["The word is centre."],
        1000,
    ),
    "mmstar": (
        "mmstar.parquet",
        [
            {"index": 0, "question": "Which?\nOptions: A: cat, B: dog, C: cow, D: pig", "answer": "D"}
            | {"image": PICTURE, "category": "c"}
        ],
        {},
        ["D"],
        100,
    ),
    "realworldqa": (
        "data/test-00000-of-00002.parquet",
        [
            {"image": PICTURE, "question": f"Which? {asked}", "answer": answer}
            for asked, answer in (
                (
                    "\n\nA. left\nB. right\nPlease answer directly with only the letter of the option.",
                    "B",
                ),
                ("Please answer directly with a single word or number.", "two"),
            )
        ],
        {},
        ["B", "Two."],
        100,
    ),
    "ai2d": (
        "data/test-00000-of-00002.parquet",
        [{"question": "Which?", "options": ["3", "0", "1"], "answer": "1", "image": PICTURE}],
        {},
        ["B"],
        100,
    ),
    "erqa": (
        "data/erqa.tfrecord",
        tfrecord(
            {"question": [ERQA.encode()], "answer": [b"A"], "image/encoded": [PNG, b"\xff\xd8\xffx"]}
            | {"question_type": [b"State"], "visual_indices": [6, 17]},
            {"question": [ERQA.encode()], "answer": [b"B"], "image/encoded": [PNG], "visual_indices": [0]},
        ),
        {},
        ["A", "A"],
        50,
    ),
    "mmbench-1.1": (
        "data/dev-00000-of-00001.parquet",
        [CHOICE | {"answer": "B", "hint": "nan", "D": "nan", "image": PICTURE}],
        {},
        ["dog", "dog", "dog"],
        100,
    ),
    "mmmu": ("Art/validation-00000-of-00001.parquet", [MMMU], {}, ["(B)"], 100),
    "mathvista": ("data/testmini-00000-of-00001.parquet", [MATH], {}, ["It is 1.23 m"], 100),
    "mm-vet": (
        "data/test-00000-of-00001.parquet",
        [
            {
                "question_id": "v1_0",
                "image": PICTURE,
                "question": "x?",
                "answer": "2",
                "capability": "ocr,math",
            }
        ],
        {},
        ["judge: 0.4"],
        40,
    ),
    "hallusionbench": (
        "data/image-00000-of-00001.parquet",
        [HALLUSION],
        {
            "data/non_image-00000-of-00001.parquet": [
                HALLUSION | {"visual_input": "0", "question_id": "1", "image": None}
            ]
        },
        ["Yes", "no"],
        (1 / 2 + 1 / 2 + 1) / 3 * 100,
    ),
}
