"""What `bench.py rehearsal_sweep` rehearses: the stages of progressive.yaml and unlike layouts."""

import json
from dataclasses import dataclass
from functools import cached_property

from benchmarks.report import REPO

from megatron_eagle.rehearsal.packs import PACK_KINDS, MadeUp
from megatron_eagle.rehearsal.rehearsal import RehearsalPlan
from megatron_eagle.rehearsal.settings import read_runs_without_data
from megatron_eagle.training.run_config import RunConfig

FILE = "eagle2.5-8b/progressive.yaml"
TWO_KINDS = ("one document", "no picture")  # most unlike each other
ONE_KIND = TWO_KINDS[:1]  # for layouts that another case has with more


@dataclass(frozen=True)
class Case:
    """A run on GPUs. Ranks of its first and its last stage are rehearsed as they are, all are matched."""

    name: str
    stage: str  # of the file
    overrides: tuple[str, ...] = ()
    gpus: int = 64
    gpu: str = "h100"
    preset: str = "eagle2.5-8b"
    kinds: tuple[str, ...] = TWO_KINDS  # of packs, dealt to data parallel ranks in turn
    microbatches: int = 1
    file: str = FILE  # in examples

    @cached_property
    def config(self) -> RunConfig:
        """Its run."""
        runs = read_runs_without_data(
            str(REPO / "examples" / self.file),
            self.overrides,
            stage=self.stage,
            gpus=self.gpus,
            preset=self.preset,
        )
        return runs[self.stage]

    @property
    def has_to_wait(self) -> bool:
        """Whether the host waits within a microbatch whatever the code does."""
        return self.config.parallel.batch_p2p_sync or self.config.model.text.experts is not None

    def plan(self) -> RehearsalPlan:
        """What is rehearsed of it."""
        config, stages = self.config, self.config.layout.pipeline_model_parallel_size
        return RehearsalPlan.of(
            config,
            self.gpu,
            self.gpus,
            ranks=[stage * self.gpus // stages for stage in sorted({0, stages - 1})],
            microbatches=self.microbatches,
            open_loader=MadeUp(config.model, self.kinds),
            pack_classes=len(self.kinds),
        )


def _parallel(**sizes: object) -> str:
    """`parallel` anew, in the letters of the planner's table."""
    words = {
        "tp": "tensor_model_parallel_size",
        "sp": "sequence_parallel",
        "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "cp": "context_parallel_size",
        "ulysses": "ulysses_parallel_size",
        "comm": "context_parallel_comm",
        "vision": "vision_sharding",
    }
    return f"parallel={json.dumps({words.get(name, name): value for name, value in sizes.items()})}"


CASES = (
    Case("stage1: connector", "stage1", kinds=ONE_KIND),
    Case("stage1_5: all parts, 32K", "stage1_5", kinds=ONE_KIND),
    Case("stage2_32k: mixed packs", "stage2_32k", kinds=PACK_KINDS, microbatches=2),
    Case("stage3_64k: offload", "stage3_64k", kinds=ONE_KIND),
    Case("stage4_128k: offload, encoder recomputed", "stage4_128k"),
    Case(
        "pipeline of own ends, p2p sync, core_attn and mlp recomputed",
        "stage2_32k",
        (
            _parallel(
                pp=4,
                cp=2,
                vision="cp",
                num_layers_in_first_pipeline_stage=6,
                num_layers_in_last_pipeline_stage=6,
                batch_p2p_sync=True,
            ),
            "recompute={language: selective, recompute_modules: [core_attn, mlp], vision: full}",
        ),
        gpu="h200",
        microbatches=4,
    ),
    Case(
        "interleaved pipeline, parameters gathered in step",
        "stage2_32k",
        (
            _parallel(
                pp=4,
                vpp=7,
                cp=2,
                vision="cp",
                overlap_grad_reduce=True,
                overlap_param_gather=True,
                align_param_gather=True,
            ),
            "recompute={language: selective, vision: full}",
        ),
        gpu="h200",
        microbatches=4,
    ),
    Case(
        "pipeline in letters, bf16 gradients",
        "stage2_32k",
        (
            _parallel(
                tp=2,
                sp=True,
                pp=2,
                cp=2,
                vision="cp_tp",
                pipeline_model_parallel_layout="Et*5|t*8|t*8|t*7L",
                grad_reduce_in_fp32=False,
            ),
            "recompute={language: full, vision: full}",
        ),
        gpu="a100",
        microbatches=2,
    ),
    Case(
        "Ulysses 4 of CP8, mlp recomputed",
        "stage2_32k",
        (
            _parallel(cp=8, ulysses=4, vision="cp"),
            "recompute={language: selective, recompute_modules: [mlp]}",
        ),
        gpu="h200",
    ),
    Case(
        "ring of CP8, no vision sharding, core_attn recomputed",
        "stage3_64k",
        (_parallel(cp=8, comm="ring", vision="none"), "recompute={language: selective, vision: full}"),
        gpu="h200",
    ),
    Case(
        "ring of nodes x Ulysses 2 of CP16, all layers offloaded",
        "stage4_128k",
        (
            _parallel(cp=16, ulysses=2, comm="ring", ring_node_size=4, vision="cp"),
            "recompute={language: offload, offload_keep_last: 0, vision: full}",
        ),
        gpus=128,
        gpu="h200",
    ),
    Case(
        "keys by ranges, zigzag",
        "stage2_32k",
        (_parallel(cp=4, comm="ranges", context_parallel_layout="zigzag", vision="cp"),),
        gpu="b200",
    ),
    Case(
        "four packs of 256K a sequence of 1M, 256 GPUs",
        "stage4_128k",
        (
            "data.length=262144",
            "data.packs_per_sequence=4",
            "training.global_batch_size=64",
            _parallel(tp=4, sp=True, cp=2, vision="cp"),
        ),
        gpus=256,
        gpu="h200",
    ),
    Case(
        "two packs a sequence, keys gathered",
        "stage2_32k",
        (
            "data.packs_per_sequence=2",
            _parallel(tp=2, sp=True, cp=2, comm="gather", vision="cp_tp"),
            "recompute={swiglu: true}",
        ),
    ),
    Case(
        "LoRA",
        "stage2_32k",
        ("lora={rank: 16, alpha: 32}", _parallel(tp=2, sp=True, cp=2, vision="cp_tp")),
    ),
    Case(
        "LoRA, everything recomputed",
        "stage3_64k",
        (
            "lora={rank: 64, alpha: 32}",
            _parallel(cp=4, vision="cp"),
            "recompute={language: full, vision: full}",
        ),
    ),
    Case(
        "frozen language model",
        "stage2_32k",
        ("optimizer.trainable=[vision, connector]", _parallel(cp=4, vision="cp")),
        gpu="h200",
    ),
    Case(
        "frozen encoder, parameters gathered in the forward",
        "stage2_32k",
        (
            "optimizer.trainable=[language, connector]",
            _parallel(tp=2, sp=True, cp=2, vision="cp", overlap_grad_reduce=True, overlap_param_gather=True),
        ),
        microbatches=2,
    ),
    Case(
        "new rows and connector",
        "stage2_32k",
        (
            "optimizer.trainable=[new_token_rows, connector]",
            "optimizer.first_new_token=151669",
            _parallel(tp=2, sp=True, cp=2, vision="cp_tp"),
        ),
    ),
    Case(
        "TP4 without SP or vision sharding, plain loss",
        "stage2_32k",
        (_parallel(tp=4, vision="none"), "layers.loss=plain", "recompute={language: full, vision: full}"),
    ),
    Case(
        "loss into the buffer, not deterministic, plain torch's norms",
        "stage2_32k",
        (
            _parallel(tp=2, sp=True, cp=2, vision="cp_tp"),
            "layers={loss_into_main_grad: true, kernels: eager}",
            "training.deterministic=false",
        ),
        gpu="h200",
    ),
    Case(
        "1B on L40S, data parallel alone",
        "stage2_32k",
        (_parallel(), "recompute={language: full, vision: full}"),
        gpus=16,
        gpu="l40s",
        preset="eagle2.5-1b",
    ),
    Case(
        "1,024 GPUs: TP2 x PP2 x CP4",
        "stage2_32k",
        (
            "training.global_batch_size=512",
            _parallel(tp=2, sp=True, pp=2, cp=4, vision="cp", overlap_grad_reduce=True),
        ),
        gpus=1024,
        microbatches=2,
    ),
)
