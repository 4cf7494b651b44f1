"""Benchmarks about pictures and documents: as `published.videos`."""

import ast
import re
from pathlib import Path
from typing import Any

from megatron_eagle.evaluation.published.source import Source, columns, letter, without_letters
from megatron_eagle.evaluation.published.videos import Records

_INLINE = re.compile(r"(?:^|[\s(])([A-J])[.:)]\s+")


def docvqa(source: Source, table: str, row: dict[str, Any]) -> Records:
    """DocVQA and InfoVQA: JSON with `data`, or parquet."""
    for item in row.get("data", [row]):
        yield {
            "id": str(item["questionId"]),
            "question": item["question"],
            "metric": "anls",
            "answer": item.get("answers"),
            "images": [source.picture(item.get("image_local_name") or item["image"])],
        }


def textvqa(source: Source, table: str, row: dict[str, Any]) -> Records:
    """JSON with `data`, or parquet; ten answers each."""
    for item in row.get("data", [row]):
        yield {
            "id": str(item["question_id"]),
            "question": item["question"],
            "metric": "vqa",
            "answer": item.get("answers"),
            "images": [source.picture(item.get("image") or f"{item['image_id']}.jpg")],
        }


def chartqa(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`test_human.json` and `test_augmented.json`, or parquet."""
    question, answer = row.get("query") or row["question"], row.get("label") or row["answer"]
    category = row.get("type") or table.removeprefix("test_")
    picture = source.picture(row.get("imgname") or row["image"])
    answer = answer[0] if isinstance(answer, list) else answer
    yield {
        "id": f"{category}:{row.get('imgname') or Path(picture).name}:{question}",
        "question": question,
        "metric": "relaxed",
        "answer": answer,
        "images": [picture],
        "category": category,
    }


def ocrbench(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`OCRBench.json`, or parquet."""
    answers = row.get("answers") or row["answer"]
    kind = row.get("type") or row["question_type"]
    picture = source.picture(row.get("image_path") or row["image"])
    yield {
        "id": f"{kind}:{row.get('image_path') or Path(picture).name}:{row['question']}",
        "question": row["question"],
        "metric": "formula" if "Math" in kind else "contains",
        "answer": answers if isinstance(answers, list) else [answers],
        "images": [picture],
        "category": kind,
    }


def multiple_choice(source: Source, table: str, row: dict[str, Any]) -> Records:
    """Rows with columns A, B, ... or `options`, or with the options in the question (MMStar, AI2D, ERQA,
    RealWorldQA, where a row without options is a short answer)."""
    pictures = row.get("images") or [row["image"]]
    options = columns(row) or list(row.get("options") or [])
    question = str(row["question"])
    answer: str | None = "" if row.get("answer") is None else str(row["answer"])
    if not options:
        question, options = inline_options(question)
    if (
        options and answer is not None and answer.isdigit()
    ):  # a number counts the options, also where these are numbers
        answer = letter(answer)
    images = [source.picture(picture) for picture in pictures]
    yield {
        "id": str(row.get("index") or row.get("question_id") or f"{Path(images[0]).name}:{question}"),
        "question": question,
        "metric": "choice" if options else "exact",
        "answer": answer,
        "options": without_letters(options),
        "images": images,
        "category": str(row.get("category") or row.get("question_type") or "all"),
    }


def mmbench(source: Source, table: str, row: dict[str, Any]) -> Records:
    """A TSV; every question is asked once for each rotation of its options, and all have to be right.

    Rows that are rotations themselves (their index counts up by a million) are left out.
    """
    index, options = int(row["index"]), columns(row, "ABCD")
    if index >= 1_000_000:
        return
    hint = row.get("hint")
    question = f"{hint}\n{row['question']}" if hint and hint != "nan" else row["question"]
    right = options[ord(row["answer"]) - ord("A")]
    for turn in range(len(options)):
        turned = options[turn:] + options[:turn]
        yield {
            "id": f"{index}:{turn}",
            "question": question,
            "metric": "choice",
            "answer": chr(65 + turned.index(right)),
            "options": turned,
            "images": [source.picture(row["image"])],
            "category": row.get("category", "all"),
            "groups": [f"question {index}"],
        }


def mmmu(source: Source, table: str, row: dict[str, Any]) -> Records:
    """Parquet, one table per subject; pictures stand where the question names them."""
    options = ast.literal_eval(row["options"]) if isinstance(row["options"], str) else list(row["options"])
    answer = row["answer"]
    if isinstance(answer, str) and answer.startswith("["):
        answer = ast.literal_eval(answer)
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
    multiple = row["question_type"] == "multiple-choice"
    yield {
        "id": row["id"],
        "question": question,
        "metric": "choice" if multiple else "exact",
        "answer": answer,
        "options": options if multiple else [],
        "images": [source.picture(row[f"image_{mark}"]) for mark in marks],
        "category": re.sub(r"^[a-z]+_|_\d+$", "", row["id"]),
    }


def mathvista(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`testmini.json` by number, or parquet. Answers are read off by rule, not by a language model."""
    for name, item in [(row["pid"], row)] if "pid" in row else row.items():
        multiple = item["question_type"] == "multi_choice"
        unit = f" (Unit: {item['unit']})" if item.get("unit") else ""
        precision = int(float(item["precision"])) if item.get("precision") not in (None, "") else 0
        number = item["answer_type"] in ("integer", "float")
        decoded, answer = item.get("decoded_image"), item.get("answer")
        yield {
            "id": str(name),
            "question": item["question"] + unit,
            "metric": "choice" if multiple else "number" if number else "exact",
            "answer": [float(answer), precision] if answer and number and not multiple else answer,
            "options": list(item["choices"]) if multiple else [],
            "images": [source.picture(decoded if decoded else item["image"])],
            "category": item["metadata"]["task"],
        }


def mm_vet(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`mm-vet.json` by question, judged from 0 to 1."""
    for name, item in row.items():
        yield {
            "id": name,
            "question": item["question"],
            "metric": "judge",
            "answer": item.get("answer"),
            "images": [source.picture(item["imagename"])],
            "category": ", ".join(sorted(item["capability"])),
        }


def hallusionbench(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`HallusionBench.json`: yes or no, grouped by figure and by question."""
    scene = f"{row['category']} {row['subcategory']} {row['set_id']}"
    yield {
        "id": f"{scene} {row['figure_id']} {row['question_id']}",
        "question": row["question"],
        "metric": "yes_no",
        "answer": "yes" if str(row["gt_answer"]) == "1" else "no",
        "images": [] if str(row["visual_input"]) == "0" else [source.picture(row["filename"])],
        "category": row["category"],
        "groups": [f"figure {scene} {row['figure_id']}", f"question {scene} {row['question_id']}"],
    }


def inline_options(question: str) -> tuple[str, list[str]]:
    """A question with options in its text -> the question alone, and the options; none if there are none."""
    marks = list(_INLINE.finditer(question))
    run: list[re.Match[str]] = []
    for mark in marks:
        if mark[1] == chr(65 + len(run)):
            run.append(mark)
    if len(run) < 2:
        return question, []
    ends = [mark.start() for mark in run[1:]] + [len(question)]
    options = [question[mark.end() : end].strip(" ,;\n") for mark, end in zip(run, ends, strict=True)]
    options[-1] = options[-1].split("\n")[0].strip()  # instructions follow
    stem = re.sub(r"(?i)\s*(options|choices)\s*:?\s*$", "", question[: run[0].start()])
    return stem.strip(), options
