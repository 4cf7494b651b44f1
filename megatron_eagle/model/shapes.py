"""What one rank of a layout has of a model, and of a pack, in whole numbers.

Everybody who counts (checks, specifications, planning) takes them from here. The letters are those of the
formulas: h hidden features, q and kv features of a rank's queries and of its keys, f its feed-forward
features, s tokens of a context parallel rank, r rows of its hidden states, c hidden features of the encoder,
i its feed-forward features there.
"""

from dataclasses import dataclass

from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.runtime.parallel import ParallelConfig


@dataclass(frozen=True)
class LocalShapes:
    """What a tensor parallel rank has of a model."""

    eagle: EagleConfig
    parallel: ParallelConfig

    @property
    def tp(self) -> int:
        """Tensor parallel ranks."""
        return self.parallel.tensor_model_parallel_size

    @property
    def cp(self) -> int:
        """Context parallel ranks, those of Ulysses among them."""
        return self.parallel.context_parallel_size

    @property
    def ulysses(self) -> int:
        """Context parallel ranks that divide heads around attention."""
        return self.parallel.ulysses_parallel_size

    @property
    def h(self) -> int:
        """Hidden features of the language model."""
        return self.eagle.text.hidden_size

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.eagle.text.num_attention_heads // self.tp

    @property
    def kv_heads(self) -> int:
        """Heads of keys, and of values."""
        return self.eagle.text.num_key_value_heads // self.tp

    @property
    def attention_heads(self) -> int:
        """Query heads of a rank in attention, which Ulysses divides, of the rank that has most."""
        copies = max(1, self.ulysses // self.kv_heads)
        return -(-self.heads // self.kv_heads // copies) * self.attention_kv_heads

    @property
    def attention_kv_heads(self) -> int:
        """KV heads of a rank in attention: beyond their number, Ulysses repeats them."""
        return max(1, self.kv_heads // self.ulysses)

    @property
    def q(self) -> int:
        """Features of the queries."""
        return self.heads * self.eagle.text.head_dim

    @property
    def kv(self) -> int:
        """Features of the keys, and of the values."""
        return self.kv_heads * self.eagle.text.head_dim

    @property
    def f(self) -> int:
        """Feed-forward features of the language model; of each expert, where it has some."""
        experts = self.eagle.text.experts
        if experts is not None:
            return experts.moe_intermediate_size // self.parallel.expert_tensor_size
        return self.eagle.text.intermediate_size // self.tp

    @property
    def own_experts(self) -> int:
        """Experts of a layer that a rank holds; 0 where the layer has an MLP."""
        experts = self.eagle.text.experts
        return 0 if experts is None else experts.num_experts // self.parallel.expert_model_parallel_size

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding and of the output layer."""
        return self.eagle.text.padded_vocab_size // self.tp

    @property
    def c(self) -> int:
        """Hidden features of the vision encoder."""
        return self.eagle.vision.hidden_size

    @property
    def vision_ranks(self) -> int:
        """Ranks that divide the layers of encoder and connector: 1 where they divide tiles instead."""
        return 1 if self.parallel.vision_sharding == "cp_tp" else self.tp

    @property
    def i(self) -> int:
        """Feed-forward features of the vision encoder."""
        return self.eagle.vision.intermediate_size // self.vision_ranks

    @property
    def tile_ranks(self) -> int:
        """Ranks that divide the tiles of a pack."""
        return {"none": 1, "cp": self.cp, "cp_tp": self.cp * self.tp}[self.parallel.vision_sharding]

    def own_tiles(self, tiles: int) -> int:
        """Tiles that a rank encodes of a pack with `tiles`: at least one, as many as any other rank."""
        return max(1, -(-tiles // self.tile_ranks))


@dataclass(frozen=True)
class PackShapes(LocalShapes):
    """What a rank has of a model and of a pack."""

    length: int
    """Tokens of a pack."""

    @property
    def s(self) -> int:
        """Tokens of a context parallel rank."""
        return self.length // self.cp

    @property
    def r(self) -> int:
        """Rows of the hidden states between layers."""
        return self.s // self.tp if self.parallel.sequence_parallel else self.s

    @property
    def routed_rows(self) -> int:
        """Rows that go through a rank's experts, if each of them gets equally many."""
        experts = self.eagle.text.experts
        assert experts is not None, "of models with experts"
        return self.r * experts.num_experts_per_tok * self.parallel.expert_tensor_size


@dataclass(frozen=True)
class StageShapes:
    """What a pipeline stage has of the language model."""

    chunk_sizes: tuple[int, ...]
    """Layers of each chunk."""
    first: bool
    """Its first chunk begins with the embedding, after the vision encoder."""
    last: bool
    """Its last chunk ends with the loss."""

    @property
    def layers(self) -> int:
        """Of all its chunks together."""
        return sum(self.chunk_sizes)

    @property
    def chunk_layers(self) -> int:
        """Layers of the chunk that has most."""
        return max(self.chunk_sizes)

    @classmethod
    def of(cls, shapes: LocalShapes, stage: int) -> "StageShapes":
        """Of the stage with this number."""
        parallel, layers = shapes.parallel, shapes.eagle.text.num_hidden_layers
        stages, own = parallel.pipeline_model_parallel_size, parallel.stage_layers(layers)[stage]
        return cls(tuple(own), stage == 0, stage == stages - 1)
