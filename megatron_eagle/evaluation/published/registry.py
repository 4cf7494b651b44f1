"""The published benchmarks by name: their files, protocol, and what Eagle 2.5 8B scored on them.

Protocol of the paper: 2 fps, at least 8 frames and at most 256 (512 on Video-MME); video frames are one tile
each, but on Perception-Test they are tiled like pictures. Reference scores are those of the paper and of its
repository's table.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron_eagle.evaluation.benchmarks import Question, add_question
from megatron_eagle.evaluation.published import pictures, videos
from megatron_eagle.evaluation.published.source import Source
from megatron_eagle.problems import LedgerEntry


@dataclass(frozen=True)
class Published:
    """One benchmark.

    Attributes:
        files: patterns of its tables; the first that is found counts.
        score: how the questions' scores become one: their `mean`, that of the `categories`' means, that of
            `groups` that are right as a whole, or for `hallusion` the mean of questions, figures and question
            pairs.
        scale: what it is written in parts of.
    """

    files: tuple[str, ...]
    records: Callable[[Source, str, Any], Iterator[dict[str, Any]]]
    reference: float
    score: Literal["mean", "categories", "groups", "hallusion"] = "mean"
    scale: float = 100
    max_frames: int = 256
    frame_tiles: int | None = None

    def questions(self, source: Source) -> tuple[list[Question], list[LedgerEntry]]:
        """Its questions, and a ledger entry for each row that gives none."""
        found: dict[str, Question] = {}
        problems = []
        for number, (table, row) in enumerate(source.rows(*self.files), start=1):
            try:
                records = list(self.records(source, table, row))
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else str(error)
                problems.append(LedgerEntry(table, number, reason, "bad question"))
                continue
            for record in records:
                try:
                    if self.frame_tiles:
                        record |= {"frame_tiles": self.frame_tiles}
                    add_question(found, record, f"{table}, row {number}", number)
                except ValueError as error:
                    problems.append(LedgerEntry(table, number, str(error), "bad question"))
        return list(found.values()), problems


_TABLE = ("*.tsv", "*.parquet", "*.jsonl", "*.json")
_CG = ("cgbench.json", "*.parquet")
# Of tables of several splits the one that is scored: others have answers too, or none.
_HALF = ("*val*.json", "*val*.parquet", "*.parquet")
BENCHMARKS: dict[str, Published] = {
    "video-mme": Published(("*.parquet", "*.json"), videos.video_mme, 72.4, max_frames=512),
    "video-mme-subtitles": Published(
        ("*.parquet", "*.json"), videos.video_mme_subtitles, 75.7, max_frames=512
    ),
    "mvbench": Published(("json/*.json", "*.json"), videos.mvbench, 74.8, "categories"),
    "mlvu": Published(("json/*.json", "*.json"), videos.mlvu, 77.6, "categories"),
    "longvideobench": Published(("lvb_val.json", "*val*.parquet", "*.parquet"), videos.longvideobench, 66.4),
    "egoschema": Published(("questions.json", "*.parquet"), videos.egoschema, 72.2),
    "perception-test": Published(
        ("mc_question_valid.json", "*val*.parquet", "*.parquet"),
        videos.perception_test,
        82.0,
        frame_tiles=12,
    ),
    "cg-bench-clue": Published(_CG, videos.cg_bench_clue, 55.8),
    "cg-bench-long": Published(_CG, videos.cg_bench_long, 46.6),
    "cg-bench-miou": Published(_CG, videos.cg_bench_miou, 13.4),
    "hourvideo": Published(("*annotations*.json", "*.json"), videos.hourvideo, 44.5),
    "charades-sta": Published(("charades_sta_test.txt",), videos.charades_sta, 65.9),
    "hd-epic": Published(("*.json",), videos.hd_epic, 42.9, "categories"),
    "hrvideobench": Published(_TABLE, videos.hrvideobench, 68.5),
    "egoplan": Published(("EgoPlan_validation.json", *_TABLE), videos.egoplan, 45.3),
    "mmb-video": Published(("*.tsv",), videos.mmbench_video, 1.94, scale=3),
    "openeqa": Published(("open-eqa*.json",), videos.openeqa, 63.5),
    "docvqa": Published(_HALF, pictures.docvqa, 94.1),
    "infovqa": Published(_HALF, pictures.docvqa, 80.4),
    "textvqa": Published(_HALF, pictures.textvqa, 83.7),
    "chartqa": Published(("test_*.json", "test*.parquet", "*.parquet"), pictures.chartqa, 87.5, "categories"),
    "ocrbench": Published(("OCRBench.json", "*.parquet"), pictures.ocrbench, 869, scale=1000),
    "mmstar": Published(_TABLE, pictures.multiple_choice, 66.2),
    "realworldqa": Published(_TABLE, pictures.multiple_choice, 76.7),
    "ai2d": Published(_TABLE, pictures.multiple_choice, 84.5),
    "erqa": Published(_TABLE, pictures.multiple_choice, 38.3),
    "mmbench-1.1": Published(("*.tsv",), pictures.mmbench, 81.7, "groups"),
    "mmmu": Published(("*val*.parquet", "*.parquet"), pictures.mmmu, 55.8),
    "mathvista": Published(("testmini.json", "testmini*.parquet", "*.parquet"), pictures.mathvista, 67.8),
    "mm-vet": Published(("mm-vet.json",), pictures.mm_vet, 62.9),
    "hallusionbench": Published(("HallusionBench.json",), pictures.hallusionbench, 54.7, "hallusion"),
}
