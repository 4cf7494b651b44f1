"""Every sample through every path, in order, each compared with the one before it, into a certificate.

training's data path -> the exported processor -> the export in transformers -> vLLM with the plugin at an
endpoint; and other kits' messages, where a kit is installed.
"""

import importlib.metadata
import json
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from megatron_eagle import __version__
from megatron_eagle.certify.exported import (
    TransformersModel,
    apart,
    megatron_logits,
    seen_by_processor,
    token_logprobs,
)
from megatron_eagle.certify.kits import installed_kits, kit_views
from megatron_eagle.certify.made_samples import BEYOND, LINES, make_store
from megatron_eagle.certify.served import CertifiedServer
from megatron_eagle.certify.store_samples import Asked, AskedOfStore
from megatron_eagle.certify.view import Parting, View, first_parting
from megatron_eagle.checkpoint import checkpoint_folder
from megatron_eagle.data.sampling.ads import SamplingSettings
from megatron_eagle.errors import UserError
from megatron_eagle.files import write_whole
from megatron_eagle.hf_model.vllm_plugin.certificate import CERTIFICATE, file_digests
from megatron_eagle.hf_model.vllm_plugin.seen import tensor_hash
from megatron_eagle.inference.generate import load_processor

PATHS = ("processor", "transformers", "vllm")  # beside "training", with which they are compared
_MOST_ON_CPU = 8192  # tokens: Megatron's attention writes its scores whole there
TRIMMED = "white space at the ends of a turn is trimmed, in training as by the processor"


@dataclass(frozen=True)
class CertifySettings:
    """What is certified, and by what.

    Attributes:
        hf: the export.
        checkpoint: whose logits are compared with the export's; None: they are not.
        endpoint: of a server with the plugin; None: none is asked.
        store, samples: so many samples of a token store; None: samples are made.
        logits, logprobs: how far they may be apart, in transformers and in vLLM.
        timeout: seconds without a byte from the server; None: by its length.
    """

    hf: Path
    checkpoint: Path | None = None
    endpoint: str | None = None
    store: Path | None = None
    samples: int = 16
    logits: float = 1e-4
    logprobs: float = 1e-3
    timeout: float | None = None
    command: Sequence[str] = ()


@dataclass
class SampleResult:
    """What the paths made of a sample: hashes of each stage by path, how far numbers are apart, the first
    difference of each path, and what was not compared."""

    name: str
    tokens: int
    positions: list[int]
    hashes: dict[str, dict[str, str]] = field(default_factory=dict)
    apart: dict[str, float] = field(default_factory=dict)
    differences: dict[str, Parting] = field(default_factory=dict)
    not_compared: list[str] = field(default_factory=list)

    @property
    def first(self) -> str | None:
        """The first difference in the paths' order, in words."""
        path = next((path for path in PATHS if path in self.differences), None)
        return None if path is None else f"{path}: {self.differences[path]}"


@dataclass(frozen=True)
class Certificate:
    """What came out; `content` is that of certificate.json."""

    results: list[SampleResult]
    content: dict[str, Any]

    @property
    def green(self) -> bool:
        """Whether every path is the same on every sample."""
        return bool(self.content["green"])


