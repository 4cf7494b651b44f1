"""What a prompt says, in training (its `hf` variant) and in every export: tokens, labels, chat template."""

from collections.abc import Container, Iterable
from dataclasses import dataclass

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
IMG_START, IMG_END, IMG_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
# Of language models that think before they answer. One that is not to think, or has not, says so by a block
# without thoughts before its answer.
THINK, END_THINK = "<think>", "</think>"
NO_THOUGHTS = f"{THINK}\n\n{END_THINK}\n\n"
SYSTEM_PROMPT = "You are a helpful assistant."
_ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]

# Every turn is `<|im_start|>{role}\n{content}<|im_end|>\n`, content stripped. A media item becomes
# `<image-k>` or `<video-k>` (global counters, from 1), unless some text of the conversation places it. What
# an item is says its type, or the key that it has; keys without a value are not there (`content.read_part`).
# NO_THOUGHTS stand before answers that do not begin with thoughts, and before the one that is asked for
# unless `enable_thinking` is true.
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
{%- set ns.turn = ns.turn | trim -%}
BEFORE_ANSWER{{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ ns.turn ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}BEFORE_ASKED{%- endif -%}
"""
_BEFORE_ANSWER = """\
{%- if message['role'] == 'assistant' and not ns.turn.startswith('THINK') -%}
{%- set ns.turn = 'NO_THOUGHTS' ~ ns.turn -%}
{%- endif -%}
"""
_BEFORE_ASKED = "{%- if not enable_thinking -%}{{- 'NO_THOUGHTS' -}}{%- endif -%}"


def thinks(vocabulary: Container[str]) -> bool:
    """Whether the language model of this tokenizer thinks: it has the tokens around thoughts."""
    return THINK in vocabulary and END_THINK in vocabulary


def chat_template(*, thinks: bool) -> str:
    """The chat template of an export, in Jinja."""
    before = (_BEFORE_ANSWER, _BEFORE_ASKED) if thinks else ("", "")
    template = _TEMPLATE.replace("BEFORE_ANSWER", before[0]).replace("BEFORE_ASKED", before[1])
    block = NO_THOUGHTS.replace("\n", "\\n")
    template = template.replace("NO_THOUGHTS", block).replace("'THINK'", f"'{THINK}'")
    return template.replace("SYSTEM_PROMPT", SYSTEM_PROMPT)


CHAT_TEMPLATE = chat_template(thinks=False)


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
