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


def _case(preset: str, stage: str) -> Case:
    file, gpus = FILES[preset]
    # With a pipeline: as many microbatches as its virtual stages need.
    microbatches = 2 if preset == "eagle2.5-qwen3-32b" else 1
    name = f"{preset.removeprefix('eagle2.5-')}, {stage}"
    return Case(name, stage, gpus=gpus, preset=preset, kinds=ONE_KIND, microbatches=microbatches, file=file)


CASES = tuple(_case(preset, stage) for preset in FILES for stage in STAGES)


def run(kept: str | None = None, case: str | None = None) -> Report:
    """As `rehearsal_sweep.rehearse_cases`, of `CASES`."""
    return rehearse_cases(CASES, kept, case)
