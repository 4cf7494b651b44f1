"""What a chat message holds, in one form, however its parts are written.

Self-contained: shipped inside every exported checkpoint and loaded with `trust_remote_code`
(transformers 4.51 to 5.x). A part says its kind by `type`, or by the key that it has. A key whose value is
None is not there: `datasets`, TRL and Arrow give every part of a column the same keys.
"""

from collections.abc import Iterable, Mapping
from typing import Any

# What `type` may say, and the keys that then may hold the medium, the first that is there.
_KINDS = {"text": "text", "image": "image", "image_url": "image", "video": "video", "video_url": "video"}
_SOURCES = {
    "image": ("image", "image_url", "url", "path", "base64"),
    "video": ("video", "video_url", "url", "path", "base64"),
}


def read_conversation(conversation: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A copy whose contents are text, or lists of parts as `read_part` gives them.

    Raises:
        ValueError: as `read_part`.
    """
    result = []
    for message in conversation:
        content = message.get("content")
        if content is None:  # of a turn that holds something else
            content = ""
        elif not isinstance(content, str):
            content = [read_part(part) for part in content]
        result.append({**message, "content": content})
    return result


def read_part(part: Mapping[str, Any]) -> dict[str, Any]:
    """`{"type": "text", "text": ...}`, or the medium under its `type` (None where it is given elsewhere)
    beside whatever else the part says.

    Raises:
        ValueError: neither text nor picture nor video.
    """
    given = {key: value for key, value in part.items() if value is not None}
    media = (key for key in _KINDS if key in given and key != "text")
    kind = _KINDS.get(given.pop("type", next(media, "text")))
    if kind is None or (kind == "text" and "text" not in given):
        raise ValueError(
            f"a part of a message is text, image or video, and this has type {part.get('type')} and "
            f"{', '.join(sorted(given)) or 'no value'}"
        )
    if kind == "text":
        return {"type": "text", "text": given["text"]}
    key = next((key for key in _SOURCES[kind] if key in given), None)
    source = None if key is None else given.pop(key)
    if isinstance(source, Mapping):  # as OpenAI's clients write a URL, and Arrow a file
        source = next((source[key] for key in ("url", "bytes", "path") if source.get(key) is not None), None)
    if key == "base64" and isinstance(source, str) and not source.startswith("data:"):
        source = f"data:{kind};base64,{source}"
    given.pop("text", None)
    return {**given, "type": kind, kind: source}
