"""Runs against which the memory model is checked: `python -m tests.parallel.memory_cells` prints them all."""

from dataclasses import dataclass, field

from megatron_eagle.model.layers import LayersConfig
from megatron_eagle.model.presets import EagleConfig, VisionConfig
from megatron_eagle.model.specs import RecomputeConfig
from megatron_eagle.model.text import TextConfig
from megatron_eagle.planning.memory_model import StageMemory, peak_memory
from megatron_eagle.planning.memory_shapes import Workload
from megatron_eagle.runtime.parallel import ParallelConfig
from tests.parallel.harness import launch
from tests.parallel.memory_run import measure_step

TP2, PP2, CP2 = ({f"{axis}_parallel_size": 2} for axis in ("tensor_model", "pipeline_model", "context"))
SP = {"sequence_parallel": True, "vision_sharding": "cp_tp"}


@dataclass(frozen=True)
class Cell:
    """A run to measure: 46 million parameters, model states of 320 MB and more on every rank."""

    name: str
    world_size: int
    parallel: dict = field(default_factory=dict)
    length: int = 512
    tiles: int = 8
    microbatches: int = 1  # of the step, over all data parallel ranks
    precision: str = "fp32"
    recompute: str = "none"
    vocab_size: int = 16000
    loss: str = "plain"
    document: int | None = None  # tokens of each; None: a pack is one

    def __str__(self) -> str:
        return self.name

    def predict(self, rank: int) -> StageMemory:
        """The model's peak of `rank`."""
        parallel = ParallelConfig(**self.parallel)
        data_parallel_size = parallel.data_parallel_size(self.world_size)
        workload = Workload(
            sequence_length=self.length,
            tiles=self.tiles,
            microbatches=self.microbatches // data_parallel_size,
            precision=self.precision,
            recompute=self.policy,
            longest_document=self.document,
            fused_loss=self.loss == "fused",
            device="cpu",
        )
        return peak_memory(self.model, parallel, data_parallel_size, workload, self.stage(rank))

    def stage(self, rank: int) -> int:
        """Pipeline stages are the outermost axis of ranks."""
        return rank * ParallelConfig(**self.parallel).pipeline_model_parallel_size // self.world_size

    @property
    def policy(self) -> RecomputeConfig:
        return RecomputeConfig(self.recompute, "full" if self.recompute == "full" else "none")

    @property
    def model(self) -> EagleConfig:
        return model(self.vocab_size)

    def measure(self) -> list[dict]:
        """What each rank held."""
        arguments = (self.length, self.tiles, self.microbatches, self.precision, self.policy)
        arguments += (LayersConfig(loss=self.loss), self.document)
        return launch(measure_step, self.world_size, self.model, self.parallel, *arguments, timeout=900)


QUICK = [Cell("one process", 1)]
MORE = [
    Cell("TP2", 2, TP2),
    Cell("one process, bf16", 1, precision="bf16"),
    Cell("one process, full recompute", 1, recompute="full", length=1024),
    Cell("one process, selective recompute", 1, recompute="selective"),
    Cell("TP2 + SP, whole encoder", 2, TP2 | SP),
    Cell("TP2 + SP, whole encoder, bf16", 2, TP2 | SP, precision="bf16"),
    Cell("PP2", 2, PP2, microbatches=2),
    Cell("PP2, bf16", 2, PP2, microbatches=4, precision="bf16"),
    Cell("PP2 x VPP2", 2, PP2 | {"virtual_pipeline_model_parallel_size": 2}, microbatches=4),
    Cell("CP2", 2, CP2),
    Cell("DP2", 2, microbatches=2),
    Cell("one process, fused loss", 1, loss="fused", length=1024, document=256),
    Cell("one process, fused loss, bf16", 1, loss="fused", length=1024, document=256, precision="bf16"),
    Cell("TP2 + SP, fused loss, two chunks", 2, TP2 | SP, loss="fused", length=2304, document=256),
    Cell("one process, offload", 1, recompute="offload", length=1024, document=256),
    Cell("PP2, offload, bf16", 2, PP2, microbatches=4, recompute="offload", precision="bf16"),
    Cell("Ulysses 2", 2, CP2 | {"ulysses_parallel_size": 2}, length=1024, vocab_size=8000),
    Cell("CP2, documents of 128 tokens", 2, CP2, length=1024, document=128),
    # Score matrices of the reference attention decide.
    Cell("one process, 1536 tokens", 1, length=1536, vocab_size=8000),
    Cell("CP2, 2048 tokens", 2, CP2, length=2048, vocab_size=8000),
]


def model(vocab_size: int) -> EagleConfig:
    """Eight language layers of 512 features, four encoder layers of 256."""
    return EagleConfig(
        vision=VisionConfig(
            image_size=112,
            patch_size=14,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
        ),
        text=TextConfig(
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=vocab_size,
        ),
        image_token_index=7,
    ).validate()


def main() -> None:
    """One line a rank: measured and predicted peak in MB of 10^6 bytes, as the card has them."""
    for cell in [*QUICK, *MORE]:
        for rank, measured in enumerate(cell.measure()):
            predicted = cell.predict(rank)
            error = predicted.total / measured["peak"] - 1
            transient = (predicted.total - predicted.states) / (measured["peak"] - measured["before"]) - 1
            print(
                f'- {{run: "{cell}", rank: {rank}, measured_mb: {measured["peak"] / 1e6:.1f}, predicted_mb: '
                f"{predicted.total / 1e6:.1f}, error_percent: {100 * error:+.1f}, "
                f'error_percent_without_states: {100 * transient:+.1f}, moment: "{predicted.moment}"}}',
                flush=True,
            )


if __name__ == "__main__":
    main()
