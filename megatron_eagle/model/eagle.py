"""Eagle 2.5: vision encoder -> connector -> merge into the embedding -> language model, in any layout.

Encoder, connector and embedding live on the first pipeline stage. Shapes: s tokens of this context
parallel rank, r rows of its hidden states (s, or s / tp under sequence parallelism), n tiles,
h language features.
"""

import copy
from dataclasses import dataclass
from typing import Any, Generic

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from eagle_kernels.activation_offload import HostStore
from megatron_eagle.context_parallel.attention import PackedSequence
from megatron_eagle.context_parallel.vision_sharding import VisionShare, exchange_features
from megatron_eagle.model.connector import Connector
from megatron_eagle.model.language import LanguageModel, MaybeTargets
from megatron_eagle.model.layers import LayerClasses, LayersConfig, choose_layers
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.model.specs import RecomputeConfig, connector_config, language_config, vision_config
from megatron_eagle.model.vision import VisionModel
from megatron_eagle.runtime.parallel import Mesh


@dataclass(frozen=True, eq=False)
class VisionInput:
    """The tiles of a microbatch as a rank of the first stage sees them."""

    pixel_values: Tensor  # [n, channels, S, S]: this rank's
    share: VisionShare  # who exchanges which features
    rows: Tensor  # int64 [i]: of the hidden states, those that take the received features


@dataclass(frozen=True, eq=False)
class ModelInput(Generic[MaybeTargets]):
    """One microbatch as this context parallel rank sees it (`model.inputs.make_input`)."""

    input_ids: Tensor  # [1, s] int64
    targets: MaybeTargets  # None: the last stage returns logits
    packed: PackedSequence
    vision: VisionInput | None  # None: not the first stage


class EagleModel(MegatronModule):
    """One pipeline chunk of Eagle 2.5."""

    def __init__(
        self,
        eagle: EagleConfig,
        mesh: Mesh,
        dtype: torch.dtype,
        chunk: int,
        recompute: RecomputeConfig,
        classes: LayerClasses,
        store: HostStore,
    ) -> None:
        config = language_config(eagle, mesh.config, dtype, recompute, classes.options)
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self.eagle, self.mesh = eagle, mesh
        self.pre_process, self.post_process = mesh.is_first_stage(chunk), mesh.is_last_stage(chunk)
        self.vp_stage = chunk if mesh.config.num_model_chunks > 1 else None
        self.share_embeddings_and_output_weights = eagle.text.tie_word_embeddings
        if self.pre_process:
            groups = _vision_groups(mesh)
            encoder = vision_config(eagle, mesh.config, dtype, recompute)
            self.vision_model = VisionModel(eagle.vision, encoder, classes, groups)
            self.connector = Connector(
                eagle.vision.hidden_size * eagle.shuffle_factor**2,
                eagle.shuffle_factor,
                connector_config(eagle, mesh.config, dtype),
                groups,
            )
            if self.has_whole_encoder:
                # Built for a tensor parallel group of one: not shards, and counted once in norms.
                whole: tuple[Any, ...] = (*self.vision_model.parameters(), *self.connector.parameters())
                for parameter in whole:
                    parameter.tensor_model_parallel = False
                    parameter.sum_over_tensor_parallel = True
        self.language_model = LanguageModel(eagle.text, config, classes, mesh, chunk, recompute, store)

    @property
    def has_whole_encoder(self) -> bool:
        """Whether tensor parallel ranks hold copies of encoder and connector and encode different tiles."""
        return self.pre_process and self.mesh.config.vision_sharding == "cp_tp"

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Megatron's description for checkpoints, the same keys and shapes for every layout."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.has_whole_encoder:
            replica = (0, self.mesh.tp.rank, self.mesh.dp_cp.rank)
            for key, tensor in state.items():
                if not key.startswith(f"{prefix}language_model."):
                    tensor.replica_id = replica
        return state

    def set_input_tensor(self, input_tensor: Tensor | None) -> None:
        """Called by Megatron's pipeline schedules."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """Called by Megatron to sum the gradient of tied embeddings over the pipeline."""
        weight: Tensor = self.language_model.shared_embedding_or_output_weight()
        return weight

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """[n, channels, S, S] -> image tokens [n * tokens_per_tile, h] in reading order."""
        tokens: Tensor = self.connector(self.vision_model(pixel_values))
        return tokens

    def _embed(self, inputs: ModelInput[MaybeTargets]) -> Tensor:
        """Token embeddings with image features in their places: [r, 1, h]."""
        vision = inputs.vision
        assert vision is not None, "the first stage has tiles, none of them perhaps"
        hidden: Tensor = self.language_model.embedding(inputs.input_ids, position_ids=None)
        features = self.encode_images(vision.pixel_values)
        if self.config.sequence_parallel and not self.has_whole_encoder:
            # Each tensor parallel rank uses other rows of the same features: backward adds them up.
            features = copy_to_tensor_model_parallel_region(features, group=self.mesh.tp.group)
        received = exchange_features(features, vision.share)
        hidden = hidden.index_copy(0, vision.rows, received.unsqueeze(1))
        if self.config.recompute_granularity == "full" and torch.is_grad_enabled():
            # Checkpointed layers get no gradients unless their input asks for one, and it does not where
            # everything before them is frozen.
            hidden = hidden if hidden.requires_grad else hidden.requires_grad_()
        return hidden

    def forward(self, inputs: ModelInput[MaybeTargets]) -> Tensor:
        """-> per-token cross-entropy fp32 [1, s] on the last stage (this rank's share of the logits
        [1, s, rows / tp] without targets), hidden states on the others."""
        out: Tensor = self.language_model(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=self._embed(inputs) if self.pre_process else None,
            labels=inputs.targets,
            packed_seq_params=inputs.packed,
        )
        return out


def _vision_groups(mesh: Mesh) -> ProcessGroupCollection:
    if mesh.config.vision_sharding != "cp_tp":
        return mesh.groups
    groups = copy.copy(mesh.groups)
    groups.tp = mesh.alone
    return groups


def build_model(
    eagle: EagleConfig,
    mesh: Mesh,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    recompute: RecomputeConfig | None = None,
    layers: LayersConfig | None = None,
) -> list[EagleModel]:
    """This rank's model chunks, one per virtual pipeline stage, with parameters not yet set.

    Follow with `model.initialization.initialize_parameters` or `checkpoint.load_checkpoint`.

    Raises:
        UserError: `layers` names a library that cannot be used here.
    """
    recompute = recompute or RecomputeConfig()
    classes = choose_layers(layers or LayersConfig(), eagle, mesh.config)
    chunks, store = range(mesh.config.num_model_chunks), HostStore()
    return [EagleModel(eagle, mesh, dtype, chunk, recompute, classes, store).to(device) for chunk in chunks]
