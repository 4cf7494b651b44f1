"""Do the stages of examples/qwen3 start, fit and not hang? Rehearsed as `rehearsal_sweep` does."""

from benchmarks.rehearsal_cases import ONE_KIND, Case
from benchmarks.rehearsal_sweep import rehearse_cases
from benchmarks.report import Report

# Preset -> file of examples, and how many H100 its stages are for.
FILES = {
    "eagle2.5-qwen3-8b": ("qwen3/8b.yaml", 64),
    "eagle2.5-qwen3-32b": ("qwen3/32b.yaml", 128),
    "eagle2.5-qwen3-30b-a3b": ("qwen3/30b-a3b.yaml", 64),
}
STAGES = ("stage1", "stage1_5", "stage2_32k", "stage3_64k", "stage4_128k")


def _case(preset: str, stage: str, *overrides: str, gpus: int | None = None) -> Case:
    """A stage on the file's GPUs, or on `gpus`."""
    file, its_own = FILES[preset]
    # With a pipeline: as many microbatches as its virtual stages need.
    microbatches = 2 if preset == "eagle2.5-qwen3-32b" else 1
    name = f"{preset.removeprefix('eagle2.5-')}, {stage}"
    if gpus is not None:
        name = f"{name}, {gpus} GPUs"
    return Case(
        name,
        stage,
        overrides,
        gpus=gpus or its_own,
        preset=preset,
        kinds=ONE_KIND,
        microbatches=microbatches,
        file=file,
    )


CASES = (
    *(_case(preset, stage) for preset in FILES for stage in STAGES),
    # 32 data parallel ranks: the file's 16 packs of 128K a step are too few.
    _case("eagle2.5-qwen3-8b", "stage4_128k", "training.global_batch_size=32", gpus=256),
    _case("eagle2.5-qwen3-32b", "stage2_32k", gpus=256),
    _case("eagle2.5-qwen3-30b-a3b", "stage2_32k", gpus=256),
)


def run(kept: str | None = None, case: str | None = None) -> Report:
    """As `rehearsal_sweep.rehearse_cases`, of `CASES`."""
    return rehearse_cases(CASES, kept, case)
