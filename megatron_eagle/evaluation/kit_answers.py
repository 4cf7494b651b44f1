"""How many requests of an evaluation kit failed, read from the answers that it kept.

Stands by itself: `write_bridge` puts a copy beside `evaluate.sh`, which runs it with the kit's own Python:

    python count_failures.py lmms-eval|vlmevalkit RESULTS [TASK ...]

Both kits score a failed request as a wrong answer, go on, and end with status 0, also when a whole task fell
over. Of VLMEvalKit each TASK must have answers. The status is 1 unless all were answered.
"""

import importlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# What the kits write in an answer's place.
FAILED = ("[LMMS_EVAL_REQUEST_FAILED", "[LMMS_EVAL_BUDGET_EXCEEDED", "Failed to obtain answer")


def main(kit: str, results: str, *tasks: str) -> int:
    """Print the count; returns the exit status."""
    files = sorted(Path(results).rglob("*"))  # their names begin with a date: the last of a task counts
    found = dict(_lmms_eval(files) if kit == "lmms-eval" else _vlmevalkit(files, tasks))
    text, whole = report_failures(kit, found, tasks)
    print(text)
    return 0 if whole else 1


def report_failures(kit: str, answers: dict[str, list[Any]], tasks: Iterable[str] = ()) -> tuple[str, bool]:
    """What is said of `answers`, by task; and whether all were given, to all `tasks` as well."""
    lines, whole = [], True
    for task, given in answers.items():
        failed = [answer for answer in given if isinstance(answer, str) and answer.startswith(FAILED)]
        empty = sum(not isinstance(answer, str) or not answer.strip() for answer in given)
        lines.append(f"{task}: {len(failed)} of {len(given)} requests failed")
        if empty:
            lines[-1] += f", {empty} answers are empty"
        if failed:
            lines[-1] += f"; the first: {failed[0].strip()}"
        whole = whole and not failed and not empty and bool(given)
    missing = [task for task in tasks if task not in answers]
    lines += [f"{task}: no answers, see above why {kit} gave it up" for task in missing]
    if not answers and not missing:
        lines.append("no answers, see above why it ended")
    whole = whole and bool(answers) and not missing
    if not whole:
        lines.append("what was not answered stands in the scores as a wrong answer, or not at all")
    return "\n".join(f"{kit}: {line}" for line in lines), whole


def _lmms_eval(files: list[Path]) -> Iterator[tuple[str, list[Any]]]:
    """Of `DATE_samples_TASK.jsonl`."""
    for path in files:
        _, samples, task = path.stem.partition("_samples_")
        if samples and path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                yield task, [_answer(json.loads(line)) for line in lines]


def _answer(sample: dict[str, Any]) -> Any:
    answer = sample["filtered_resps"]
    answer = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
    said = any((count or {}).get("output_tokens") for count in sample.get("token_counts") or [])
    return answer if said or answer != "None" else ""  # so it writes an answer without content


def _vlmevalkit(files: list[Path], tasks: tuple[str, ...]) -> Iterator[tuple[str, list[Any]]]:
    """Of `MODEL_TASK.xlsx`, which the kit writes when a task has been asked."""
    for task in tasks:
        for path in files:
            if path.stem.endswith(f"_{task}") and path.suffix == ".xlsx":
                pandas = importlib.import_module("pandas")  # there where the kit ran
                yield task, pandas.read_excel(path, keep_default_na=False)["prediction"].tolist()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
