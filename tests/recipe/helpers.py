"""What the recipe tests share: a tiny random SigLIP or CLIP folder and clips whose content differs."""

import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

import av
import numpy as np
import torch

from megatron_eagle.errors import run_cli
from tests.paths import REPO


def make_encoder(folder: Path, family: str = "siglip", seed: int = 0) -> Path:
    """A vision model with random weights, in Hugging Face's format, for pictures of 28 pixels."""
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


def make_clip(path: Path, scenes: list[int], *, seconds: int = 10, fps: int = 4) -> Path:
    """A video of scenes of `seconds` each; a scene's number decides its (still) picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.options = {"crf": "10", "preset": "ultrafast"}
        for scene in scenes:
            small = np.random.default_rng(scene).integers(0, 256, (4, 6, 3), np.uint8)
            picture = np.ascontiguousarray(small.repeat(16, axis=0).repeat(16, axis=1))
            for _ in range(seconds * fps):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def call_tool(name: str, *arguments) -> CompletedProcess:
    """Run tools/NAME.py in this process, where its libraries are loaded already."""
    spec = importlib.util.spec_from_file_location(name, REPO / "tools" / f"{name}.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    command = [name, *map(str, arguments)]
    out, errors = io.StringIO(), io.StringIO()
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors)
    with streams[0], streams[1], mock.patch.object(sys, "argv", command):
        try:
            run_cli(tool.main)
        except SystemExit as end:
            code = end.code
    return CompletedProcess(command, code or 0, out.getvalue(), errors.getvalue())
