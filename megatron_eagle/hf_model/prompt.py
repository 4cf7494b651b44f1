"""What a prompt says, in training (its `hf` variant) and in every export: tokens, labels, chat template."""

from collections.abc import Iterable
from dataclasses import dataclass

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
IMG_START, IMG_END, IMG_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
SYSTEM_PROMPT = "You are a helpful assistant."
_ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]

# Every turn is `<|im_start|>{role}\n{content}<|im_end|>\n`, content stripped. A media item becomes
# `<image-k>` or `<video-k>` (global counters, from 1), unless some text of the conversation places it. What
# an item is says its type, or the key that it has; keys without a value are not there (`content.read_part`).
_TEMPLATE = """\
{%- macro has(value) -%}{%- if value is defined and value is not none -%}yes{%- endif -%}{%- endmacro -%}
{%- macro kind(item) -%}
{%- if has(item['type']) -%}{{- item['type'] | replace('_url', '') -}}
{%- elif has(item['image']) or has(item['image_url']) -%}image
{%- elif has(item['video']) or has(item['video_url']) -%}video
{%- elif has(item['text']) -%}text
{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(images=0, videos=0, all='', turn='') -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}{%- set ns.all = ns.all ~ message['content'] -%}
{%- elif has(message['content']) -%}
{%- for item in message['content'] -%}
{%- if kind(item) == 'text' -%}{%- set ns.all = ns.all ~ item['text'] -%}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nSYSTEM_PROMPT<|im_end|>\\n' -}}
{%- endif -%}
{%- set ns.turn = '' -%}
{%- if message['content'] is string -%}{%- set ns.turn = message['content'] -%}
{%- elif has(message['content']) -%}
{%- for item in message['content'] -%}
{%- if kind(item) == 'image' -%}
{%- set ns.images = ns.images + 1 -%}
{%- set tag = '<image-' ~ ns.images ~ '>' -%}
{%- if tag not in ns.all -%}{%- set ns.turn = ns.turn ~ tag -%}{%- endif -%}
{%- elif kind(item) == 'video' -%}
{%- set ns.videos = ns.videos + 1 -%}
{%- set tag = '<video-' ~ ns.videos ~ '>' -%}
{%- if tag not in ns.all -%}{%- set ns.turn = ns.turn ~ tag -%}{%- endif -%}
{%- elif kind(item) == 'text' -%}{%- set ns.turn = ns.turn ~ item['text'] -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ (ns.turn | trim) ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
CHAT_TEMPLATE = _TEMPLATE.replace("SYSTEM_PROMPT", SYSTEM_PROMPT)


def image_label(number: int) -> str:
    """What stands before the tiles of picture `number`, from 1."""
    return f"<image {number}>"


def ordinal(number: int) -> str:
    """`number`, from 1, in a word up to ten."""
    return _ORDINALS[number - 1] if number <= len(_ORDINALS) else str(number)


def video_label(number: int, fps: float) -> str:
    """What stands before the frames of video `number`, from 1."""
    return f"The {ordinal(number)} video sampled with {fps:.2f} fps: "


def frame_label(number: int, time: float) -> str:
    """What stands before frame `number`, from 1, shown at `time` seconds."""
    return f"Frame {number} sample at {time:.2f}s: "


def subtitle_lines(texts: Iterable[str]) -> str:
    """What stands between two frames with these subtitles: each on a line of its own."""
    lines = "".join(f"{text}\n" for text in texts)
    return f"\n{lines}" if lines else ""


@dataclass(frozen=True)
class PromptMedium:
    """What a prompt says of a picture or a video.

    Attributes:
        tiles: of the picture, or of each frame.
        fps: of a video, as sampled.
        times: of its frames, in seconds.
        said: subtitles between them, each with the number of frames before it.
    """

    tiles: tuple[int, ...]
    fps: float | None = None
    times: tuple[float, ...] = ()
    said: tuple[tuple[int, str], ...] = ()

    def write(self, number: int, tokens_per_tile: int) -> str:
        """Labels and image tokens of picture or video `number`, from 1."""
        tokens = [f"{IMG_START}{IMG_CONTEXT * (count * tokens_per_tile)}{IMG_END}" for count in self.tiles]
        if self.fps is None:
            return image_label(number) + "".join(tokens)
        frames = [
            self._said_after(i) + frame_label(i + 1, time) + own
            for i, (time, own) in enumerate(zip(self.times, tokens, strict=True))
        ]
        return video_label(number, self.fps) + "".join(frames) + self._said_after(len(frames))

    def _said_after(self, frames: int) -> str:
        return subtitle_lines(text for before, text in self.said if before == frames)
