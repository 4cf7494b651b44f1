"""Decoding with NVIDIA DALI: videos and JPEG pictures on the GPU; on a CPU, the same graph for videos.

A GPU's decoder gets a sparse remux of each video (`remux`).  What it cannot be trusted with is decoded
exactly on the CPU instead, and the reason is reported.  It conceals damage in a video without a word, which
the exact decoder does not.  Results come to the host: batches that wait for their step take no GPU memory.
"""

import io
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_eagle.data.media.dali_graph import FrameOrigin, colour_matrix, image_graph, video_graph
from megatron_eagle.data.media.dali_runner import DaliFailed, PipelineRunner
from megatron_eagle.data.media.decoder import ExactDecoder
from megatron_eagle.data.media.frame_list import frame_pictures
from megatron_eagle.data.media.frame_table import FrameIndex
from megatron_eagle.data.media.images import MAX_MAX_PIXELS
from megatron_eagle.data.media.remux import Remux, RemuxRefused, sparse_remux
from megatron_eagle.data.media.source import open_bytes, page_ref
from megatron_eagle.hf_model.grids import has_thumbnail
from megatron_eagle.hf_model.tiles import cut_tiles
from megatron_eagle.problems import Problem

_BATCH_SIZE = 8  # samples that DALI decodes side by side: an H200 has seven video decoders
_THREADS = 4
# Frames of one sample.  Of a video for the GPU a new sample begins at the first key frame after so many, or
# after twice as many at the latest: at most 8 x 16 frames lie there at full size, 0.8 GB of 1920 x 1080.
_SAMPLE_FRAMES = 8

# Codecs of which a packet is one picture, hidden ones apart, and all decoders give the same bits.  AV1's
# packets hold several, which DALI 2.4 counts as frames; MPEG-4's decoders differ by their inverse DCT; MJPEG
# and MPEG-2 it does not take on a GPU.
_GPU_CODECS = ("h264", "hevc", "vp8", "vp9")
_MAX_REORDER = 6  # DALI sorts frames into presentation order in a buffer of eight
_PROGRESSIVE = (0, 1)  # FFmpeg's AV_FIELD_UNKNOWN and AV_FIELD_PROGRESSIVE
# FFmpeg's numbers of colour tags (AVCOL_SPC); what has no tag is taken for BT.601, like BT.470BG and 170M.
_BT709, _BT601 = 1, (2, 5, 6)

_Inputs = dict[str, np.ndarray]


