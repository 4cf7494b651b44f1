"""Eagle 2.5: vision tower -> connector -> merge into the embedding -> language model, under the whole layout.

Tower, connector and embedding live on the first pipeline stage. Shapes: s local tokens of the pack
(after context parallelism), n tiles, h language features.
"""

from dataclasses import dataclass

import torch
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_eagle.context_parallel.attention import PackedSequence
from megatron_eagle.model.connector import Connector
from megatron_eagle.model.language import LanguageModel
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.model.specs import connector_config, language_config, vision_config
from megatron_eagle.model.vision import VisionModel
from megatron_eagle.runtime.parallel import Mesh


@dataclass
class ModelInput:
    """One microbatch as this context parallel rank sees it (`model.inputs.make_input`)."""

    input_ids: Tensor  # [1, s] int64
    labels: Tensor | None  # [1, s] int64; None: the last stage returns logits
    loss_weights: Tensor | None  # [s] fp32
    image_rows: Tensor  # [i] int64: local rows that hold image tokens
    image_slots: Tensor  # [i] int64: which feature of the pack's image tokens each of them takes
    pixel_values: Tensor | None  # [n, channels, S, S]; None on ranks after the first stage
    packed: PackedSequence


class EagleModel(MegatronModule):
    """One pipeline chunk of Eagle 2.5."""

    def __init__(self, eagle: EagleConfig, mesh: Mesh, dtype: torch.dtype, chunk: int = 0) -> None:
        config = language_config(eagle, mesh.config, dtype)
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self.eagle, self.mesh = eagle, mesh
        self.pre_process, self.post_process = mesh.is_first_stage(chunk), mesh.is_last_stage(chunk)
        self.vp_stage = chunk if mesh.config.num_model_chunks > 1 else None
        self.share_embeddings_and_output_weights = eagle.text.tie_word_embeddings
        if self.pre_process:
            tower = vision_config(eagle, mesh.config, dtype)
            self.vision_model = VisionModel(eagle.vision, tower, mesh.groups)
            self.connector = Connector(
                eagle.vision.hidden_size * eagle.shuffle_factor**2,
                eagle.shuffle_factor,
                connector_config(eagle, mesh.config, dtype),
                mesh.groups,
            )
        self.language_model = LanguageModel(eagle.text, config, mesh, chunk)

    def set_input_tensor(self, input_tensor) -> None:
        """Called by Megatron's pipeline schedules."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """Called by Megatron to sum the gradient of tied embeddings over the pipeline."""
        return self.language_model.shared_embedding_or_output_weight()

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """[n, channels, S, S] -> image tokens [n * tokens_per_tile, h] in reading order."""
        return self.connector(self.vision_model(pixel_values))

    def _embed(self, inputs: ModelInput) -> Tensor:
        """Token embeddings with image features in their places: [s, 1, h], or [s / tp, 1, h] under SP."""
        hidden = self.language_model.embedding(inputs.input_ids, position_ids=None)
        pixels = inputs.pixel_values
        if not pixels.shape[0]:
            # A text-only microbatch keeps the tower in the graph: its gradients are zeros, and take part
            # in the same reductions as every other rank's.
            pixels = pixels.new_zeros((1, *pixels.shape[1:]))
        chosen = self.encode_images(pixels)[inputs.image_slots].unsqueeze(1)
        hidden = hidden.index_copy(0, inputs.image_rows, chosen)
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.mesh.tp.group)
        return hidden

    def forward(self, inputs: ModelInput) -> Tensor:
        """-> per-token cross-entropy fp32 [1, s] on the last stage (this rank's share of the logits
        [1, s, rows / tp] without labels), hidden states on the others."""
        return self.language_model(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=self._embed(inputs) if self.pre_process else None,
            labels=inputs.labels,
            packed_seq_params=inputs.packed,
        )


def build_model(
    eagle: EagleConfig, mesh: Mesh, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[EagleModel]:
    """This rank's model chunks, one per virtual pipeline stage, with parameters not yet set.

    Follow with `model.initialization.initialize_parameters` or `training.checkpoint.load_checkpoint`.
    """
    chunks = range(mesh.config.num_model_chunks)
    return [EagleModel(eagle, mesh, dtype, chunk).to(device) for chunk in chunks]
