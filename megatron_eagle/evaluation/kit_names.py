"""What lmms-eval 0.7.3 and VLMEvalKit call the published benchmarks, and VLMEvalKit's classes of videos.

`make test-kits` looks each name up in the kits themselves.
"""

import re
from dataclasses import dataclass
from typing import Any

from megatron_eagle.errors import UserError

KITS = ("lmms-eval", "vlmevalkit")


@dataclass(frozen=True)
class KitNames:
    """A benchmark's name in each kit; None where a kit has not the same questions."""

    lmms_eval: str | None = None
    vlmevalkit: str | None = None


# By the names of `evaluate list`.
NAMES = {
    "video-mme": KitNames("videomme", "Video-MME"),
    "video-mme-subtitles": KitNames("videomme_w_subtitle", "Video-MME_subs"),
    "mvbench": KitNames("mvbench", "MVBench"),
    "mlvu": KitNames("mlvu_dev", "MLVU_MCQ"),
    "longvideobench": KitNames("longvideobench_val_v", "LongVideoBench"),
    "egoschema": KitNames("egoschema_subset"),
    "perception-test": KitNames("perceptiontest_val_mc"),
    "cg-bench-clue": KitNames(None, "CG-Bench_MCQ_Grounding"),
    "cg-bench-long": KitNames("cgbench", "CG-Bench_MCQ_Grounding"),
    "cg-bench-miou": KitNames(None, "CG-Bench_MCQ_Grounding"),
    "cg-bench-open": KitNames(None, "CG-Bench_OpenEnded"),
    "hourvideo": KitNames(),
    "hourvideo-test": KitNames(),
    "charades-sta": KitNames("temporal_grounding_charades"),
    "hd-epic": KitNames("hd_epic"),
    "hrvideobench": KitNames(),
    "egoplan": KitNames("egoplan"),
    "mmb-video": KitNames(None, "MMBench-Video"),
    "openeqa": KitNames(),
    "docvqa": KitNames("docvqa_val", "DocVQA_VAL"),
    "infovqa": KitNames("infovqa_val", "InfoVQA_VAL"),
    "textvqa": KitNames("textvqa_val", "TextVQA_VAL"),
    "chartqa": KitNames("chartqa", "ChartQA_TEST"),
    "ocrbench": KitNames("ocrbench", "OCRBench"),
    "mmstar": KitNames("mmstar", "MMStar"),
    "realworldqa": KitNames("realworldqa", "RealWorldQA"),
    "ai2d": KitNames("ai2d", "AI2D_TEST"),
    "erqa": KitNames("erqa", "ERQA"),
    "mmbench-1.1": KitNames(None, "MMBench_DEV_EN_V11"),
    "mmmu": KitNames("mmmu_val", "MMMU_DEV_VAL"),
    "mathvista": KitNames("mathvista_testmini", "MathVista_MINI"),
    "mm-vet": KitNames("mmvet", "MMVet"),
    "hallusionbench": KitNames("hallusion_bench_image", "HallusionBench"),
}

# VLMEvalKit takes a number of frames for these. Pictures go by name: the kit knows their classes itself, and
# two of them (ERQA, MMMU_Pro) lose the data set's name when they are configured as a dictionary.
VIDEO_CLASSES: dict[str, dict[str, Any]] = {
    "Video-MME": {"class": "VideoMME"},
    "MVBench": {"class": "MVBench"},
    "MVBench_MP4": {"class": "MVBench_MP4"},
    "MMBench-Video": {"class": "MMBenchVideo", "pack": False},
    "MLVU": {"class": "MLVU"},
    "MLVU_MCQ": {"class": "MLVU_MCQ"},
    "MLVU_OpenEnded": {"class": "MLVU_OpenEnded"},
    "LongVideoBench": {"class": "LongVideoBench"},
    "CG-Bench_MCQ_Grounding": {"class": "CGBench_MCQ_Grounding"},
    "CG-Bench_MCQ_Grounding_Mini": {"class": "CGBench_MCQ_Grounding_Mini"},
    "CG-Bench_OpenEnded": {"class": "CGBench_OpenEnded"},
    "CG-Bench_OpenEnded_Mini": {"class": "CGBench_OpenEnded_Mini"},
    "VideoMMMU": {"class": "VideoMMMU"},
    "TempCompass": {"class": "TempCompass"},
}
_WITH_SUBTITLES = ("Video-MME", "LongVideoBench", "CG-Bench")


def named_by_kit(kit: str, task: str) -> str:
    """The kit's own name of `task`, which may be one of `evaluate list`.

    Raises:
        UserError: the kit has no such benchmark.
    """
    if task not in NAMES:
        return task
    name = NAMES[task].lmms_eval if kit == "lmms-eval" else NAMES[task].vlmevalkit
    if name is None:
        others = ", ".join(
            n for n, k in NAMES.items() if (k.lmms_eval if kit == "lmms-eval" else k.vlmevalkit)
        )
        raise UserError(f"{task}: not in {kit}; of the published benchmarks it has {others}")
    return name


def video_setting(task: str, max_frames: int) -> dict[str, Any] | None:
    """VLMEvalKit's setting of a task with videos; None of a task with pictures.

    A task is named `Video-MME`, `Video-MME_64frame`, `Video-MME_subs` or `Video-MME_64frame_subs`. It is
    empty for the other names with which the kit brings its own settings, as `Video-MME_1fps`.

    Raises:
        UserError: it looks like one of the videos and is none.
    """
    found = re.fullmatch(r"(.+?)(?:_(\d+)frame)?(_subs)?", task)
    if found and found[1] in VIDEO_CLASSES:
        name, frames, subtitles = found.groups()
        if subtitles and not name.startswith(_WITH_SUBTITLES):
            raise UserError(f"{task}: VLMEvalKit has no subtitles for {name}")
        setting = {**VIDEO_CLASSES[name], "dataset": name, "nframe": int(frames or max_frames)}
        return {**setting, "use_subtitle": True} if subtitles else setting
    if re.search(r"_\d+frame|_[\d.]+fps", task):
        return {}
    if task.startswith(tuple(VIDEO_CLASSES)):
        raise UserError(f"{task}: unknown to VLMEvalKit; of videos it has {', '.join(VIDEO_CLASSES)}")
    return None
