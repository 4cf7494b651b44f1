"""Messages to a prompt: special tokens that a user typed stay text, as the export's processor reads them."""

import threading
from typing import Any

from vllm.renderers.hf import HfRenderer

from .export import served_processor


class Eagle2_5_VLRenderer(HfRenderer):
    """vLLM's renderer of chat templates, around text that is shielded."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self._export = served_processor(config.model_config)
        self._in_use = threading.Lock()  # tokenizers are not made for several threads

    def render_messages(self, messages: Any, params: Any) -> Any:
        """vLLM's, of shielded text."""
        return super().render_messages(self._shielded(messages), params)

    async def render_messages_async(self, messages: Any, params: Any) -> Any:
        """vLLM's, of shielded text."""
        return await super().render_messages_async(self._shielded(messages), params)

    def _shielded(self, messages: Any) -> list[dict[str, Any]]:
        return [{**message, **self._content(message)} for message in messages]

    def _content(self, message: Any) -> dict[str, Any]:
        content, role = message.get("content"), message["role"]
        if content is None:
            return {}
        if isinstance(content, str):
            return {"content": self._export.shield(content, role)}
        parts: list[Any] = []
        for part in content:
            if isinstance(part, str):
                parts.append(self._export.shield(part, role))
            elif isinstance(part.get("text"), str):
                parts.append({**part, "text": self._export.shield(part["text"], role)})
            else:
                parts.append(part)
        return {"content": parts}

    def _tokenize_prompt(self, prompt: Any, params: Any) -> Any:
        if prompt.get("multi_modal_data") or prompt.get("multi_modal_uuids"):
            # The shields go through to `processing`, which writes and encodes the whole prompt once more.
            return super()._tokenize_prompt(prompt, params)
        with self._in_use:
            return self._build_tokens_prompt(self._export.encode(prompt["prompt"]), prompt)
