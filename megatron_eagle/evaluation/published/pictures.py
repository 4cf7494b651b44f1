"""Benchmarks about pictures: as `published.videos`."""

import re
from typing import Any

from megatron_eagle.evaluation.published.options import (
    columns,
    first_of,
    inline_options,
    letter,
    listed,
    without_letters,
)
from megatron_eagle.evaluation.published.source import Source
from megatron_eagle.evaluation.published.videos import Records

_PLACE = re.compile(r"<image(?: (\d+))?>")


def multiple_choice(source: Source, table: str, row: dict[str, Any]) -> Records:
    """Rows with columns A, B, ... or `options`, or with the options in the question (MMStar, AI2D,
    RealWorldQA, where a row without options is a short answer)."""
    options = columns(row) or listed(row.get("options"))
    question = str(row["question"])
    if not options:
        question, options = inline_options(question)
    yield _asked(row, question, options) | {"images": [source.picture(one) for one in _pictures(row)]}


def erqa(source: Source, table: str, row: dict[str, Any]) -> Records:
    """The authors' TFRecord, parquet, or VLMEvalKit's TSV: pictures stand before the character of the
    question that `visual_indices` names, or at `<image>`; if all are 0, or there are none, before it."""
    pictures = [source.picture(one) for one in _pictures(row)]
    indices = [int(index) for index in listed(row.get("visual_indices"))]
    question = _with_pictures(str(row["question"]), indices, len(pictures))
    yield _asked(row, *inline_options(question)) | {"images": pictures}


def _with_pictures(question: str, indices: list[int], count: int) -> str:
    if _PLACE.search(question):
        marks = iter(range(1, count + 1))
        return _PLACE.sub(lambda _: f"<image-{mark}>" if (mark := next(marks, None)) else "", question)
    if not any(indices):
        return question
    if len(indices) != count:
        raise ValueError(f"{len(indices)} visual_indices of {count} pictures")
    placed, reached = "", 0
    for mark, index in sorted(enumerate(indices, 1), key=lambda pair: pair[1]):
        placed += f"{question[reached:index]}<image-{mark}>"
        reached = max(reached, min(index, len(question)))
    return placed + question[reached:]


def _asked(row: dict[str, Any], question: str, options: list[str]) -> dict[str, Any]:
    answer: str | None = "" if row.get("answer") is None else str(row["answer"])
    if options and answer and answer.isdigit():  # a number counts the options, also where these are numbers
        answer = letter(answer)
    name = next((row[key] for key in ("index", "question_id") if row.get(key) not in (None, "")), None)
    record = {
        "question": question,
        "metric": "choice" if options else "exact",
        "answer": answer,
        "options": without_letters(options),
        "category": str(row.get("category") or row.get("question_type") or "all"),
    }
    return record if name is None else record | {"id": str(name)}


def _pictures(row: dict[str, Any]) -> list[Any]:
    return listed(first_of(row, "images", "image/encoded", "image", "image_path"))


def mmbench(source: Source, table: str, row: dict[str, Any]) -> Records:
    """A TSV or parquet; every question is asked once for each rotation of its options, and all have to be
    right.

    Rows that are rotations themselves (their index counts up by a million) are left out.
    """
    index, options = int(row["index"]), columns(row, "ABCD")
    if index >= 1_000_000:
        return
    hint = row.get("hint")
    question = f"{hint}\n{row['question']}" if hint and hint != "nan" else row["question"]
    right = ord(first_of(row, "answer")) - ord("A")
    if not 0 <= right < len(options):
        raise ValueError(f"the answer {row['answer']!r} is no option")
    for turn in range(len(options)):
        yield {
            "id": f"{index}:{turn}",
            "question": question,
            "metric": "choice",
            "answer": letter((right - turn) % len(options)),
            "options": options[turn:] + options[:turn],
            "images": [source.picture(first_of(row, "image"))],
            "category": row.get("category", "all"),
            "groups": [f"question {index} of {len(options)}"],
        }


