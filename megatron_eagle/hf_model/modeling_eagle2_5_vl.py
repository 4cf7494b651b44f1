"""Eagle 2.5 on top of transformers' SiglipVisionModel and its Qwen2, Qwen3 or Qwen3Moe.

Self-contained: shipped inside every exported checkpoint and loaded with `trust_remote_code`
(transformers 4.51 to 5.x). Shapes: n tiles, S tile side, p patch side, c vision width, h language width,
b batch, s sequence, v vocabulary, k visual tokens per tile.
"""

import copy
from typing import Any

import torch
import transformers
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationMixin, PreTrainedModel, SiglipVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from .configuration_eagle2_5_vl import Eagle2_5_VLConfig
from .pixel_shuffle import pixel_shuffle


class Eagle2_5_VLPreTrainedModel(PreTrainedModel):
    config_class = Eagle2_5_VLConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "Qwen2DecoderLayer",
        "Qwen3DecoderLayer",
        "Qwen3MoeDecoderLayer",
        "SiglipEncoderLayer",
    ]
    _skip_keys_device_placement: Any = "past_key_values"
    # Both halves are transformers models; they know what they support. 4.51 reads the first spelling.
    _supports_flash_attn_2 = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_cache_class = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.LayerNorm):
            module.weight.data.fill_(1.0)
            module.bias.data.zero_()


