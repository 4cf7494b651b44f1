"""An export's own two halves on a sample: its processor, and its model in transformers, beside Megatron's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.certify.store_samples import Asked
from megatron_eagle.certify.view import View
from megatron_eagle.hf_model.vllm_plugin.seen import describe_medium
from megatron_eagle.inference.generate import ExportedModel


def seen_by_processor(processor: Any, question: Asked) -> tuple[View, Tensor | None]:
    """What the exported processor makes of a sample, and its tiles in the order of the text.

    Raises:
        ValueError: it refuses the sample.
    """
    messages = question.messages
    tiling = {} if question.max_tiles is None else {"max_dynamic_tiles": question.max_tiles}
    text = processor.apply_chat_template(messages)
    images, videos = processor.process_vision_info(messages)
    items = [*(images or []), *(videos or [])]
    facts = []
    for item in items:
        said, tiles = processor.show(item, tiling)
        facts.append(describe_medium(processor, item, said, tiles["pixel_values"], tiling))
    inputs = processor(text=[text], images=images, videos=videos, images_kwargs=tiling, return_tensors="pt")
    return View(inputs["input_ids"][0].tolist(), facts), inputs.get("pixel_values")


class TransformersModel:
    """The export in transformers, in fp32.

    Raises:
        UserError: it cannot be loaded.
    """

    def __init__(self, folder: Path) -> None:
        exported = ExportedModel(folder, allow_long_prompts=True)
        self.model = exported.model.float()
        self.max_positions = exported.max_positions

    @torch.no_grad()
    def logits(self, ids: Sequence[int], pixels: Tensor | None, first_position: int = 0) -> Tensor:
        """[s, vocabulary] fp32 on the CPU."""
        device = self.model.device
        places = None  # its own, for which it makes no mask
        if first_position:
            places = torch.arange(first_position, first_position + len(ids), device=device)[None]
        found = self.model(
            input_ids=torch.tensor([list(ids)], device=device),
            pixel_values=None if pixels is None else pixels.to(device),
            position_ids=places,
            use_cache=False,
        )
        logits: Tensor = found.logits[0].float().cpu()
        return logits


def megatron_logits(checkpoint: Path, questions: Sequence[Asked]) -> list[Tensor]:
    """[s, vocabulary] of each sample as training sees it, under the latest weights of a checkpoint.

    Raises:
        UserError: no checkpoint, or one of another model.
    """
    from megatron_eagle.convert.checkpoint_forward import many_logits

    found = many_logits(
        checkpoint,
        [(torch.tensor(list(question.training.ids)), question.pixels) for question in questions],
        allow_long_prompts=True,
        first_positions=[question.first_position for question in questions],
    )
    return [logits[0] for logits in found]


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference of two models' logits, as a share of the largest logit where that is above 1."""
    if one.shape != other.shape:
        return float("inf")
    return float((one - other).abs().max() / max(1.0, float(one.abs().max())))


def token_logprobs(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """[s - 1]: of each token but the first, after those before it."""
    parts = [
        part.log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
        for part, wanted in zip(logits[:-1].split(1024), torch.tensor(list(ids[1:])).split(1024), strict=True)
    ]
    return torch.cat(parts)
