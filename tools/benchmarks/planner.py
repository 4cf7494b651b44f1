"""The planner's memory beside the rehearsed peak, by part, and predicted steps: progressive.yaml and others.

Every row is a rank of Eagle2.5-8B at full depth, on 64 GPUs unless it says so, in packs of one long document,
half of it tiles. `tests/planning/test_rehearsed_peaks.py` holds the formula to the card. Seconds and MFU are
predicted from the rehearsed step (`rehearsal/timeline.py`) on H100 and H200, where one stage is all.
"""

from typing import Any

from benchmarks.report import REPO, Report, progress

from megatron_eagle.model.flops import training_flops
from megatron_eagle.planning.rates import Machine
from megatron_eagle.rehearsal.formula import sequence_memory
from megatron_eagle.rehearsal.memory import Peak
from megatron_eagle.rehearsal.packs import MadeUp, made_up_pack
from megatron_eagle.rehearsal.session import Job, run_jobs
from megatron_eagle.rehearsal.settings import read_runs_without_data
from megatron_eagle.rehearsal.timeline import StepRecord, timelines, whole_step
from megatron_eagle.runtime.gpus import find_gpu
from megatron_eagle.training.run_config import RunConfig

FILE = REPO / "examples" / "eagle2.5-8b" / "progressive.yaml"
PRESET, GPUS, GPU, KIND = "eagle2.5-8b", 64, "h100", "one document"
ENCODER = "encoder and connector, packs of 1K on 4 GPUs"  # fullest where their gradients are summed
FEWER = {ENCODER: 4}  # GPUs of a case
PREDICTED = ("h100", "h200")  # of the same die: what is rehearsed for one holds for both
_PP4 = "parallel={pipeline_model_parallel_size: 4, context_parallel_size: 4, vision_sharding: cp}"
_CP8 = "parallel={context_parallel_size: 8, %s, vision_sharding: cp}"
# Name -> stage of the file, and what is set otherwise.
CASES: dict[str, tuple[str, list[str]]] = {
    "connector only": ("stage1", []),
    "all parts, 32K": ("stage1_5", []),
    "all parts, 32K, mixed": ("stage2_32k", []),
    "offload, 64K": ("stage3_64k", []),
    "offload, recomputed encoder, 128K": ("stage4_128k", []),
    "TP4 + SP without CP, 128K": (
        "stage4_128k",
        ["parallel={tensor_model_parallel_size: 4, sequence_parallel: true, vision_sharding: cp_tp}"],
    ),
    "TP4 without SP, encoder on TP, full": (
        "stage2_32k",
        [
            "parallel={tensor_model_parallel_size: 4, vision_sharding: none}",
            "recompute={language: full, vision: full}",
        ],
    ),
    "PP4, selective": ("stage2_32k", [_PP4, "recompute={language: selective, vision: full}"]),
    "PP4 x VPP7": (
        "stage2_32k",
        [
            "parallel={pipeline_model_parallel_size: 4, virtual_pipeline_model_parallel_size: 7, "
            "context_parallel_size: 8, vision_sharding: cp}",
            "recompute={vision: full}",
        ],
    ),
    "SwiGLU recompute, loss into the buffer": (
        "stage2_32k",
        ["recompute={swiglu: true}", "layers.loss_into_main_grad=true"],
    ),
    "plain loss": ("stage2_32k", ["layers.loss=plain"]),
    "ring, selective": (
        "stage3_64k",
        [_CP8 % "context_parallel_comm: ring", "recompute={language: selective}"],
    ),
    "Ulysses 4 of CP8": ("stage2_32k", [_CP8 % "ulysses_parallel_size: 4"]),
    "Ulysses 8, full": ("stage3_64k", [_CP8 % "ulysses_parallel_size: 8", "recompute={language: full}"]),
    "LoRA": ("stage2_32k", ["lora={rank: 16, alpha: 32}"]),
    "LoRA, full": (
        "stage3_64k",
        ["lora={rank: 64, alpha: 32}", "recompute={language: full, vision: full}"],
    ),
    "frozen language model": ("stage2_32k", ["optimizer.trainable=[vision, connector]"]),
    ENCODER: (
        "stage2_32k",
        [
            "parallel={tensor_model_parallel_size: 2, vision_sharding: cp_tp}",
            "optimizer.trainable=[vision, connector]",
            "recompute={language: full, vision: full}",
            "data.length=1024",
        ],
    ),
    "new rows and connector": (
        "stage2_32k",
        ["optimizer.trainable=[new_token_rows, connector]", "optimizer.first_new_token=151669"],
    ),
}


