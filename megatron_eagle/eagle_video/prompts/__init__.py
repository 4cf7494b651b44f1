"""Prompts in files `NAME.vN.txt` beside this one; the highest N is used, older ones stay for comparison."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

from megatron_eagle.config import load_yaml
from megatron_eagle.errors import UserError

SHIPPED = Path(__file__).resolve().parent
QUESTION_TYPES = SHIPPED.parent / "question_types.yaml"


@dataclass(frozen=True)
class Prompt:
    """A text with `$names`; `version` is the number of its file and the start of its SHA-256."""

    name: str
    version: str
    text: str

    def fill(self, **values: object) -> str:
        """The text with every `$name` replaced.

        Raises:
            UserError: one that the pipeline does not give.
        """
        try:
            return Template(self.text).substitute(values)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"prompt {self.name} ({self.version}): {error} is not known here; "
                f"known are {', '.join(f'${name}' for name in values)}, and $$ for a dollar"
            ) from None


def load_prompt(name: str, folder: Path | None = None) -> Prompt:
    """The newest version of a prompt, from `folder` if it has one, else shipped.

    Raises:
        UserError: there is no such prompt.
    """
    for place in (folder, SHIPPED) if folder else (SHIPPED,):
        found = [
            (int(m[1]), p)
            for p in place.glob(f"{name}.v*.txt")
            if (m := re.search(r"\.v(\d+)\.txt$", p.name))
        ]
        if found:
            number, path = max(found)
            text = path.read_text(encoding="utf-8")
            return Prompt(name, f"v{number}-{hashlib.sha256(text.encode()).hexdigest()[:12]}", text)
    raise UserError(f"there is no prompt {name}.vN.txt in {folder or SHIPPED}")


def load_question_types(path: Path | None = None) -> Mapping[str, str]:
    """Kind of question -> what it asks for.

    Raises:
        UserError: the file does not map texts to texts.
    """
    path = path or QUESTION_TYPES
    types = load_yaml(path)
    if not types or not all(isinstance(item, str) for pair in types.items() for item in pair):
        raise UserError(f"{path}: expected KIND: what it asks for, one a line")
    return types
