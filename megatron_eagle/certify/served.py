"""A sample at a vLLM server with the export's plugin: what it has made of it, and its log-probabilities."""

import base64
import secrets
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.certify.store_samples import Asked
from megatron_eagle.certify.view import View
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.vllm_plugin.certificate import changed_files, file_digests, named
from megatron_eagle.inference.server_client import ServedModel


class CertifiedServer:
    """A server that serves the export `folder`, by its plugin.

    Attributes:
        dtype: in which it computes.
        version: vLLM's.
        max_positions: tokens that it takes; None: it does not say.

    Raises:
        UserError: it cannot be reached, is a stock vLLM or another program, or serves another export.
    """

    def __init__(
        self,
        endpoint: str,
        folder: Path,
        digests: dict[str, str] | None = None,
        timeout: float | None = None,
    ) -> None:
        self._served = served = ServedModel(endpoint, timeout=timeout)
        if served.cutting is None:
            raise UserError(
                f"{endpoint}: no vLLM with an export's plugin (no GET /v1/export): start it by "
                "`tools/serve_vllm.sh H`, without --stock"
            )
        settings = served.get("export")
        if "dtype" not in settings:
            raise UserError(
                f"{endpoint}: its plugin is older than `certify`: export the model again and restart"
            )
        theirs = served.get("export/files")
        changed = changed_files(digests or file_digests(folder), theirs)
        if changed:
            raise UserError(f"{endpoint}: serves another export than {folder}: {named(changed)} differ")
        self.dtype, self.version = str(settings["dtype"]), str(settings["vllm"])
        self.max_positions = served.read_max_positions()

    def ask(self, question: Asked) -> tuple[View, Tensor]:
        """What the server makes of a sample, and the log-probability [s - 1] of each token but the first.

        Raises:
            UserError: it refuses the sample.
        """
        number = secrets.token_hex(16)
        settings: dict[str, Any] = {"seen": number}
        if question.max_tiles is not None:
            settings["max_dynamic_tiles"] = question.max_tiles
        body: dict[str, Any] = {
            "model": self._served.model,
            "messages": _sent(question.messages),
            "add_generation_prompt": False,
            "max_tokens": 1,
            "temperature": 0,
            "return_token_ids": True,
            "prompt_logprobs": 0,
        }
        if question.training.media:
            body["mm_processor_kwargs"] = settings
        reply = self._served.post("chat/completions", body)
        ids, logprobs = reply.get("prompt_token_ids"), reply.get("prompt_logprobs")
        if not isinstance(ids, list) or not isinstance(logprobs, list):
            raise UserError("the server's reply has no prompt_token_ids and prompt_logprobs")
        media = []
        if question.training.media:
            media = self._served.get(f"export/seen/{number}")["media"]
        found = [float(row[str(token)]["logprob"]) for token, row in zip(ids[1:], logprobs[1:], strict=True)]
        return View(ids, media), torch.tensor(found)


def _sent(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages for the processor, in OpenAI's form: media as files."""
    return [{**message, "content": [_part(part) for part in message["content"]]} for message in messages]


def _part(part: dict[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    if kind == "text":
        return part
    url = f"data:{kind}/any;base64,{base64.b64encode(part[kind]).decode()}"
    settings = "&".join(f"{name}={value}" for name, value in part.items() if name not in ("type", kind))
    return {"type": f"{kind}_url", f"{kind}_url": {"url": f"{url}#{settings}" if settings else url}}
