"""The certificate.json of an export: what `megatron-eagle convert certify` found, and of which files.

`python -m eagle2_5_vllm.certificate H` prints a line where the export H has one.
"""

import hashlib
import json
import sys
from pathlib import Path

CERTIFICATE = "certificate.json"
# What decides on answers: weights, code, settings, vocabularies.
_SUFFIXES = (".json", ".py", ".jinja", ".safetensors", ".bin", ".txt", ".model")
_OTHERS = (CERTIFICATE, "megatron_eagle_export.json")  # they speak of the folder


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of an export that decides on its answers, by its name in the folder."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith((".", "__")) for part in name.parts[:-1])
        if path.is_file() and path.suffix in _SUFFIXES and str(name) not in _OTHERS and not hidden:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(1 << 20):  # vLLM also runs on a Python without `file_digest`
                    digest.update(block)
            digests[name.as_posix()] = digest.hexdigest()
    return digests


def certificate_line(folder: Path, digests: dict[str, str] | None = None) -> str | None:
    """What an export's certificate says of it, in a line; None: it has none, or one that cannot be read.

    `digests` are those of the folder (`file_digests`), where they are known.
    """
    try:
        content = json.loads((folder / CERTIFICATE).read_text(encoding="utf-8"))
        green, date, files = content["green"], content["date"], dict(content["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    changed = changed_files(files, file_digests(folder) if digests is None else digests)
    if changed:
        return f"{CERTIFICATE} is of other files ({named(changed)} changed since): certify the export again"
    if not green:
        return f"{CERTIFICATE} of {date} is RED: {content.get('first_difference')}"
    return f"{CERTIFICATE} of {date} is green"


def changed_files(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names of the files whose digests differ, or that one side alone has."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def named(names: list[str]) -> str:
    """The first of some names, in words."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


if __name__ == "__main__":
    if line := certificate_line(Path(sys.argv[1])):
        print(f"{sys.argv[1]}: {line}")
