"""What these tests share: the example's modules, clips whose content differs, tools in this process."""

import contextlib
import importlib.util
import io
import sys
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType
from unittest import mock

import av
import numpy as np

from megatron_eagle.errors import run_cli
from tests.paths import REPO


def example(name: str) -> ModuleType:
    """A module of examples/eagle_video, which is a folder of scripts and no package."""
    path = REPO / "examples" / "eagle_video" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_encoder = example("random_encoder").make_encoder


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
