"""What an evaluation kit makes of a sample's messages before it sends them, where one is installed.

Kits write pictures anew (VLMEvalKit as JPEG, lmms-eval as PNG), and videos as frames of their own: samples
with text and pictures in one question are asked here. How a kit writes pictures is no fault of an export: its
difference is named, and makes no certificate red; so is a picture that a kit cannot write.
"""

import importlib
import importlib.util
import io
import ssl
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from PIL import Image

from megatron_eagle.certify.exported import seen_by_processor
from megatron_eagle.certify.store_samples import Asked
from megatron_eagle.certify.view import Parting, View

_Parts = list[dict[str, Any]]


def _vlmevalkit(parts: _Parts) -> _Parts:
    """As its class for OpenAI's API does."""
    checked = ssl._create_default_https_context  # the import replaces it, for all of the process, by no check
    encode = importlib.import_module("vlmeval.smp").encode_image_to_base64
    ssl._create_default_https_context = checked
    return [
        {"type": "image_url", "image_url": f"data:image/jpeg;base64,{encode(_opened(part))}"}
        if part["type"] == "image"
        else part
        for part in parts
    ]


def _lmms_eval(parts: _Parts) -> _Parts:
    """As its models for OpenAI's API do."""
    content = [{"type": "image", "url": _opened(part)} if part["type"] == "image" else part for part in parts]
    protocol = importlib.import_module("lmms_eval.protocol")
    messages = protocol.ChatMessages(messages=[{"role": "user", "content": content}])
    sent: _Parts = messages.to_openai_messages()[0]["content"]
    return sent


_KITS: dict[str, Callable[[_Parts], _Parts]] = {"vlmeval": _vlmevalkit, "lmms_eval": _lmms_eval}


def installed_kits() -> list[str]:
    """Their packages, those that are there."""
    return [name for name in _KITS if importlib.util.find_spec(name) is not None]


def kit_views(processor: Any, question: Asked) -> dict[str, View | Parting]:
    """By kit, what the exported processor sees of its messages; none of a sample that kits would not send.

    In place of messages that cannot be written or seen stands why.
    """
    asked = [message for message in question.messages if message["role"] == "user"]
    kinds = {part["type"] for message in asked for part in message["content"]}
    if len(asked) != 1 or "video" in kinds or question.first_position:
        return {}
    found: dict[str, View | Parting] = {}
    for name in installed_kits():
        try:
            sent = {"role": "user", "content": _KITS[name](asked[0]["content"])}
            messages = [sent if message is asked[0] else message for message in question.messages]
            found[name] = seen_by_processor(processor, replace(question, messages=messages))[0]
        except (OSError, ValueError) as error:  # an OSError is Pillow's, which the kits do not catch
            found[name] = Parting("pixels", f"refused: {error}")
    return found


def _opened(part: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(part["image"]))
