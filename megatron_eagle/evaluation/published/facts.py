"""What is known of each published benchmark: how many questions its splits have, and who says so.

Counts are those of the authors' files where these are public, else of their papers or repositories. A split's
media are the different videos or pictures that its questions show; None: nobody says how many.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_eagle.data.media.source import member_ref
from megatron_eagle.evaluation.benchmarks import Question


@dataclass(frozen=True)
class Split:
    """One set of questions by which a benchmark is reported; `source` says who counts so."""

    name: str
    questions: int
    media: int | None
    source: str


@dataclass(frozen=True)
class Facts:
    """What a run of a benchmark is held against.

    Attributes:
        splits: those that can be read and scored here, and those that cannot, but are reported elsewhere.
        reference: the split of the published score; None: its authors do not say which.
        forms: in which a download is read.
        rule: how answers are scored, in a word.
        differs: in what a score here is another one than the authors'; empty: in nothing that is known.
    """

    splits: tuple[Split, ...]
    reference: str | None
    forms: str
    differs: str = ""
    rule: str = "option"

    def split(self, read: int) -> Split:
        """The split that `read` questions are of: the smallest that has so many, else the largest."""
        whole = sorted(self.splits, key=lambda split: split.questions)
        return next((split for split in whole if split.questions >= read), whole[-1])


def _one(name: str, questions: int, media: int | None, source: str, forms: str, differs: str = "") -> Facts:
    return Facts((Split(name, questions, media, source),), name, forms, differs)


_KIT = "VLMEvalKit's TSV"
_JUDGED = "the judge is the model that --judge names"
_MME = "JSON, parquet, " + _KIT
_CG_FILES = "cgbench.json or cgbench_mini.json, " + _KIT
_CG = (
    Split("all", 12_129, 1_219, "CG-Bench's paper"),
    Split("mini", 3_000, 1_118, "CG-Bench/CG-Bench cgbench_mini.json"),
)
_RULES = {
    "cg-bench-open": "judge, 0 or 1",
    "mvbench": "option, mean of tasks",
    "mlvu": "option, mean of tasks",
    "hd-epic": "option, mean of kinds",
    "chartqa": "relaxed accuracy, mean of halves",
    "cg-bench-miou": "temporal IoU",
    "hourvideo-test": "a letter each, for the authors' server",
    "charades-sta": "temporal IoU",
    "mmb-video": "judge, 0 to 3",
    "openeqa": "judge, 1 to 5",
    "mm-vet": "judge, 0 to 1",
    "docvqa": "ANLS",
    "infovqa": "ANLS",
    "textvqa": "VQA accuracy",
    "ocrbench": "text in the answer",
    "realworldqa": "option or text",
    "mmbench-1.1": "option, in every rotation",
    "mmmu": "option or text, MMMU's",
    "mathvista": "MathVista's",
    "hallusionbench": "yes or no, figures and pairs",
}
"""Of those where it is not just the letter or the text of an option."""

_FACTS = {
    "video-mme": _one("all", 2_700, 900, "Video-MME's paper", _MME),
    "video-mme-subtitles": _one(
        "all",
        2_700,
        900,
        "Video-MME's paper",
        _MME,
        "frames' times are read off the file's header",
    ),
    "mvbench": _one(
        "test",
        4_000,
        None,
        "MVBench's paper: 20 tasks of 200",
        "JSON, " + _KIT,
        "folders of frames have to be made into videos first",
    ),
    "mlvu": _one(
        "dev",
        2_175,
        1_242,
        "JUNJIE99/MLVU data/1_plotQA.json to 7_topic_reasoning.json",
        "JSON, parquet, " + _KIT,
    ),
    "longvideobench": _one(
        "val",
        1_337,
        None,
        "LongVideoBench's paper",
        "JSON, parquet, " + _KIT,
    ),
    "egoschema": Facts(
        (
            Split("subset", 500, 500, "egoschema/EgoSchema subset_answers.json"),
            Split("all", 5_031, 5_031, "egoschema/EgoSchema uid_to_ego4d.json"),
        ),
        "all",
        "JSON, parquet",
        "only the subset's answers are public",
    ),
    "perception-test": _one("val", 19_140, None, "Perception Test's paper", "JSON, parquet"),
    "cg-bench-clue": Facts(_CG, None, _CG_FILES),
    "cg-bench-long": Facts(_CG, None, _CG_FILES),
    "cg-bench-miou": Facts(_CG, None, _CG_FILES, "a reply without intervals is 0"),
    "cg-bench-open": Facts(_CG, None, _CG_FILES, _JUDGED),
    "hourvideo": _one(
        "dev",
        1_182,
        50,
        "keshik6/HourVideo README.md",
        "JSON",
        "a question at a time; the test split is hourvideo-test",
    ),
    "hourvideo-test": _one(
        "test",
        11_794,
        450,
        "keshik6/HourVideo README.md, without the dev split",
        "JSON",
        "a question at a time; scored by the authors' server",
    ),
    "charades-sta": _one("test", 3_720, 1_334, "Charades-STA's paper", "text, parquet"),
    "hd-epic": Facts(
        (
            Split(
                "without fine_grained_action_recognition and fine_grained_action_localization",
                6_550,
                156,
                "the other 28 of hd-epic/hd-epic-annotations vqa-benchmark/",
            ),
            Split("all", 26_550, 156, "lmms-eval's tasks/hd_epic/README.md; the paper says 26K"),
        ),
        "all",
        "JSON",
        "times are tenths of seconds, where the authors write whole ones; frames come at 2 a second",
    ),
    "hrvideobench": _one("test", 200, None, "VISTA's paper", "JSON Lines"),
    "egoplan": _one(
        "val",
        3_355,
        None,
        "EgoPlan-Bench's paper",
        "JSON, parquet",
        "one video up to the observation, where the authors show a picture of the observation, too",
    ),
    "mmb-video": _one("test", 1_998, 609, "MMBench-Video's paper", _KIT, _JUDGED),
    "openeqa": _one(
        "all",
        1_636,
        152,
        "facebookresearch/open-eqa data/open-eqa-v0.json",
        "JSON",
        "folders of frames have to be made into videos first; " + _JUDGED,
    ),
    "docvqa": Facts(
        (
            Split("test", 5_188, 1_287, "DocVQA's paper"),
            Split("val", 5_349, 1_286, "DocVQA's paper"),
        ),
        "test",
        "JSON, parquet, " + _KIT,
        "the test split's answers are not public",
    ),
    "infovqa": Facts(
        (
            Split("val", 2_801, 500, "InfographicVQA's paper"),
            Split("test", 3_288, 579, "InfographicVQA's paper"),
        ),
        "test",
        "JSON, parquet, " + _KIT,
        "the test split's answers are not public",
    ),
    "textvqa": _one("val", 5_000, 3_166, "TextVQA's paper", "JSON, parquet, " + _KIT),
    "chartqa": _one("test", 2_500, 1_509, "ChartQA's paper", "JSON, parquet, " + _KIT),
    "ocrbench": _one("test", 1_000, 930, "Yuliang-Liu/MultimodalOCR OCRBench.json", "JSON, parquet, " + _KIT),
    "mmstar": _one("val", 1_500, None, "MMStar's paper", "parquet, " + _KIT),
    "realworldqa": _one("test", 765, None, "xai-org's RealworldQA", "parquet, " + _KIT),
    "ai2d": _one("test", 3_088, None, "lmms-lab's ai2d", "parquet, " + _KIT),
    "erqa": _one("test", 400, None, "embodiedreasoning/ERQA README.md", "TFRecord, parquet, " + _KIT),
    "mmbench-1.1": Facts(
        (Split("dev", 4_876, None, "VLMEvalKit's MMBench_DEV_EN_V11.tsv, with every rotation"),),
        "test",
        "parquet, " + _KIT,
        "the test split's answers are not public",
    ),
    "mmmu": _one(
        "val",
        900,
        None,
        "MMMU-Benchmark/MMMU mmmu/answer_dict_val.json",
        "parquet, " + _KIT,
        "a reply without a letter is guessed by the question's id, not in the order of questions",
    ),
    "mathvista": _one(
        "testmini",
        1_000,
        1_000,
        "lupantech/MathVista data/testmini.json",
        "JSON, parquet, " + _KIT,
        "without --judge answers are read off by rule, not by a language model",
    ),
    "mm-vet": _one("test", 218, None, "yuweihao/MM-Vet results", "JSON, parquet, " + _KIT, _JUDGED),
    "hallusionbench": Facts(
        (
            Split("with figures", 951, 346, "tianyi-lab/HallusionBench; VLMEvalKit's TSV"),
            Split("all", 1_129, 346, "tianyi-lab/HallusionBench HallusionBench.json"),
        ),
        None,
        "JSON, parquet, " + _KIT,
        "a reply with yes and no or neither is wrong, no model is asked what it means",
    ),
}
FACTS: dict[str, Facts] = {
    name: replace(facts, rule=_RULES.get(name, facts.rule)) for name, facts in _FACTS.items()
}
"""By the names of the registry."""


def counts(facts: Facts, questions: Sequence[Question]) -> str:
    """How many questions and media were read, of how many."""
    media = {path for q in questions for path in [*q.request.images, *map(_path, q.request.videos)]}
    missing = sum(member_ref(path) is None and not os.path.exists(path) for path in media)
    split = facts.split(len(questions))
    shown = "" if split.media is None else f" of {split.media:,}"
    lines = [f"{len(questions):,} of {split.questions:,} questions ({split.name}) are read: {split.source}"]
    lines += [f"{len(media):,}{shown} videos or pictures" + (f", {missing:,} are missing" if missing else "")]
    return "\n".join(lines)


def _path(video: str | dict[str, Any]) -> str:
    return video if isinstance(video, str) else str(video["video"])
