"""The published benchmarks by name: their files, protocol, and what Eagle 2.5 8B scored on them.

Protocol of the paper: 2 fps, at least 8 frames and at most 256 (512 on Video-MME); video frames are one tile
each, but on Perception-Test they are tiled like pictures. Reference scores are those of the paper and of its
repository's table.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.benchmarks import Question, add_question
from megatron_eagle.evaluation.published import documents, first_person, pictures, videos
from megatron_eagle.evaluation.published.rows import Items, by_name, of_videos, one, under
from megatron_eagle.evaluation.published.shown import share_frames
from megatron_eagle.evaluation.published.source import Source
from megatron_eagle.problems import LedgerEntry

_BAD = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, UserError)


@dataclass(frozen=True)
class Published:
    """One benchmark.

    Attributes:
        files: patterns of its tables, `|` between those that belong together; the first that is found counts.
        records: reads a question of a table.
        items: gives the questions that a row of a table holds.
        lines: a question may be a line of text.
        score: how the questions' scores become one: their `mean`, that of the `categories`' means, that of
            `groups` that are right as a whole, or for `hallusion` the mean of questions, figures and question
            pairs; of `elsewhere` the answers are not known here.
        reference: Eagle 2.5 8B's score; None where it has none.
        scale: what it is written in parts of.
    """

    files: tuple[str, ...]
    records: Callable[[Source, str, Any], Iterator[dict[str, Any]]]
    reference: float | None
    score: Literal["mean", "categories", "groups", "hallusion", "elsewhere"] = "mean"
    scale: float = 100
    max_frames: int = 256
    frame_tiles: int | None = None
    items: Items = one
    lines: bool = False

    def questions(self, source: Source) -> tuple[list[Question], list[LedgerEntry]]:
        """Its questions, and a ledger entry for each row that gives none."""
        found: dict[str, Question] = {}
        problems = []
        for path in source.tables(*self.files):
            items = (item for row in source.rows(path) for item in self.items(row))
            for number, item in enumerate(items, start=1):
                try:
                    for record in self._records(source, path.stem, item):
                        named = {"id": f"{path.stem}:{number}"} | record
                        add_question(found, named, f"{path.stem}, row {number}", number)
                except _BAD as error:
                    reason = f"no {error.args[0]}" if isinstance(error, KeyError) else str(error)
                    problems.append(LedgerEntry(path.stem, number, reason, "bad question"))
        return list(found.values()), problems

    def _records(self, source: Source, table: str, item: Any) -> list[dict[str, Any]]:
        """All records of an item, or an error: a part of them would count as the whole.

        Raises:
            ValueError: as a reader raises, and for what is no object.
        """
        if not isinstance(item, dict) and not (isinstance(item, str) and self.lines):
            raise ValueError(f"an object was expected, not {type(item).__name__}")
        records = list(self.records(source, table, item))
        for record in records:
            record["videos"] = share_frames(record.get("videos") or [], source.fps, source.max_frames)
            if self.frame_tiles:
                record["frame_tiles"] = self.frame_tiles
        return records


# TSVs by their names: VLMEvalKit keeps those of all benchmarks in one folder.
_MME = ("Video-MME.tsv", "*.parquet", "*.json")
_CG = ("cgbench.json", "cgbench_mini.json", "CG-Bench_MCQ_Grounding*.tsv", "*.parquet")
_BY_TASK = ("json/*.json", "*.json", "*.parquet")
# Of tables of several splits the one that is scored: others have answers too, or none.
_HALF = ("*val*.parquet", "*.parquet")
_OF_DATA = under("data")
BENCHMARKS: dict[str, Published] = {
    "video-mme": Published(_MME, videos.video_mme, 72.4, max_frames=512, items=under("questions")),
    "video-mme-subtitles": Published(
        _MME, videos.video_mme_subtitles, 75.7, max_frames=512, items=under("questions")
    ),
    "mvbench": Published(("MVBench*.tsv", *_BY_TASK), videos.mvbench, 74.8, "categories"),
    "mlvu": Published(("MLVU_MCQ.tsv", *_BY_TASK), videos.mlvu, 77.6, "categories"),
    "longvideobench": Published(("lvb_val.json", "LongVideoBench.tsv", *_HALF), videos.longvideobench, 66.4),
    "egoschema": Published(("questions.json", "*.parquet"), first_person.egoschema, 72.2),
    "perception-test": Published(
        ("mc_question_valid.json", *_HALF),
        videos.perception_test,
        82.0,
        frame_tiles=12,
        items=of_videos("question", "video_name", "mc_question"),
    ),
    "cg-bench-clue": Published(_CG, videos.cg_bench_clue, 55.8),
    "cg-bench-long": Published(_CG, videos.cg_bench_long, 46.6),
    "cg-bench-miou": Published(_CG, videos.cg_bench_miou, 13.4),
    "cg-bench-open": Published(
        ("cgbench.json", "cgbench_mini.json", "CG-Bench_OpenEnded*.tsv", "*.parquet"),
        videos.cg_bench_open,
        None,
    ),
    "hourvideo": Published(
        ("dev*annotations*.json", "*annotations*.json", "*.json"),
        first_person.hourvideo,
        44.5,
        items=of_videos("question", "video_uid", "benchmark_dataset"),
    ),
    "hourvideo-test": Published(
        ("test*annotations*.json", "*test*.json"),
        first_person.hourvideo_test,
        41.8,
        "elsewhere",
        items=of_videos("question", "video_uid", "benchmark_dataset"),
    ),
    "charades-sta": Published(
        ("charades_sta_test.txt", "*test*.parquet", "*.parquet"),
        videos.charades_sta,
        65.9,
        lines=True,
    ),
    "hd-epic": Published(
        ("vqa-benchmark/*.json", "|".join(f"{kind}_*.json" for kind in first_person.HD_EPIC)),
        first_person.hd_epic,
        42.9,
        "categories",
        items=by_name("inputs", "name"),
    ),
    "hrvideobench": Published(("*.jsonl", "*.parquet"), videos.hrvideobench, 68.5),
    "egoplan": Published(("EgoPlan_validation.json", *_HALF), first_person.egoplan, 45.3),
    "mmb-video": Published(("MMBench-Video.tsv",), videos.mmbench_video, 1.94, scale=3),
    "openeqa": Published(("data/open-eqa-v0.json", "open-eqa-v0.json"), first_person.openeqa, 63.5),
    "docvqa": Published(
        ("val_v1.0_withQT.json", "DocVQA_VAL.tsv", "DocVQA/*val*.parquet", *_HALF),
        documents.docvqa,
        94.1,
        items=_OF_DATA,
    ),
    "infovqa": Published(
        ("infographicsVQA_val*.json", "InfographicVQA/*val*.parquet", "InfoVQA_VAL.tsv", *_HALF),
        documents.infovqa,
        80.4,
        items=_OF_DATA,
    ),
    "textvqa": Published(
        ("TextVQA*val*.json", "TextVQA_VAL.tsv", *_HALF), documents.textvqa, 83.7, items=_OF_DATA
    ),
    "chartqa": Published(
        ("test_human.json|test_augmented.json", "ChartQA_TEST.tsv", "test*.parquet", "*.parquet"),
        documents.chartqa,
        87.5,
        "categories",
    ),
    "ocrbench": Published(
        ("OCRBench.json", "OCRBench.tsv", "*.parquet"), documents.ocrbench, 869, scale=1000
    ),
    "mmstar": Published(("MMStar.tsv", "*.parquet"), pictures.multiple_choice, 66.2),
    "realworldqa": Published(("RealWorldQA.tsv", "*.parquet"), pictures.multiple_choice, 76.7),
    "ai2d": Published(("AI2D_TEST.tsv", "*.parquet"), pictures.multiple_choice, 84.5),
    "erqa": Published(("*.tfrecord*", "ERQA.tsv", "*.parquet"), pictures.erqa, 38.3),
    "mmbench-1.1": Published(("MMBench_DEV_EN_V11.tsv", "*.parquet"), pictures.mmbench, 81.7, "groups"),
    "mmmu": Published(("MMMU_DEV_VAL.tsv", *_HALF), pictures.mmmu, 55.8),
    "mathvista": Published(
        ("testmini.json", "MathVista_MINI.tsv", "testmini*.parquet", "*.parquet"),
        pictures.mathvista,
        67.8,
        items=by_name("question", "pid"),
    ),
    "mm-vet": Published(
        ("mm-vet.json", "MMVet.tsv", "*.parquet"), pictures.mm_vet, 62.9, items=by_name("question", "name")
    ),
    "hallusionbench": Published(
        ("HallusionBench.json", "HallusionBench.tsv", "*image*.parquet", "*.parquet"),
        pictures.hallusionbench,
        54.7,
        "hallusion",
    ),
}
