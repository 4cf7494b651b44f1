"""HourVideo's test split is scored on its authors' server: from their own file, a letter to each question.

The key of the letter is the one that other evaluations of HourVideo write; the server has not been tried.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.benchmarks import Question
from megatron_eagle.evaluation.metrics import extract_choice
from megatron_eagle.files import write_whole


def letters(folder: Path, questions: Sequence[Question]) -> dict[str, str | None]:
    """The letter of each answer in a folder of results, by the question's id; None where it names none."""
    options = {question.id: question.options for question in questions}
    with (folder / "answers.jsonl").open(encoding="utf-8") as lines:
        next(lines)  # says what was evaluated
        answers = {record["id"]: record["answer"] for record in map(json.loads, lines)}
    return {name: extract_choice(text, options[name]) for name, text in answers.items() if name in options}


def write_submission(table: Path, chosen: Mapping[str, str | None], path: Path) -> tuple[int, int]:
    """Write the authors' questions by video, each that has a letter with it as its label.

    Returns:
        How many have one, and how many questions there are.

    Raises:
        UserError: the table is not as the authors' is.
    """
    try:
        videos = json.loads(table.read_text(encoding="utf-8"))
        rows = [row for video in videos.values() for row in video["benchmark_dataset"]]
        labelled = [row for row in rows if chosen.get(row["qid"]) is not None]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{table}: no questions by video as in HourVideo's file: {error!r}") from None
    for row in labelled:
        row["predicted_answer_label"] = chosen[row["qid"]]
    write_whole(path, json.dumps(videos, ensure_ascii=False, indent=1))
    return len(labelled), len(rows)
