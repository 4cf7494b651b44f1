"""Small runs whose rehearsed messages are those of a gloo run, and of their lines in the budget file."""

from dataclasses import dataclass, field, replace
from typing import Any

from megatron_eagle.model.lora import LoraConfig
from megatron_eagle.model.specs import RecomputeConfig
from megatron_eagle.training.run_config import RunConfig
from tests.parallel.cases import cell
from tests.rehearsal.runs import replace_in, small_run

_U2 = {"context_parallel_size": 2, "ulysses_parallel_size": 2}


@dataclass(frozen=True)
class Cell:
    """A layout of the parity table, its packs a sequence included, and what differs from it."""

    layout: str
    what: str = ""
    parallel: dict[str, Any] = field(default_factory=dict)
    trainable: tuple[str, ...] = ()
    recompute: RecomputeConfig | None = None
    lora: bool = False

    def __str__(self) -> str:
        return f"{self.layout}; {self.what}" if self.what else self.layout

    @property
    def world_size(self) -> int:
        return cell(self.layout).world_size

    @property
    def config(self) -> RunConfig:
        """Its run."""
        layout = cell(self.layout)
        config = small_run(layout.parallel | self.parallel, text=layout.text)
        config = replace_in(
            config,
            recompute=self.recompute or RecomputeConfig(),
            lora=LoraConfig(rank=4) if self.lora else None,
            data=replace(config.data, packs_per_sequence=layout.packs),
        )
        if self.trainable:
            optimizer = replace(config.optimizer, trainable=self.trainable)
            config = replace_in(config, optimizer=optimizer)
        return config


CELLS = [
    # Layouts of every axis.
    Cell("TP2+SP x CP2, cp_tp"),
    Cell("PP2 x VPP2, none"),
    Cell("TP2+SP, cp_tp"),
    Cell("PP4, none"),
    Cell("DP4 overlapped, none"),
    Cell("DP2 x CP2 overlapped, cp"),
    Cell("CP2 with padded documents, zigzag_per_document"),
    Cell("CP4, balanced", "ranges", {"context_parallel_comm": "ranges"}),
    Cell(
        "CP4, cp", "keys gathered", {"context_parallel_comm": "gather", "context_parallel_layout": "zigzag"}
    ),
    Cell("Ring 4, zigzag_per_document"),
    Cell("TP2+SP x ring 2, balanced"),
    Cell("TP2+SP x CP2, balanced", "Ulysses 2", _U2),
    Cell("TP2+SP x Ulysses 2 x CP2, balanced"),
    Cell("Ulysses 2 x gather 2 x ring 2, balanced"),
    Cell("TP2+SP x PP2 x VPP2 x CP2, cp"),
    # Several packs a sequence.
    Cell("2 packs a sequence, CP1 x DP2"),
    Cell("2 packs a sequence, CP2"),
    Cell("2 packs a sequence, CP1 x PP2"),
    Cell("2 packs a sequence, Ulysses 2 x ring 2"),
    # Every vision sharding, with and without divided tokens.
    Cell("TP2, cp_tp"),
    Cell("TP2 x CP2, none"),
    Cell("TP2 x CP2, cp"),
    Cell("TP2 x CP2, cp_tp"),
    Cell("TP2+SP x CP2, none"),
    Cell("TP2+SP x CP2, cp"),
    # Parts that do not train.
    Cell("TP2+SP x CP2, cp_tp", "connector alone", trainable=("connector",)),
    Cell("TP2+SP x CP2, cp_tp", "tower alone", trainable=("vision",)),
    Cell("PP2 x CP2, balanced", "connector alone", trainable=("connector",)),
    Cell("PP4, none", "frozen tower", trainable=("connector", "language")),
    Cell("PP2 x VPP2, none", "frozen tower", trainable=("connector", "language")),
    Cell("TP2+SP x CP2, cp_tp", "LoRA", lora=True),
    Cell("PP2 x VPP2, none", "LoRA", lora=True),
    Cell("DP2 overlapped, none", "LoRA", lora=True),
    # What backward computes again.
    Cell("TP2+SP x CP2, cp_tp", "recompute full", recompute=RecomputeConfig("full", "full")),
    Cell("TP2+SP x CP2, cp_tp", "recompute selective", recompute=RecomputeConfig("selective")),
    Cell(
        "TP2+SP x ring 2, balanced",
        "recompute of attention and MLP",
        recompute=RecomputeConfig("selective", recompute_modules=("core_attn", "mlp")),
    ),
    Cell("PP2 x ring 2, balanced", "recompute full", recompute=RecomputeConfig("full", "full")),
    # Megatron's options of gradients, parameters and stages.
    Cell("DP2 gathered late, none"),
    Cell("DP2 x PP2 x VPP2 gathered late, none"),
    Cell("DP2 x CP2 overlapped, cp", "gradients in bf16", {"grad_reduce_in_fp32": False}),
    Cell("PP4 by letters, none"),
    Cell("PP2 x VPP2 by letters, none"),
    Cell("PP2, own last, none"),
    # Experts, of which ranks have others.
    Cell("EP2 x TP2+SP"),
    Cell("EP2 x TP2+SP, divided experts"),
    Cell("TP2+SP, divided experts"),
    Cell("EP2 x CP2"),
    Cell("EP4"),
    Cell("PP2 x VPP2 x EP2"),
    Cell("DP2 x EP2 gathered late"),
    Cell("2 packs a sequence, EP2 x CP2"),
    Cell(
        "EP2 x CP2",
        "recompute of experts",
        recompute=RecomputeConfig("selective", recompute_modules=("moe",)),
    ),
]
