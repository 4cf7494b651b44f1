"""The file map of docs/files.md, made from the docstrings; `make docs` writes it with all generated parts."""

import ast
import json
import subprocess
from itertools import groupby
from pathlib import Path

from tests.paths import REPO

# What cannot say it in a docstring.
DESCRIPTIONS = {
    ".ci/run": "continuous integration: `make test`",
    ".dockerignore": "what the image leaves out",
    ".gitignore": "what git leaves out",
    ".github/ISSUE_TEMPLATE/fault.yml": "what to say of something that is wrong",
    ".github/ISSUE_TEMPLATE/wish.yml": "what to say of something that is missing",
    ".github/pull_request_template.md": "why, and what proves it",
    "Dockerfile": "GPU image; its first lines say what has been built and run",
    "LICENSE": "Apache-2.0",
    "Makefile": "make demo, test, test-all and its parts, docs, readme, parity, lint, format, env, clean",
    "README.md": "what it is, for whom, its state, the first commands",
    "constraints-cpu.txt": "every package of the CPU environment, pinned",
    "pyproject.toml": "settings of ruff, mypy, import contracts and pytest",
    "examples/demo/conversations.jsonl": "28 conversations on pictures, clips, reports or text, 1 too long",
    "examples/demo/recipe.yaml": "names the conversations and the folder of their media",
    "examples/demo/train.yaml": "the demo's training run",
    "examples/demo_moe/recipe.yaml": "the demo's conversations, with media of its own",
    "examples/demo_moe/train.yaml": "the demo's training run with experts",
    "megatron_eagle/inference/demo.html": "the demo page: uploads, what is seen of them, the chat",
    "megatron_eagle/eagle_video/prompts/clip_questions.v1.txt": "asks for questions of given kinds on a clip",
    "megatron_eagle/eagle_video/prompts/context_anchor.v1.txt": "asks for a phrase that points to a moment",
    "megatron_eagle/eagle_video/prompts/leak_judge.v1.txt": "asks whether the phrase gives the answer away",
    "megatron_eagle/eagle_video/prompts/story_caption.v1.txt": "asks for the description of a chapter",
    "megatron_eagle/eagle_video/prompts/story_questions.v1.txt": "asks for questions from descriptions",
    "kernels/eagle_kernels/py.typed": "says that the package carries types",
    "megatron_eagle/py.typed": "says that the package carries types",
    "tests/project/types_baseline.json": "errors of mypy that are left, by file and kind",
    "tests/compatibility/0.1.0.tar.xz": "store, run file, checkpoint, logs and export of version 0.1.0, tiny",
    "examples/slurm/README.md": "how to use the scripts, and what of them has been run",
    "examples/slurm/convert.sbatch": "Hugging Face import and export as a job",
    "examples/slurm/preprocess.sbatch": "preprocessing on several nodes, with Ray",
    "examples/slurm/progressive.sh": "all stages of a file as a chain of jobs",
    "examples/slurm/train.sbatch": "a training run that saves and requeues itself when its time is over",
}


def render() -> str:
    """The map as text: one line a file, grouped by folder; empty `__init__.py` files are left out.

    Raises ValueError that names the files without a description.
    """
    command = ["git", "ls-files"]
    listed = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout.splitlines()
    files = sorted({Path(name) for name in listed if (REPO / name).is_file()}, key=_order)
    described = [(file, _describe(file)) for file in files if file.name != "__init__.py" or _describe(file)]
    missing = [str(file) for file, description in described if not description]
    if missing:
        raise ValueError(f"no description (docstring or DESCRIPTIONS) for: {', '.join(missing)}")
    width = max(len(file.name) for file, _ in described) + 2
    lines = []
    for folder, group in groupby(described, key=lambda item: item[0].parent):
        if folder != Path("."):
            lines.append(f"{folder.as_posix()}/")
        indent = "" if folder == Path(".") else "  "
        lines += [f"{indent}{file.name:<{width}}{description}" for file, description in group]
    return "```text\n" + "\n".join(lines) + "\n```"


def _describe(file: Path) -> str | None:
    if file.as_posix() in DESCRIPTIONS:
        return DESCRIPTIONS[file.as_posix()]
    text = (REPO / file).read_text(encoding="utf-8", errors="replace")
    if file.suffix == ".json":  # a card
        return json.loads(text).get("title")
    if file.suffix == ".py":
        docstring = ast.get_docstring(ast.parse(text))
        return docstring.splitlines()[0].rstrip(".:") if docstring else None
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#!")]
    # YAML, scripts, Markdown, C++: the first comment or heading.
    return lines[0].lstrip("#/ ").rstrip(".") if lines and lines[0].startswith(("#", "//")) else None


def _order(file: Path) -> tuple:
    return file.parent.parts, file.name


if __name__ == "__main__":
    from tests.project.pages import main  # which imports this file

    main()
