"""The language model: `GPTModel` with packed rotary positions and a loss that ignores padding rows."""

from dataclasses import dataclass
from typing import Any, TypeVar

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from eagle_kernels.activation_offload import HostStore
from eagle_kernels.linear_cross_entropy import linear_cross_entropy
from megatron_eagle.model.layers import LayerClasses, ready
from megatron_eagle.model.rotary import PackedRotaryTable
from megatron_eagle.model.specs import RecomputeConfig, language_block
from megatron_eagle.model.text import TextConfig
from megatron_eagle.runtime.parallel import Mesh


@dataclass(frozen=True, eq=False)
class Targets:
    """What tokens are trained to predict. Entry i belongs to the prediction made at token i."""

    labels: Tensor  # [s] int64
    loss_weights: Tensor  # [s] fp32
    group_ids: Tensor  # [s] int64: whose losses are summed apart
    # int64, places of the tokens with a weight, whose labels are of the vocabulary; None: not known yet
    supervised: Tensor | None = None


# With targets a model gives losses, without them logits.
MaybeTargets = TypeVar("MaybeTargets", Targets, None)


class LanguageModel(GPTModel):
    """One pipeline chunk of the language model."""

    def __init__(
        self,
        text: TextConfig,
        config: TransformerConfig,
        classes: LayerClasses,
        mesh: Mesh,
        chunk: int,
        recompute: RecomputeConfig,
        store: HostStore,
    ) -> None:
        stage = chunk if mesh.config.num_model_chunks > 1 else None
        super().__init__(
            config,
            language_block(text, config, classes, stage, mesh, recompute, store),
            vocab_size=text.padded_vocab_size,
            max_sequence_length=text.max_position_embeddings,
            pre_process=mesh.is_first_stage(chunk),
            post_process=mesh.is_last_stage(chunk),
            share_embeddings_and_output_weights=text.tie_word_embeddings,
            position_embedding_type="rope",
            pg_collection=mesh.groups,
            vp_stage=stage,
        )
        self.rotary_pos_emb = PackedRotaryTable(text, config.params_dtype)
        self.fused_loss, self.vocab_size = classes.fused_loss, text.vocab_size
        # Real vocabulary rows among this tensor parallel rank's.
        rows = text.padded_vocab_size // mesh.tp.size
        self.local_vocab_size = min(max(text.vocab_size - mesh.tp.rank * rows, 0), rows)

    def _postprocess(
        self,
        hidden_states: Tensor,
        *,
        labels: Targets | None = None,
        **others: Any,
    ) -> Tensor:
        """Megatron's last step: hidden states [r, 1, h] -> cross-entropy per token fp32 [1, s], or logits.

        `labels`, Megatron's name, are the targets. The fused loss forms gradients for their weights, and is 0
        for tokens that have none.
        """
        if not self.post_process or labels is None or self.fused_loss is None:
            plain_labels = None if labels is None else labels.labels[None]
            plain: Tensor = super()._postprocess(hidden_states, labels=plain_labels, **others)
            return plain
        group, sharded = self.pg_collection.tp, self.config.sequence_parallel
        if sharded:
            # Whole before the loss drops tokens, so that all ranks drop the same.
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
        tied = self.share_embeddings_and_output_weights
        ready(self.output_layer)
        losses = linear_cross_entropy(
            hidden_states.squeeze(1),
            self.shared_embedding_or_output_weight() if tied else self.output_layer.weight,
            labels.labels,
            labels.loss_weights,
            supervised=labels.supervised,
            vocab_size=self.vocab_size,
            group=group,
            sum_input_gradient=not sharded,
            into_main_grad=self.fused_loss.into_main_grad,
            implementation=self.fused_loss.kernels,
        )
        return losses[None]

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [1, s], logits [s, 1, rows of this rank] -> cross-entropy per token, fp32 [1, s].

        Padding rows of the vocabulary receive no probability.
        """
        logits[..., self.local_vocab_size :] = float("-inf")
        losses: Tensor = super().compute_language_model_loss(labels, logits)
        return losses.float()