def run() -> Report:
    """Rehearse the first and the last stage of every case, two ranks at a time."""
    places = []
    for name, (stage, overrides) in CASES.items():
        config = read_case(stage, overrides, gpus_of(name))
        stages = config.layout.pipeline_model_parallel_size
        places += [(name, config, number) for number in sorted({0, stages - 1})]
    jobs = [_job(config, number, gpus_of(name)) for name, config, number in places]

    def told(number: int, _: Any) -> None:
        progress(f"{places[number][0]}, stage {places[number][2]}")

    reports = run_jobs(jobs, 2, told)
    rows = []
    for (name, config, number), job, report in zip(places, jobs, reports, strict=True):
        if report.failure is not None:
            raise RuntimeError(f"{name}: {report.failure}")
        peak = max(report.peaks.values(), key=lambda peak: peak.nbytes)
        row = _row(name, config, number, job.microbatches, peak)
        rows.append(row | predicted(config, job.microbatches, report.step, gpus_of(name)))
    worst = max(abs(row["error %"]) for row in rows)
    title = f"planned and rehearsed peak memory of {PRESET} on {GPUS} {GPU}, GB; at most {worst:.1f} % apart"
    return Report(title, rows)


def gpus_of(name: str) -> int:
    """Of a case."""
    return FEWER.get(name, GPUS)


def read_case(stage: str, overrides: list[str], gpus: int = GPUS) -> RunConfig:
    """The run of a case."""
    return read_runs_without_data(str(FILE), overrides, stage=stage, gpus=gpus, preset=PRESET)[stage]


def planned(config: RunConfig, stage: int, microbatches: int, gpus: int = GPUS) -> dict[str, Any]:
    """The planner's parts of a pipeline stage's peak in GB, as `rehearsed` names them, and its moment."""
    packs = MadeUp(config.model, (KIND,)).packs(config.data, 0, 0)
    memory = sequence_memory(config, GPU, gpus, stage, microbatches, packs)
    passing = memory.activations + memory.vision + memory.logits + memory.workspace
    return {
        "weights": memory.weights / 1e9,
        "gradients": memory.gradients / 1e9,
        "optimizer": memory.optimizer / 1e9,
        "the rest": passing / 1e9,
        "moment": memory.moment,
    }


def rehearsed(peak: Peak) -> dict[str, float]:
    """Its parts in GB."""
    kinds = {
        "weights": ("parameters",),
        "gradients": ("gradients",),
        "optimizer": ("main parameters", "moments"),
        "the rest": ("activations and workspaces",),
    }
    return {name: sum(peak.by_kind.get(kind, 0) for kind in parts) / 1e9 for name, parts in kinds.items()}


def predicted(
    config: RunConfig, rehearsed: int, step: StepRecord | None, gpus: int = GPUS
) -> dict[str, float | str]:
    """Seconds of a whole step and MFU in percent on each type in `PREDICTED`; "-" for part of a pipeline."""
    pack = made_up_pack(config.model, config.data.length, KIND, 0)
    count = config.training.global_batch_size
    model = training_flops(
        config.model,
        tokens=count * config.data.length,
        sum_squared_lengths=count * pack.document_bounds[1] ** 2,
        tiles=count * pack.n_tiles,
        trainable=config.optimizer.trainable,
        adapters=config.lora is not None,
    ).total
    found: dict[str, float | str] = {}
    for name in PREDICTED:
        seconds: float | str = "-"
        mfu: float | str = "-"
        if step is not None:
            machine = Machine.of(find_gpu(name), attention=config.layers.attention)
            microbatches = count // config.layout.data_parallel_size(gpus)
            seconds = whole_step(timelines([step], machine), rehearsed, microbatches)
            mfu = 100 * model / (gpus * machine.peak * seconds)
        found |= {f"predicted s, {name}": seconds, f"predicted MFU %, {name}": mfu}
    return found


def _job(config: RunConfig, stage: int, gpus: int) -> Job:
    stages = config.layout.pipeline_model_parallel_size
    per_replica = config.training.global_batch_size // config.layout.data_parallel_size(gpus)
    count = min(per_replica, 2 * stages) if stages > 1 else 1
    loader = MadeUp(config.model, (KIND,))
    return Job(config, GPU, stage * gpus // stages, gpus, loader, count, timeline=stages == 1)


def _row(name: str, config: RunConfig, stage: int, microbatches: int, peak: Peak) -> dict[str, Any]:
    parts, plan = rehearsed(peak), planned(config, stage, microbatches, gpus_of(name))
    moment = plan.pop("moment")
    total = sum(plan.values())
    return {
        "case": name,
        "pipeline stage": stage,
        "microbatches": microbatches,
        **parts,
        "rehearsed": peak.nbytes / 1e9,
        "planned": total,
        "error %": 100 * (1e9 * total / peak.nbytes - 1),
        "planned at": moment,
    }
