"""One video made small: every frame as the one tile that the model sees, with a key frame every few frames.

Decoding one frame of a file costs all frames since the key frame before it.  Archives have hundreds of frames
between key frames, at many times a tile's pixels; the copies made here have neither.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from av.video.reformatter import ColorRange

from megatron_eagle.data.media.exact import read_frames
from megatron_eagle.data.media.frame_index import open_video, read_frame_table
from megatron_eagle.data.media.frame_table import FrameTable
from megatron_eagle.errors import FULL_DISK, UserError
from megatron_eagle.files import beside
from megatron_eagle.problems import Problem

# Threads of its own, as many as there are cores, would decide whether rows of blocks are coded apart.
_X265 = "pools=none:log-level=0"
# Encoder and options.  Without B-frames a frame is decoded when it is shown, so that times need no shifting.
CODECS = {
    "h264": ("libx264", {"preset": "medium", "bf": "0", "sc_threshold": "0"}),
    "hevc": ("libx265", {"preset": "medium", "x265-params": f"bframes=0:scenecut=0:open-gop=0:{_X265}"}),
    "vp9": ("libvpx-vp9", {"b": "0", "deadline": "good", "cpu-used": "4", "lag-in-frames": "0"}),
}
AUDIO = ("drop", "copy")
_LARGEST_TIMESCALE = 2**31 - 1  # what MP4 can hold


@dataclass(frozen=True)
class TranscodeSettings:
    """How copies are made.

    Attributes:
        size: pixels a side of a tile.
        gop: frames from one key frame to the next.
        crf: the encoder's constant quality (lower is better).
        audio: drop or copy.

    Raises:
        UserError: a value cannot be.
    """

    size: int = 448
    gop: int = 8
    codec: str = "h264"
    crf: int = 20
    audio: str = "drop"

    def __post_init__(self) -> None:
        if self.size < 16 or self.size % 2:
            raise UserError(f"--size must be an even number of at least 16 pixels, got {self.size}")
        if self.gop < 1:
            raise UserError(f"--gop must be at least 1 frame, got {self.gop}")
        if self.codec not in CODECS:
            raise UserError(f"--codec must be one of {', '.join(CODECS)}, got {self.codec}")
        if not 0 <= self.crf <= 51:
            raise UserError(f"--crf must be from 0 to 51, got {self.crf}")
        if self.audio not in AUDIO:
            raise UserError(f"--audio must be one of {', '.join(AUDIO)}, got {self.audio}")


def transcode_video(source: str, target: Path, settings: TranscodeSettings) -> int:
    """Write `target`, an MP4 file, whole or not at all.

    It has the frames of `source` at exactly their presentation times, upright (no rotation is left to apply),
    stretched towards the square that training makes of them, but to no more pixels than they have; players
    are told the shape that they had.  The copy is read back, and its number of frames and every time compared
    with the source.

    Returns:
        How many frames it has.

    Raises:
        Problem: the source cannot be decoded to its end, or has times that MP4 cannot hold.
        OSError: the copy cannot be written.
    """
    table = read_frame_table(source)
    if table.pts[0] < 0 or table.time_base.denominator > _LARGEST_TIMESCALE:
        raise Problem("times not kept", f"{source}: begins before 0 or counts too finely for MP4")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with beside(target) as partial:
            _encode(source, table, partial, settings)
            _compare(table, read_frame_table(str(partial)), source)
    except av.error.FFmpegError as error:
        if error.errno in FULL_DISK:
            raise OSError(error.errno, error.strerror) from None
        raise Problem("cannot transcode", f"{source}: {error.strerror}") from None
    return len(table.pts)


def _encode(source: str, table: FrameTable, target: Path, settings: TranscodeSettings) -> None:
    scale = table.time_base.denominator  # MP4's times are multiples of 1 / timescale
    timescales = {"video_track_timescale": str(scale), "movie_timescale": str(scale)}
    frames = read_frames(source, table.index)
    first = next(frames)
    with (
        open_video(source) as sound,
        av.open(str(target), "w", format="mp4", container_options=timescales) as container,
    ):
        stream = _video_stream(container, first, table, settings)
        shown_as = sound.streams[table.stream]
        assert isinstance(shown_as, av.VideoStream), "as indexed"
        shape = _shape(shown_as, table.rotation)
        stream.sample_aspect_ratio = shape * stream.height / stream.width
        packets = _audio(sound, container) if settings.audio == "copy" else iter(())
        waiting = next(packets, None)
        for pts, frame in zip(table.pts.tolist(), chain((first,), frames), strict=True):
            while waiting is not None and _due(waiting) <= pts * table.time_base:
                container.mux(waiting)
                waiting = next(packets, None)
            shown = _turned(frame, table.rotation).reformat(
                width=stream.width,
                height=stream.height,
                format="yuv420p",
                interpolation="BICUBIC",
                dst_color_range="MPEG",
            )
            shown.pts, shown.time_base = pts * table.time_base.numerator, Fraction(1, scale)
            container.mux(stream.encode(shown))
        container.mux(stream.encode())
        while waiting is not None:
            container.mux(waiting)
            waiting = next(packets, None)


def _due(packet: "av.Packet[av.AudioStream]") -> Fraction:
    assert packet.dts is not None and packet.time_base is not None, "_audio gives none without"
    return packet.dts * packet.time_base


def _video_stream(
    container: OutputContainer, first: av.VideoFrame, table: FrameTable, settings: TranscodeSettings
) -> av.VideoStream:
    """The stream of the copy: colours are coded as in the source, since converting them loses some."""
    encoder, options = CODECS[settings.codec]
    span = (int(table.pts[-1]) - int(table.pts[0])) * table.time_base
    rate = (len(table.pts) - 1) / span if span else Fraction(1)
    stream = container.add_stream(encoder, rate=rate.limit_denominator(1001))
    assert isinstance(stream, av.VideoStream), "all CODECS are of video"
    size = (first.height, first.width) if table.rotation % 180 else (first.width, first.height)
    stream.width, stream.height = (min(settings.size, pixels + pixels % 2) for pixels in size)
    stream.pix_fmt = "yuv420p"
    stream.gop_size = settings.gop
    stream.thread_count = 1  # files are made side by side
    stream.options = {**options, "crf": str(settings.crf)}
    coder = stream.codec_context
    stream.time_base = coder.time_base = Fraction(1, table.time_base.denominator)
    coder.colorspace, coder.color_range = first.colorspace, ColorRange.MPEG
    coder.color_primaries, coder.color_trc = first.color_primaries, first.color_trc
    return stream


def _turned(frame: av.VideoFrame, rotation: int) -> av.VideoFrame:
    """The frame upright, its colours as they are coded."""
    if not rotation:
        return frame
    planes = frame.reformat(format="yuv444p").to_ndarray()  # [3, h, w]
    turned = np.ascontiguousarray(np.rot90(planes, rotation // 90, axes=(1, 2)))
    result = av.VideoFrame.from_ndarray(turned, format="yuv444p")
    result.colorspace, result.color_range = frame.colorspace, frame.color_range
    return result


def _shape(stream: av.VideoStream, rotation: int) -> Fraction:
    """Width over height, as a player shows the stream."""
    shape = Fraction(stream.width, stream.height) * (stream.sample_aspect_ratio or 1)
    return 1 / shape if rotation % 180 else shape


def _audio(
    source: av.container.InputContainer, target: OutputContainer
) -> "Iterator[av.Packet[av.AudioStream]]":
    """The packets of the first audio stream, as those of a new stream of `target`."""
    if not source.streams.audio:
        return iter(())
    copy = target.add_stream_from_template(source.streams.audio[0])

    def packets() -> "Iterator[av.Packet[av.AudioStream]]":
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = copy
                yield packet

    return packets()


def _compare(wanted: FrameTable, made: FrameTable, source: str) -> None:
    times = [int(pts) * wanted.time_base for pts in wanted.pts]
    found = [int(pts) * made.time_base for pts in made.pts]
    if times != found or made.rotation:
        differ = sum(a != b for a, b in zip(times, found, strict=False)) + abs(len(times) - len(found))
        raise Problem(
            "times not kept", f"{source}: {differ} of {len(times)} frames of the copy are elsewhere"
        )
