"""Benchmarks about text in pictures: as `published.videos`."""

from typing import Any

from megatron_eagle.evaluation.published.options import first_of, listed
from megatron_eagle.evaluation.published.source import Source
from megatron_eagle.evaluation.published.videos import Records


def docvqa(source: Source, table: str, row: dict[str, Any]) -> Records:
    """DocVQA: JSON with `data`, parquet, or VLMEvalKit's TSV."""
    if "image_local_name" in row or "operation/reasoning" in row:
        raise ValueError("a question of InfoVQA, not of DocVQA")
    yield _anls(source, row, first_of(row, "image", "image_path"))


def infovqa(source: Source, table: str, row: dict[str, Any]) -> Records:
    """InfoVQA: JSON with `data`, parquet, or VLMEvalKit's TSV."""
    if "ucsf_document_id" in row:
        raise ValueError("a question of DocVQA, not of InfoVQA")
    yield _anls(source, row, first_of(row, "image_local_name", "image", "image_path"))


def _anls(source: Source, row: dict[str, Any], picture: Any) -> dict[str, Any]:
    return {
        "id": str(first_of(row, "questionId", "index")),
        "question": row["question"],
        "metric": "anls",
        "answer": listed(row.get("answers") or row.get("answer")),
        "images": [source.picture(picture)],
    }


def textvqa(source: Source, table: str, row: dict[str, Any]) -> Records:
    """JSON with `data`, parquet, or VLMEvalKit's TSV; ten answers each."""
    yield {
        "id": str(first_of(row, "question_id", "index")),
        "question": row["question"],
        "metric": "vqa",
        "answer": listed(row.get("answers") or row.get("answer")),
        "images": [source.picture(row.get("image") or row.get("image_path") or f"{row['image_id']}.jpg")],
    }


def chartqa(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`test_human.json` and `test_augmented.json`, parquet, or VLMEvalKit's TSV."""
    if "human_or_machine" in row:
        kind = ("human", "augmented")[int(row["human_or_machine"])]
    else:
        kind = str(row.get("type") or row.get("split") or table)
    answers = listed(first_of(row, "label", "answer"))
    if len(answers) != 1:
        raise ValueError(f"{len(answers)} answers; one was expected")
    yield {
        "question": first_of(row, "query", "question"),
        "metric": "relaxed",
        "answer": answers[0],
        "images": [source.picture(first_of(row, "imgname", "image", "image_path"))],
        "category": kind.replace("test_", "").replace("_test", ""),
    }


def ocrbench(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`OCRBench.json`, parquet, or VLMEvalKit's TSV."""
    kind = first_of(row, "type", "question_type", "category")
    yield {
        "question": row["question"],
        "metric": "formula" if "Math" in kind else "contains",
        "answer": listed(first_of(row, "answers", "answer")),
        "images": [source.picture(first_of(row, "image_path", "image"), whole=True)],
        "category": kind,
    }
