"""A tiny CLIP or SigLIP folder with random weights, for where none is at hand: features of no meaning."""

import json
from pathlib import Path


def make_encoder(folder: Path, family: str = "siglip", seed: int = 0) -> Path:
    """Write a vision model for pictures of 28 pixels in Hugging Face's format; returns its folder."""
    import torch
    import transformers

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"image_size": 28, "patch_size": 14}
    if family == "siglip":
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes))
        settings = {"size": {"height": 28, "width": 28}}
    else:
        config = transformers.CLIPVisionConfig(**sizes, projection_dim=16)
        model = transformers.CLIPVisionModelWithProjection(config)
        settings = {
            "size": {"shortest_edge": 28},
            "do_center_crop": True,
            "crop_size": {"height": 28, "width": 28},
        }
    for parameter in model.parameters():  # wide enough for pictures to differ in their features
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder
