"""Qwen2.5 as Megatron's `GPTModel`, with packed rotary positions and a loss that ignores padding rows."""

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_eagle.context_parallel.attention import PackedRotaryEmbedding
from megatron_eagle.model.layers import LayerClasses
from megatron_eagle.model.presets import TextConfig
from megatron_eagle.model.specs import language_block
from megatron_eagle.runtime.parallel import Mesh


class LanguageModel(GPTModel):
    """One pipeline chunk of the language model."""

    def __init__(
        self, text: TextConfig, config: TransformerConfig, classes: LayerClasses, mesh: Mesh, chunk: int
    ) -> None:
        stage = chunk if mesh.config.num_model_chunks > 1 else None
        super().__init__(
            config,
            language_block(config, classes, stage),
            vocab_size=text.padded_vocab_size,
            max_sequence_length=text.max_position_embeddings,
            pre_process=mesh.is_first_stage(chunk),
            post_process=mesh.is_last_stage(chunk),
            share_embeddings_and_output_weights=text.tie_word_embeddings,
            position_embedding_type="rope",
            pg_collection=mesh.groups,
            vp_stage=stage,
        )
        self.rotary_pos_emb = PackedRotaryEmbedding(text.head_dim, text.rope_theta)
        # Real vocabulary rows among this tensor parallel rank's.
        rows = text.padded_vocab_size // mesh.tp.size
        self.local_vocab_size = min(max(text.vocab_size - mesh.tp.rank * rows, 0), rows)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [1, s], logits [s, 1, rows of this rank] -> cross-entropy per token, fp32 [1, s].

        Padding rows of the vocabulary receive no probability.
        """
        logits[..., self.local_vocab_size :] = float("-inf")
        return super().compute_language_model_loss(labels, logits).float()
