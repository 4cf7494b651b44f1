"""The TSVs of VLMEvalKit, as small as `published_cases`, with the columns that they have."""

from tests.evaluation.published_cases import PNG64
from tests.evaluation.published_forms import AB, CHOICE, LVB

CG = {"qid": 7, "video_uid": "v", "question": "Q", "choices": ["p", "q"], "domain": "life"}

# Benchmark -> file, rows, other files, an answer to each question, the score (in parts of the scale).
KIT = {
    "video-mme": (
        "Video-MME.tsv",
        [
            {"index": 0, "video": "abc", "video_path": "./video/abc.mp4", "duration": "short"}
            | {"candidates": str(AB), "question": "Colour?", "answer": "B"}
        ],
        {"video/abc.mp4": b""},
        ["B"],
        100,
    ),
    "mvbench": (
        "MVBench.tsv",
        [
            {"index": 0, "task_type": "Moving Count", "prefix": "x", "video": "a.mp4", "start": "", "end": ""}
            | {"question": "How many?", "candidates": "['2', '3']", "answer": "3"}
        ],
        {"video/perception/videos/a.mp4": b"", "video/clevrer/video_validation/a.mp4": b"own"},
        ["B"],
        100,
    ),
    "mlvu": (
        "MLVU_MCQ.tsv",
        [
            {
                "index": 0,
                "task_type": "ego",
                "prefix": "x",
                "duration": 9,
                "video": "m.mp4",
                "question": "Who?",
            }
            | {"answer": "you", "candidates": "['I', 'you']"}
        ],
        {"MLVU/video/3_ego/m.mp4": b""},
        ["B"],
        100,
    ),
    "longvideobench": (
        "LongVideoBench.tsv",
        [LVB | {"video_path": "./videos/x.mp4", "candidates": "['a cat', 'a dog']"}],
        {"videos/x.mp4": b""},
        ["B"],
        100,
    ),
    "cg-bench-long": ("CG-Bench_MCQ_Grounding_Mini.tsv", [], {"cg_videos_720p/v.mp4": b""}, ["B"], 0),
    "cg-bench-clue": ("CG-Bench_MCQ_Grounding_Mini.tsv", [], {"cg_videos_720p/v.mp4": b""}, ["A"], 100),
    "cg-bench-miou": ("CG-Bench_MCQ_Grounding.tsv", [], {"v.mp4": b""}, ["5 to 10, 20 to 25 s"], 50),
    "cg-bench-open": (
        "CG-Bench_OpenEnded_Mini.tsv",
        [
            {"index": 0, "video_uid": "v", "video": "cg_videos_720p/v.mp4", "qid": 7, "domain": "life"}
            | {"question": "Q", "answer": "white", "clue_intervals": "[[1, 2]]"}
        ],
        {"cg_videos_720p/v.mp4": b""},
        ["judge: 1"],
        100,
    ),
    "docvqa": ("DocVQA_VAL.tsv", [{"index": 1, "question": "Name?", "answer": "['Ann Lee']", "image": PNG64}])
    + ({}, ["ann lee"], 100),
    "infovqa": ("InfoVQA_VAL.tsv", [{"index": 1, "question": "Share?", "answer": "['20%']", "image": PNG64}])
    + ({"DocVQA_VAL.tsv": b"of another benchmark"}, ["20%"], 100),
    "textvqa": (
        "TextVQA_VAL.tsv",
        [{"index": 5, "question": "Brand?", "answer": str(["nokia"] * 10), "image": PNG64}],
        {},
        ["Nokia"],
        100,
    ),
    "chartqa": (
        "ChartQA_TEST.tsv",
        [
            {"index": i, "question": "Total?", "answer": "['100']", "split": f"test_{kind}", "image": image}
            for i, kind, image in ((0, "human", PNG64), (1, "augmented", "0"))
        ],
        {},
        ["104", "200"],
        50,
    ),
    "ocrbench": (
        "OCRBench.tsv",
        [
            {"index": 0, "question": "Text?", "answer": "['CENTRE']", "category": "Regular Text Recognition"}
            | {"image": PNG64}
        ],
        {},
        ["centre"],
        1000,
    ),
    "realworldqa": ("RealWorldQA.tsv", [CHOICE | {"answer": "D", "image": PNG64}], {}, ["D"], 100),
    "ai2d": ("AI2D_TEST.tsv", [CHOICE | {"answer": "D", "image": PNG64}], {}, ["A"], 0),
    "mmmu": (
        "MMMU_DEV_VAL.tsv",
        [
            {
                "index": i,
                "question": "See <image 1> and <image 2>?",
                "A": a,
                "B": b,
                "answer": right,
                "split": split,
            }
            | {"category": "Art", "image": f"['{PNG64}', '{PNG64}']"}
            for i, a, b, right, split in (
                (1, "yes", "no", "B", "dev"),
                (2, "yes", "no", "B", "validation"),
                (3, "", "", "8", "validation"),
            )
        ],
        {},
        ["B", "8"],
        100,
    ),
    "mathvista": (
        "MathVista_MINI.tsv",
        [
            {
                "index": 2,
                "question": "Which?",
                "image": PNG64,
                "choices": "['145', '90']",
                "unit": "",
                "precision": "",
            }
            | {"answer": "145", "answer_option": "A", "question_type": "multi_choice", "answer_type": "text"}
            | {"task": "g"}
        ],
        {},
        ["(B) 90"],
        0,
    ),
    "mm-vet": (
        "MMVet.tsv",
        [{"index": "v1_0", "image": PNG64, "question": "x?", "answer": "2<OR>two", "category": "ocr,math"}],
        {},
        ["judge: 1"],
        100,
    ),
    "hallusionbench": (
        "HallusionBench.tsv",
        [
            {
                "index": f"VD_figure_x_0_{figure}_{asked}",
                "category": "VD",
                "l2-category": "figure",
                "image": image,
            }
            | {"question": "Q?", "answer": "Yes"}
            for figure, asked, image in ((1, 0, PNG64), (2, 0, "VD_figure_x_0_1_0"), (1, 1, PNG64))
        ],
        {},
        ["yes", "no", "yes"],
        (2 / 3 + 1 / 2 + 1 / 2) / 3 * 100,
    ),
}
MODES = {"long_acc": "A", "clue_acc": "A", "miou": "[[0, 10], [20, 30]]"}
for _name in ("cg-bench-long", "cg-bench-clue", "cg-bench-miou"):
    KIT[_name][1].extend(
        {"index": i, **CG, "choices": str(CG["choices"]), "answer": answer, "task_mode": mode}
        | {"clue_intervals": "[[1, 2], [5, 9]]" if mode == "clue_acc" else ""}
        for i, (mode, answer) in enumerate(MODES.items())
    )
