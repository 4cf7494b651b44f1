"""The export that is served: its processor, out of its own files."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAME = "eagle2_5"  # of the plugin, the tokenizer mode and the media connector
ANSWER = "answer_tokens"  # from the renderer to the processor, in a request's mm_processor_kwargs


def served_processor(model_config: Any) -> Any:
    """Of vLLM's `model_config`.

    Raises:
        ValueError: an export of a version whose processor does not know of this plugin.
    """
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(
        model_config.model,
        revision=model_config.revision,
        trust_remote_code=model_config.trust_remote_code,
    )
    if not hasattr(processor, "fit"):
        raise ValueError(f"{model_config.model}: its processor is older than this plugin; export it again")
    return processor


def load_medium(processor: Any, part: dict[str, Any]) -> Any:
    """The picture or the video of a part of a message.

    Raises:
        ValueError: it cannot be read, or the export is older than what the part says.
    """
    if part.get("subtitles") and not hasattr(processor, "takes_subtitles"):
        raise ValueError("this export leaves subtitles of videos out; export it again")
    with reading():
        images, videos = processor.process_vision_info([{"role": "user", "content": [part]}])
    return (images or videos)[0]


@contextmanager
def reading() -> Iterator[None]:
    """What a server lacks for videos is said in a line.

    Raises:
        ValueError: it lacks it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"this server cannot read videos: {error} (pip install av)") from None


def prompt_medium(processor: Any) -> Any:
    """Its class of what a prompt says of a medium."""
    return sys.modules[type(processor).__module__].PromptMedium
