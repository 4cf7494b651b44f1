"""Who answered: versions and the certificate, a line of `asked.jsonl` for each start that asked something."""

import importlib.metadata
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_eagle import __version__
from megatron_eagle.errors import UserError
from megatron_eagle.files import AppendedFile, to_line
from megatron_eagle.hf_model.vllm_plugin.certificate import certificate_line
from megatron_eagle.inference.generate import Answers, ExportedModel
from megatron_eagle.inference.server_client import ServedModel

ASKED = "asked.jsonl"
_LIBRARIES = ("torch", "transformers", "pillow", "av")


def note_asked(folder: Path, model: Answers) -> None:
    """Add a line of what is about to answer."""
    versions = {"megatron_eagle": __version__}
    certificate = None
    if isinstance(model, ExportedModel):
        versions |= {name: importlib.metadata.version(name) for name in _LIBRARIES}
        certificate = certificate_line(model.folder)
    elif isinstance(model, ServedModel):
        about = _told(model, "export")
        versions |= {"vllm": about["vllm"]} if about.get("vllm") else {}
        certificate = _told(model, "export/certificate").get("certificate")
    date = datetime.now(UTC).isoformat(timespec="seconds")
    with AppendedFile(folder / ASKED) as file:
        file.write(to_line({"date": date, "versions": versions, "certificate": certificate}))


def _told(model: ServedModel, path: str) -> dict[str, Any]:
    """What only a server with the export's plugin tells."""
    try:
        return model.get(path)
    except UserError:
        return {}
