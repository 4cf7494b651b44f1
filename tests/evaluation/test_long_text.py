"""The harbour book: it fits, its questions have one answer, and half of it is not enough."""

import json
import re

import pytest

from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.benchmarks import question_from, read_benchmark
from megatron_eagle.evaluation.long_text import DEPTHS, long_text_records
from tests.convert.hf_folder import write_hf_folder
from tests.eagle_video.helpers import call_tool

ENTRY = re.compile(
    r"Entry \d+\. The (.+?) came into (\w+) with (\d+) tons .*? Her cargo went on in the (.+?)\.\n"
)


def count(text: str) -> int:
    """Words and marks."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def answered(context: str, question: str) -> str:
    """What a reader of the book answers."""
    book = {ship: (port, tons, onward) for ship, port, tons, onward in ENTRY.findall(context)}
    if found := re.search(r"the number of the (\w+) key", question):
        numbers = re.findall(rf"number of the {found[1]} key is (\d+)", context)
        return numbers[0] if len(numbers) == 1 else ""
    ship = re.search(r"(?:did|cargo of) the (.+?) (?:bring|went)", question)[1]
    port, tons, onward = book.get(ship, ("", "", ""))
    return tons if "tons" in question else book.get(onward, ("",))[0]


@pytest.fixture(scope="module")
def records():
    return list(long_text_records([2048, 8192], count, repeats=2))


def test_a_reader_of_the_whole_book_is_right(records):
    assert len(records) == 2 * 2 * 15 and len({record["id"] for record in records}) == len(records)
    for record in records:
        question = question_from(record, "x", 1)
        assert question.request.prompt.startswith("The harbour book:\n\n")
        assert question.question == record["question"]
        assert question.score(answered(record["context"], record["question"])) == 1
        length = int(record["id"].split(":")[0])
        assert 0.85 * length - 256 < count(record["context"]) <= length - 250


def test_what_is_asked_stands_at_its_depth(records):
    for record in records:
        _, _, kind, depth = record["id"].split(":")
        if kind != "chain":
            text = record["context"]
            place = text.index(record["answer"][0]) / len(text)
            assert place == pytest.approx(float(depth), abs=0.12)
            assert text.count(record["answer"][0]) == 1


def test_half_a_book_is_not_enough(records):
    right = {"chain": []}
    for record in records:
        _, _, kind, depth = record["id"].split(":")
        half = record["context"][: len(record["context"]) // 2]
        place = "chain" if kind == "chain" else depth
        right.setdefault(place, []).append(answered(half, record["question"]) == record["answer"][0])
    assert all(right["0"] + right["0.25"]) and not any(right["0.75"] + right["1"])
    assert sum(right["chain"]) < len(right["chain"]) / 2


def test_books_differ_and_stay_the_same(records):
    assert list(long_text_records([2048, 8192], count, repeats=2)) == records
    assert len({record["context"] for record in records}) == 4
    assert next(long_text_records([2048], count, seed=1))["context"] != records[0]["context"]
    assert {float(record["id"].split(":")[3]) for record in records} == set(DEPTHS)


def test_lengths_that_no_book_has():
    with pytest.raises(UserError, match="1,000 tokens: a book needs 2,048"):
        list(long_text_records([1000], count))
    with pytest.raises(UserError, match="4,096 ships at most"):
        list(long_text_records([10_000_000], lambda text: 1 + len(text) // 4000))


def test_the_command(tmp_path):
    folder, path = write_hf_folder(tmp_path / "h"), tmp_path / "long.jsonl"
    made = ("long-text", "--tokenizer", str(folder), "--output", str(path))
    assert "15 questions" in call_tool("evaluate", *made, "--tokens", "4096").stdout
    questions, problems = read_benchmark(path)
    assert len(questions) == 15 and problems == []
    assert {question.category for question in questions} == {
        f"{kind}, 4,096 tokens" for kind in ("needle", "entry", "chain")
    }
    assert json.loads(path.read_text().splitlines()[0])["question"] == questions[0].question
    made = (*made[:-1], str(path / "below a file.jsonl"), "--tokens", "4096")
    done = call_tool("evaluate", *made)
    assert done.returncode == 2 and "below a file.jsonl: " in done.stderr
    done = call_tool("evaluate", *made, "--repeats", "0")
    assert done.returncode == 2 and "--repeats must be positive" in done.stderr
