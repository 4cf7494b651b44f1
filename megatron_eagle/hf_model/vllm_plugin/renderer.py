"""Messages to a prompt: special tokens that a user typed stay text, as the export's processor reads them."""

import threading
from typing import Any

from vllm.renderers.hf import HfRenderer

from .export import ANSWER, served_processor

_TEXTS = ("text", "refusal", "thinking")  # where parts of messages have text


def _with_answer(prompt: Any, options: Any) -> Any:
    """The processor makes room for the answer; 0 tokens: the request does not say how many it may have."""
    if not prompt.get("multi_modal_data"):
        return prompt
    answer = getattr(options.get("tok_params"), "max_output_tokens", 0)
    return {**prompt, "mm_processor_kwargs": {**(prompt.get("mm_processor_kwargs") or {}), ANSWER: answer}}


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

    def process_for_engine(self, prompt: Any, *arguments: Any, **options: Any) -> Any:
        """vLLM's, of a prompt that says how long its answer may be."""
        return super().process_for_engine(_with_answer(prompt, options), *arguments, **options)

    async def process_for_engine_async(self, prompt: Any, *arguments: Any, **options: Any) -> Any:
        """vLLM's, of a prompt that says how long its answer may be."""
        return await super().process_for_engine_async(_with_answer(prompt, options), *arguments, **options)

    def _shielded(self, messages: Any) -> list[dict[str, Any]]:
        with self._in_use:
            return [{**message, **self._content(message)} for message in messages]

    def _content(self, message: Any) -> dict[str, Any]:
        content, role = message.get("content"), message["role"]
        if content is None:
            return {}
        if isinstance(content, str):
            return {"content": self._export.shield(content, role)}
        return {"content": [self._shielded_part(part, role) for part in content]}

    def _shielded_part(self, part: Any, role: str) -> Any:
        if isinstance(part, str):
            return self._export.shield(part, role)
        texts = {name: part[name] for name in _TEXTS if isinstance(part.get(name), str)}
        return {**part, **{name: self._export.shield(text, role) for name, text in texts.items()}}

    def _tokenize_prompt(self, prompt: Any, params: Any) -> Any:
        if prompt.get("multi_modal_data") or prompt.get("multi_modal_uuids"):
            # The shields go through to `processing`, which writes and encodes the whole prompt once more.
            return super()._tokenize_prompt(prompt, params)
        with self._in_use:
            self._export.place(prompt["prompt"], {"image": [], "video": []})  # refuses a placeholder
            return self._build_tokens_prompt(self._export.encode(prompt["prompt"]), prompt)