class Eagle2_5_VLForConditionalGeneration(Eagle2_5_VLPreTrainedModel, GenerationMixin):
    """Vision encoder, connector `mlp1` and language model, for text with images and video frames."""

    def __init__(self, config: Eagle2_5_VLConfig):
        super().__init__(config)
        self.image_token_index = config.image_token_index
        self.vision_model = SiglipVisionModel(config.vision_config)
        language: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)]
        self.language_model = language(config.text_config)
        vision_width = config.vision_config.hidden_size * round(1 / config.downsample_ratio) ** 2
        text_width = config.text_config.hidden_size
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(vision_width),  # eps 1e-5, unlike the vision encoder's 1e-6
            nn.Linear(vision_width, text_width),
            nn.GELU(),  # erf, unlike the vision encoder's tanh
            nn.Linear(text_width, text_width),
        )
        self.post_init()  # type: ignore[no-untyped-call]  # transformers'

    def save_pretrained(  # type: ignore[override]  # the others pass through
        self, save_directory: Any, state_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As in transformers, always under the released checkpoint's names.

        transformers 5 drops one level of the encoder's names in memory and only restores it for a model that
        was loaded, not for one built from a configuration.
        """
        if state_dict is None and getattr(self, "_weight_conversions", None) is None:
            prefix, tensors = "vision_model.", self.state_dict()
            short = {name for name in tensors if name.startswith(prefix) and prefix * 2 not in name}
            state_dict = {prefix + k if k in short else k: tensor for k, tensor in tensors.items()}
        super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)

    @property
    def base_model(self) -> Any:
        """All but the output layer, as trainers call it that have a loss of their own (TRL)."""
        return _Backbone(self)

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> Any:
        return self.language_model.get_decoder()

    def extract_feature(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Visual features of tiles in [-1, 1]: [n, 3, S, S] -> [n, k, h]."""
        return self._encode(pixel_values)[1]

    def get_image_features(self, pixel_values: torch.Tensor, **_kwargs: Any) -> Any:
        """Visual features under transformers' name: [n, k, h].

        In transformers 5 they are `pooler_output`, and `last_hidden_state` is the encoder's [n, (S/p)^2, c].
        """
        hidden, tokens = self._encode(pixel_values)
        if int(transformers.__version__.split(".")[0]) < 5:
            return tokens
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=tokens)

    def _encode(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Offloaded weights are on "meta" until they are needed; accelerate then moves the inputs.
        device = pixel_values.device if self.device.type == "meta" else self.device
        pixels = pixel_values.to(device=device, dtype=self.dtype)
        # Without the encoder's pooling head, which nothing reads and accelerate cannot bring from a disk.
        encoder = getattr(
            self.vision_model, "vision_model", self.vision_model
        )  # a level less in transformers 5
        embeddings = encoder.embeddings(pixels)
        hidden: torch.Tensor = encoder.encoder(inputs_embeds=embeddings).last_hidden_state
        hidden = encoder.post_layernorm(hidden)
        return hidden, self.mlp1(pixel_shuffle(hidden, self.config.shuffle_factor))

    def merge_features(
        self,
        input_ids: torch.Tensor | None,
        pixel_values: torch.Tensor | None = None,
        image_flags: torch.Tensor | None = None,
        visual_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token embeddings with the visual features at the image tokens, in reading order.

        Args:
            input_ids: [b, s].
            pixel_values: [n, 3, S, S] or None for text only.
            image_flags: [n], 0 drops a tile's features (dummy tiles of text-only training samples).
            visual_features: [n, k, h] computed earlier with `extract_feature`, instead of pixels.

        Returns:
            [b, s, h].

        Raises:
            ValueError: the number of image tokens and of features differ; both are named. No input_ids.
        """
        if input_ids is None:
            raise ValueError("the model needs input_ids or inputs_embeds")
        embeddings: torch.Tensor = self.get_input_embeddings()(input_ids)
        at_image = input_ids == self.image_token_index
        expected = int(at_image.sum())
        if visual_features is None and pixel_values is not None and len(pixel_values):
            visual_features = self.extract_feature(pixel_values)
        if visual_features is not None and image_flags is not None:
            visual_features = visual_features[image_flags.reshape(-1).to(visual_features.device) == 1]
        given = 0 if visual_features is None else visual_features.shape[0] * visual_features.shape[1]
        if given != expected:
            raise ValueError(
                f"input_ids hold {expected} image tokens (id {self.image_token_index}), "
                f"the pixels give {given} visual features: prompt and images do not belong together"
            )
        if visual_features is None or not given:
            return embeddings
        features = visual_features.reshape(given, -1).to(embeddings.device, embeddings.dtype)
        return embeddings.masked_scatter(at_image.unsqueeze(-1), features)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        image_flags: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        image_sizes: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [b, s, v] of input_ids [b, s] and tiles [n, 3, S, S]; with labels also the mean loss.

        `image_sizes` is accepted because the processor returns it; the model does not need it.
        """
        if inputs_embeds is None:
            inputs_embeds = self.merge_features(input_ids, pixel_values, image_flags)
        output: CausalLMOutputWithPast = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            **kwargs,
        )
        return output

    def prepare_inputs_for_generation(
        self, *args: Any, pixel_values: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """transformers' own; pictures go in with the prompt, also an assistant's, and not again."""
        whole: Any = self
        inputs: dict[str, Any] = GenerationMixin.prepare_inputs_for_generation(whole, *args, **kwargs)
        cache = inputs.get("past_key_values")
        if cache is None or not cache.get_seq_length():
            inputs["pixel_values"] = pixel_values
        return inputs

    @torch.no_grad()
    def generate(  # type: ignore[override]  # the processor's output by name
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        visual_features: torch.Tensor | None = None,
        generation_config: Any = None,
        image_sizes: Any = None,
        **generate_kwargs: Any,
    ) -> torch.Tensor:
        """Generate from the processor's output; returns only the new ids, [b, new tokens].

        Defaults come from the checkpoint's generation_config.json (stop at `<|im_end|>`);
        `generate_kwargs` are those of transformers' `generate`. An `assistant_model` with the same
        vocabulary sees the pictures if it is an Eagle 2.5, and the text alone if it is a language model.
        """
        generation_config = copy.deepcopy(generation_config or self.generation_config)
        rest = generation_config.update(
            **generate_kwargs
        )  # what is no setting: streamer, logits_processor, ...
        if input_ids is None:
            raise ValueError("generate needs input_ids")
        assistant = rest.get("assistant_model")
        if assistant is not None or generation_config.prompt_lookup_num_tokens is not None:
            # Who guesses the next tokens is asked with all ids that there are: embeddings will not do.
            if visual_features is not None:
                raise ValueError("assisted generation takes pixel_values, not visual_features")
            if assistant is not None:
                rest["assistant_model"] = _Assistant(assistant)
            whole: Any = self
            output = GenerationMixin.generate(
                whole,
                input_ids,
                pixel_values=pixel_values,
                attention_mask=attention_mask,
                generation_config=generation_config,
                **rest,
            )
            return _without_prompt(output, input_ids.shape[1])
        language: Any = self.language_model
        new: torch.Tensor = language.generate(
            inputs_embeds=self.merge_features(input_ids, pixel_values, visual_features=visual_features),
            attention_mask=attention_mask,
            generation_config=generation_config,
            **rest,
        )
        return new


class _Backbone:
    """Pictures and text to hidden states. No module: its weights would have a second name."""

    def __init__(self, model: Eagle2_5_VLForConditionalGeneration) -> None:
        self._model = model
        self._tp_plan, self._pp_plan = model._tp_plan, model._pp_plan  # transformers 5 asks

    def __call__(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        image_flags: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        if inputs_embeds is None:
            inputs_embeds = self._model.merge_features(input_ids, pixel_values, image_flags)
        return self._model.get_decoder()(inputs_embeds=inputs_embeds, **kwargs)


class _Assistant:
    """An assistant as transformers asks it: its `generate` returns the prompt, too."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        if isinstance(self._model, Eagle2_5_VLForConditionalGeneration):
            kwargs["pixel_values"] = pixel_values
        return GenerationMixin.generate(self._model, input_ids, **kwargs)


def _without_prompt(output: Any, length: int) -> torch.Tensor:
    """What `generate` returned, ids or an object that holds them, without the prompt."""
    if isinstance(output, torch.Tensor):
        return output[:, length:]
    output.sequences = output.sequences[:, length:]
    whole: torch.Tensor = output  # `generate` says so, too
    return whole