def mmmu(source: Source, table: str, row: dict[str, Any]) -> Records:
    """Parquet, one table per subject, or VLMEvalKit's TSV, of which the validation split is read; pictures
    stand where the question names them. A question without options is open."""
    if row.get("split") not in (None, "", "validation"):
        return
    options = [str(option) for option in columns(row) or listed(row.get("options"))]
    if "image_1" in row:
        pictures = {str(i): row[f"image_{i}"] for i in range(1, 8) if row.get(f"image_{i}") is not None}
    else:
        pictures = {str(i): one for i, one in enumerate(_pictures(row), start=1)}
    marks = list(dict.fromkeys(re.findall(r"<image (\d)>", "\n".join([row["question"], *options]))))
    shown = {mark: f"<image-{k}>" for k, mark in enumerate(marks, start=1)}

    def placed(text: str, seen: set[str]) -> str:
        def first(match: re.Match[str]) -> str:
            again = match[1] in seen
            seen.add(match[1])
            # A picture is placed once; where it is named again, it is named in words.
            return f"picture {list(shown).index(match[1]) + 1}" if again else shown[match[1]]

        return re.sub(r"<image (\d)>", first, text)

    seen: set[str] = set()
    question = placed(row["question"], seen)
    options = [placed(option, seen) for option in options]
    multiple = row.get("question_type", "multiple-choice") == "multiple-choice" and bool(options)
    name = str(first_of(row, "id", "index"))
    yield {
        "id": name,
        "question": question,
        "metric": "mmmu" if multiple else "mmmu-open",
        "answer": row["answer"] if multiple else listed(row["answer"]),
        "options": options if multiple else [],
        "images": [source.picture(pictures.get(mark)) for mark in marks],
        "category": str(row.get("category") or re.sub(r"^[a-z]+_|_\d+$", "", name)),
    }


def mathvista(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`testmini.json` by number, parquet, or VLMEvalKit's TSV."""
    multiple = row["question_type"] == "multi_choice"
    unit = f" (Unit: {row['unit']})" if row.get("unit") else ""
    precision = int(float(row["precision"])) if row.get("precision") not in (None, "") else 0
    metadata = row.get("metadata", row)
    kind = "text" if multiple else row["answer_type"]
    answer = {"value": str(row["answer"]), "kind": kind, "precision": precision} if row.get("answer") else ""
    yield {
        "id": str(first_of(row, "pid", "index")),
        "question": row["question"] + unit,
        "metric": "mathvista",
        "answer": answer,
        "options": [str(one) for one in listed(row["choices"])] if multiple else [],
        "images": [source.picture(first_of(row, "decoded_image", "image"))],
        "category": metadata["task"],
    }


def mm_vet(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`mm-vet.json` by question, parquet, or VLMEvalKit's TSV; judged from 0 to 1."""
    kinds = row["capability"] if "capability" in row else row["category"]
    yield {
        "id": str(first_of(row, "name", "question_id", "id", "index")),
        "question": row["question"],
        "metric": "judge-mm-vet",
        "answer": row.get("answer"),
        "images": [source.picture(first_of(row, "imagename", "image", "image_path"))],
        "category": ", ".join(sorted(kinds)) if isinstance(kinds, list) else str(kinds),
    }


def hallusionbench(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`HallusionBench.json`, parquet of its two splits, or VLMEvalKit's TSV of those with figures: yes or no,
    grouped by figure and by question."""
    if "gt_answer" in row:
        kind, number, figure, asked = (
            row[key] for key in ("subcategory", "set_id", "figure_id", "question_id")
        )
        right = {"1": "yes", "0": "no"}.get(str(row["gt_answer"]))
        picture = None if str(row["visual_input"]) == "0" else row.get("image") or row["filename"]
    else:  # the set, the figure and the question end the index
        kind, picture = first_of(row, "l2-category", "subcategory"), row["image"]
        number, figure, asked = str(row["index"]).split("_")[-3:]
        right = str(row["answer"]).lower()
    scene = f"{row['category']} {kind} {number}"
    yield {
        "id": f"{scene} {figure} {asked}",
        "question": row["question"],
        "metric": "yes_no",
        "answer": right,
        "images": [] if picture is None else [source.picture(picture, whole=True)],
        "category": row["category"],
        # Without a picture there is no figure to be right about.
        "groups": [
            f"question {scene} {asked}",
            *([f"figure {scene} {figure}"] if picture is not None else []),
        ],
    }