class DaliDecoder:
    """Media to tiles for one rank; many threads may ask at the same time, in the process that made it only.

    `tile_size` is S.  On a CUDA `device` videos and JPEG pictures are decoded there; on a CPU the exact
    decoder's frames go through the same graph, and pictures do not.  `video_source` is `dali_cpu` where a CPU
    does to VP8 and VP9 what a GPU would do.  `timeout` is in seconds.  `fell_back` is told how and why each
    medium was decoded that DALI's decoders were not given or did not take, and its path.
    """

    def __init__(
        self,
        tile_size: int,
        device: torch.device,
        *,
        timeout: float | None,
        fell_back: Callable[[str, str], None],
        video_source: FrameOrigin | None = None,
    ):
        self._tile_size, self._timeout, self._fell_back = tile_size, timeout, fell_back
        self._exact = ExactDecoder(tile_size, fell_back)
        self._on_gpu = device.type == "cuda"
        self._process = os.getpid()
        device_id = (device.index or 0) if self._on_gpu else None
        options: dict[str, Any] = {"device_id": device_id, "batch_size": _BATCH_SIZE, "threads": _THREADS}
        self._source = video_source or ("nvdec" if self._on_gpu else "frames")
        self._videos = PipelineRunner(partial(video_graph, tile_size, self._source, **options), _BATCH_SIZE)
        self._pictures = PipelineRunner(partial(image_graph, tile_size, **options), _BATCH_SIZE)

    def frames(self, path: str, index: FrameIndex) -> torch.Tensor:
        """All frames of an index as uint8 [n, 3, S, S] on the host.

        Raises:
            Problem: a frame cannot be decoded.
        """
        if self._on_gpu and (pictures := frame_pictures(path)):
            paths = (pictures[number] for number in index.numbers.tolist())
            return torch.cat([self.picture(one, (1, 1), max_pixels=MAX_MAX_PIXELS) for one in paths])
        if self._source == "frames":
            pieces = [self._ask(self._videos, path, [inputs]) for inputs in self._decoded(path, index)]
            return torch.from_numpy(np.concatenate([tiles for ((tiles,),) in pieces]))
        try:
            outputs = self._ask(self._videos, path, _encoded(path, index))
        except (RemuxRefused, DaliFailed) as reason:
            self._fell_back(f"exactly, not by DALI: {reason}", path)
            return self._exact.frames(path, index)
        tiles = np.concatenate([tiles for (tiles,) in outputs])
        return torch.from_numpy(np.ascontiguousarray(np.rot90(tiles, index.rotation // 90, (2, 3))))

    def picture(self, path: str, grid: tuple[int, int], *, max_pixels: int) -> torch.Tensor:
        """The tiles of a picture as uint8 [n, 3, S, S] on the host, as `tiles.image_tiles`.

        Raises:
            Problem: the picture cannot be decoded.
        """
        columns, rows = grid
        if self._on_gpu and (data := _plain_jpeg(path, max_pixels)) is not None:
            size = np.array([rows * self._tile_size, columns * self._tile_size], np.float32)
            try:
                ((whole, small),) = self._ask(self._pictures, path, [{"picture": data, "size": size}])
            except DaliFailed as reason:
                self._fell_back(f"exactly, not by DALI: {reason}", path)
            else:
                thumbnail = torch.from_numpy(small) if has_thumbnail(grid) else None
                return cut_tiles(torch.from_numpy(whole), thumbnail, grid)
        return self._exact.picture(path, grid, max_pixels=max_pixels)

    def close(self) -> None:
        """Let DALI go, after what was asked of it."""
        self._videos.close()
        self._pictures.close()

    def _decoded(self, path: str, index: FrameIndex) -> Iterator[_Inputs]:
        """Samples of frames that are upright and have the right colours already."""
        frames: list[np.ndarray] = []
        for picture in self._exact.pictures(path, index):
            if frames and (len(frames) == _SAMPLE_FRAMES or picture.shape != frames[0].shape):
                yield {"video": np.stack(frames), "colours": colour_matrix(bt709=False)}
                frames = []
            frames.append(picture)
        yield {"video": np.stack(frames), "colours": colour_matrix(bt709=False)}

    def _ask(self, runner: PipelineRunner, path: str, samples: Iterable[_Inputs]) -> list[list[np.ndarray]]:
        """Outputs of the samples of one medium."""
        if os.getpid() != self._process:
            raise RuntimeError("a DALI decoder serves only the process that made it")
        end = None if self._timeout is None else time.monotonic() + self._timeout
        waiting = [runner.submit(sample) for sample in samples]
        outputs = []
        for sample in waiting:
            try:
                outputs.append(sample.outputs.result(None if end is None else max(0, end - time.monotonic())))
            except FutureTimeout:
                runner.give_up(sample)
                raise Problem("decoding takes too long", f"{path}: more than {self._timeout:g} s") from None
        return outputs


def _encoded(path: str, index: FrameIndex) -> Iterator[_Inputs]:
    """Samples of small files.

    Raises:
        RemuxRefused: a video that the GPU's decoder gets wrong.
    """
    start = 0
    for end in range(1, len(index.pts) + 1):
        if end < len(index.pts):
            new_gop = index.seek_points[end] != index.seek_points[end - 1]
            if end - start < (_SAMPLE_FRAMES if new_gop else 2 * _SAMPLE_FRAMES):
                continue
        remux = sparse_remux(path, index.select(index.numbers[start:end]))
        if refused := gpu_refusal(remux):
            raise RemuxRefused(refused)
        yield {
            "video": np.frombuffer(remux.data, np.uint8),
            "frames": np.array(remux.frames, np.int32),
            "colours": colour_matrix(remux.colorspace == _BT709),
        }
        start = end


def gpu_refusal(remux: Remux) -> str | None:
    """Why DALI 2.4 would decode a video on a GPU to wrong pictures; None if it would not.

    Source: DALI's frames_decoder_gpu.cc and color_space.cu.
    """
    if remux.codec not in _GPU_CODECS:
        return f"codec {remux.codec}"
    if remux.hidden_frames:
        return f"hidden frames in {remux.codec}"
    if remux.reorder > _MAX_REORDER:
        return f"{remux.reorder} frames are decoded ahead"
    if remux.field_order not in _PROGRESSIVE:
        return "interlaced"
    if remux.width % 2 or remux.height % 2:
        return "odd size"  # its conversion to RGB works on blocks of 2 x 2
    if remux.colorspace not in (_BT709, *_BT601):
        return f"colour space {remux.colorspace}"
    return None


def _plain_jpeg(path: str, max_pixels: int) -> np.ndarray | None:
    """The bytes of a JPEG picture that DALI decodes as Pillow does, or None."""
    if page_ref(path):
        return None
    with open_bytes(path) as file:
        data = file.read()
    if data[:3] != b"\xff\xd8\xff":
        return None
    try:
        image = Image.open(io.BytesIO(data), formats=["JPEG"])
    except Exception:  # `load_image` says what is wrong with it
        return None
    plain = image.mode in ("RGB", "L") and image.width * image.height <= max_pixels
    return np.frombuffer(data, np.uint8) if plain else None