def certify(settings: CertifySettings) -> Certificate:
    """Compare every path on every sample, and write certificate.json into the export.

    Raises:
        UserError: no export, a checkpoint or a store of another model, or a server that does not serve it.
    """
    processor = load_processor(settings.hf)
    if not hasattr(processor.image_processor, "grid"):
        raise UserError(f"{settings.hf}: its processor is older than `certify`: export the model again")
    digests = file_digests(settings.hf)
    server = None
    if settings.endpoint is not None:
        server = CertifiedServer(settings.endpoint, settings.hf, digests, settings.timeout)
    model = TransformersModel(settings.hf)
    longest = max(model.max_positions, (server and server.max_positions or 1) - 1)
    with tempfile.TemporaryDirectory() as folder:
        questions, by_design = _questions(settings, processor, model, Path(folder), longest)
    results = _Run(settings, processor, model, server).results(questions)
    content = _content(settings, digests, server, results, [TRIMMED, *by_design])
    try:
        write_whole(settings.hf / CERTIFICATE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(
            f"{settings.hf / CERTIFICATE}: cannot be written: {error.strerror or error}"
        ) from None
    return Certificate(results, content)


def _questions(
    settings: CertifySettings, processor: Any, model: TransformersModel, folder: Path, longest: int
) -> tuple[list[Asked], list[str]]:
    """The samples, and what differs between the store and answers by design."""
    images = processor.image_processor
    cutting = {
        "tile_size": images.size["height"],
        "tiling": images.tiling,
        "max_tiles": images.max_dynamic_tiles,
    }
    sampling = SamplingSettings(**cutting)
    patch_size = model.model.config.vision_config.patch_size

    def opened(path: Path) -> AskedOfStore:
        return AskedOfStore(path, cutting, processor.tokens_per_tile)

    made = opened(make_store(folder, settings.hf, sampling, patch_size, longest))
    questions = [replace(q, name=f"made: {LINES[q.line - 1]}") for q in made.read(None)]
    questions.sort(key=lambda question: question.line)
    store = made
    if settings.store is not None:
        store = opened(settings.store)
        own = list(store.read(settings.samples))
        enough = any(len(question.training.ids) > BEYOND for question in own)
        questions = own + [q for q in questions if len(q.training.ids) > BEYOND and not enough]
    able = [question for question in questions if question.refused is None]
    if able:  # what a model does there does not depend on what precedes
        near = min(able, key=lambda question: len(question.training.ids))
        name = f"{near.name}, from position {BEYOND:,}"
        questions.append(replace(near, name=name, first_position=BEYOND))
    return questions, store.by_design()


class _Run:
    """The paths, ready."""

    def __init__(
        self,
        settings: CertifySettings,
        processor: Any,
        model: TransformersModel,
        server: CertifiedServer | None,
    ) -> None:
        self.settings, self.processor, self.model, self.server = settings, processor, model, server

    def results(self, questions: list[Asked]) -> list[SampleResult]:
        """Of every sample."""
        asked = [question for question in questions if question.refused is None]
        if not torch.cuda.is_available():
            asked = [question for question in asked if len(question.training.ids) <= _MOST_ON_CPU]
        ours: dict[int, torch.Tensor] = {}
        if self.settings.checkpoint is not None:
            logits = megatron_logits(self.settings.checkpoint, asked)
            ours = {id(question): own for question, own in zip(asked, logits, strict=True)}
        return [self._result(question, ours.get(id(question))) for question in questions]

    def _result(self, question: Asked, ours: torch.Tensor | None) -> SampleResult:
        training, start = question.training, question.first_position
        result = SampleResult(question.name, len(training.ids), [start, start + len(training.ids) - 1])
        result.hashes["training"] = training.hashes()
        if question.refused is not None:
            result.not_compared.append(f"every path: {question.refused}")
            return result
        try:
            view, pixels = seen_by_processor(self.processor, question)
        except ValueError as error:
            result.differences["processor"] = Parting("ids", f"refused: {error}")
            return result
        self._compare(result, "processor", training, view)
        logits = self.model.logits(view.ids, pixels, start)
        if "processor" in result.differences:
            result.not_compared.append("transformers' logits: the model is given something else")
        elif ours is None:
            named = self.settings.checkpoint is not None
            why = "more tokens than Megatron's attention can have on a CPU" if named else "no --checkpoint"
            result.not_compared.append(f"transformers' logits with training's: {why}")
        else:
            self._number(result, "transformers", "logits", apart(ours, logits), self.settings.logits)
        result.hashes["transformers"] = {"logits": tensor_hash(logits)}
        self._ask(result, question, view, logits)
        for kit, found in kit_views(self.processor, question).items():
            if isinstance(found, Parting):
                result.differences[kit] = found
            else:
                self._compare(result, kit, view, found)
        return result

    def _ask(self, result: SampleResult, question: Asked, view: View, logits: torch.Tensor) -> None:
        if self.server is None:
            return
        limit = self.server.max_positions
        if question.first_position:
            result.not_compared.append("vllm: positions of a prompt begin at 0 there")
        elif limit is not None and len(view.ids) >= limit:
            result.not_compared.append(f"vllm: the server takes {limit:,} tokens with an answer")
        else:
            try:
                found, logprobs = self.server.ask(question)
            except UserError as error:
                result.differences["vllm"] = Parting("ids", f"refused: {error}")
                return
            self._compare(result, "vllm", view, found)
            if "vllm" not in result.differences:
                expected = token_logprobs(logits, view.ids)
                far = float((expected - logprobs).abs().max())
                self._number(result, "vllm", "prompt_logprobs", far, self.settings.logprobs)

    @staticmethod
    def _compare(result: SampleResult, path: str, expected: View, found: View) -> None:
        result.hashes[path] = found.hashes()
        difference = first_parting(expected, found)
        if difference is not None:
            result.differences[path] = difference

    @staticmethod
    def _number(result: SampleResult, path: str, what: str, far: float, tolerance: float) -> None:
        result.apart[f"{path}: {what}"] = far
        if not far <= tolerance:  # also where it is no number
            result.differences[path] = Parting(what, f"{far:.2g} apart, {tolerance:g} allowed")


def _content(
    settings: CertifySettings,
    digests: dict[str, str],
    server: CertifiedServer | None,
    results: list[SampleResult],
    by_design: list[str],
) -> dict[str, Any]:
    firsts = [f"{result.name}: {result.first}" for result in results if result.first]
    compared = [result for result in results if "processor" in result.hashes or result.differences]
    checkpoint = None
    if settings.checkpoint is not None:
        checkpoint = f"{settings.checkpoint.name}/{checkpoint_folder(settings.checkpoint).name}"
    return {
        "green": bool(compared) and not firsts,
        "first_difference": firsts[0] if firsts else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(settings.command),
        "versions": {
            "megatron_eagle": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "pillow", "av")},
            "vllm": None if server is None else server.version,
        },
        "paths": {
            "training": "made samples" if settings.store is None else f"store {settings.store.name}",
            "processor": "the export's",
            "transformers": f"against {checkpoint}" if checkpoint else "not compared with a checkpoint",
            "vllm": "not asked" if server is None else server.dtype,
            "kits": ", ".join(installed_kits()) or "none is installed (vlmeval, lmms_eval)",
        },
        "tolerances": {"logits": settings.logits, "prompt_logprobs": settings.logprobs},
        "by_design": by_design,
        "files": digests,
        "samples": [
            {
                "name": result.name,
                "tokens": result.tokens,
                "positions": result.positions,
                "first_difference": result.first,
                "differences": {path: str(found) for path, found in result.differences.items()},
                "apart": result.apart,
                "not_compared": result.not_compared,
                "hashes": result.hashes,
            }
            for result in results
        ],
    }
