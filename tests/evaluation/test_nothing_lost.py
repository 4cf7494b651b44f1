"""No row of any benchmark is lost or mixed with another: what cannot be read is said with its row."""

import base64
import copy
import json

import pytest

from megatron_eagle.evaluation.benchmarks import digest_of, read_benchmark
from megatron_eagle.evaluation.published.registry import BENCHMARKS
from megatron_eagle.evaluation.published.source import Source
from tests.evaluation.published_cases import CASES, write

# What in a case's table stands for one question: the table itself is a list of them, or they lie deeper.
WHERE = {
    "video-mme": lambda table: table[0]["questions"],
    "perception-test": lambda table: table["video_10"]["mc_question"],
    "hourvideo": lambda table: table["uid"]["benchmark_dataset"],
    **dict.fromkeys(("docvqa", "infovqa", "textvqa"), lambda table: table["data"]),
}


def read(folder, name):
    return BENCHMARKS[name].questions(Source(folder, folder / "pictures"))


def as_objects(name):
    """File, table and the list or object of its questions, of a case as JSON; a TSV's lines are its rows."""
    file, content, others, *_ = CASES[name]
    table = copy.deepcopy(content)
    if file.endswith((".tsv", ".jsonl")):
        lines = table.splitlines()
        if file.endswith(".tsv"):
            head, *rows = (line.split("\t") for line in lines)
            table = [dict(zip(head, row, strict=True)) for row in rows]
        else:
            table = [json.loads(line) for line in lines]
    return file, table, others, WHERE.get(name, lambda whole: whole)(table)


def rewrite(folder, name, file, table):
    if file.endswith(".tsv"):
        head = list(dict.fromkeys(key for row in table for key in row))
        table = "\n".join(["\t".join(head), *("\t".join(row.get(key, "") for key in head) for row in table)])
    elif file.endswith(".jsonl"):
        table = "\n".join(map(json.dumps, table))
    write(folder, file, table)
    return read(folder, name)


def _without(folder, name, first, key):
    """The case read without a key of its first question; None: with nothing in it."""
    file, table, _, items = as_objects(name)
    items[first] = {} if key is None else {k: v for k, v in items[first].items() if k != key}
    return rewrite(folder, name, file, table)


ODD = [{}, [], 7, None, "text"]
OBJECTS = [name for name in CASES if not CASES[name][0].endswith((".txt", ".parquet"))]


@pytest.mark.parametrize("name", OBJECTS)
def test_a_row_without_a_key_is_one_line_with_its_row(tmp_path, name):
    file, table, others, _ = as_objects(name)
    for other, data in others.items():
        write(tmp_path, other, data)
    items = as_objects(name)[3]
    first = 0 if isinstance(items, list) else next(iter(items))
    _, before = rewrite(tmp_path, name, file, table)
    others_alone = _without(tmp_path, name, first, None)[0]
    refused = 0
    for key in items[first]:
        questions, problems = _without(tmp_path, name, first, key)
        new = [problem for problem in problems if problem not in before]
        refused += bool(new)
        for problem in new:
            assert problem.line == 1 and problem.reason.strip() and "\n" not in problem.reason, key
            assert "StopIteration" not in problem.reason
        left = {question.id: question for question in questions}
        assert [left.get(question.id) for question in others_alone] == others_alone, key
    assert refused >= 2, "at least the question and its answer are needed"


@pytest.mark.parametrize("name", [name for name in OBJECTS if not CASES[name][0].endswith(".tsv")])
def test_a_value_of_another_kind_ends_nothing(tmp_path, name):
    for other, data in as_objects(name)[2].items():
        write(tmp_path, other, data)
    items = as_objects(name)[3]
    first = 0 if isinstance(items, list) else next(iter(items))
    for key, value in items[first].items():
        places = [(key,), *((key, inner) for inner in (value if isinstance(value, dict) else ()))]
        for *outer, last in places:
            for odd in (None, 7, "[", {"a": 1}, float("inf")):
                file, table, _, items = as_objects(name)
                item = items[first]
                for step in outer:
                    item = item[step]
                item[last] = odd
                _, problems = rewrite(tmp_path, name, file, table)
                assert all(p.reason.strip() and "\n" not in p.reason for p in problems), (key, odd)


@pytest.mark.parametrize(
    ("name", "odd"),
    # A TSV has only rows.
    [(name, odd) for name in OBJECTS for odd in ([{}] if CASES[name][0].endswith(".tsv") else ODD)],
)
def test_what_is_no_question_is_one_line_with_its_row(tmp_path, name, odd):
    file, table, others, items = as_objects(name)
    for other, data in others.items():
        write(tmp_path, other, data)
    whole, before = rewrite(tmp_path, name, file, table)
    number = len(items) + 1
    items.append(odd) if isinstance(items, list) else items.update(odd=odd)
    questions, problems = rewrite(tmp_path, name, file, table)
    assert digest_of(questions) == digest_of(whole)
    new = [problem for problem in problems if problem not in before]
    if name == "mlvu" and odd == {}:
        assert new == []  # a question without options is none of M-Avg's
        return
    (problem,) = new
    expected = len(CASES["mvbench"][1]) + 1 if name == "mvbench" else number
    assert problem.line == expected and problem.reason.strip() and "\n" not in problem.reason


@pytest.mark.parametrize("name", [name for name in OBJECTS if isinstance(as_objects(name)[3], list)])
def test_a_row_that_is_there_twice_is_asked_twice_or_said(tmp_path, name):
    file, table, others, items = as_objects(name)
    for other, data in others.items():
        write(tmp_path, other, data)
    whole, before = rewrite(tmp_path, name, file, table)
    items.append(copy.deepcopy(items[0]))
    questions, problems = rewrite(tmp_path, name, file, table)
    assert len({q.id for q in questions}) == len(questions)
    new = [problem for problem in problems if problem not in before]
    more = len(questions) - len(whole)
    assert more > 0 if not new else all("appears twice" in problem.reason for problem in new)
    assert all(problem.line == len(items) for problem in new)


def test_lines_of_charades_sta(tmp_path):
    write(tmp_path, "charades_sta_test.txt", "AB 0.0 10.0##sits.\nAB 0.0##sits.\nAB 0 10\nAB 3 2##sits.\n")
    questions, problems = read(tmp_path, "charades-sta")
    assert [q.id for q in questions] == ["charades_sta_test:1", "charades_sta_test:4"]
    assert [problem.line for problem in problems] == [2, 3]
    assert [question.score("2 to 3 seconds") for question in questions] == [0.1, 0.0]


def test_clues_that_last_no_time(tmp_path):
    row = {"video_uid": "v", "question": "Q", "choices": ["p", "q"], "right_answer": "A", "domain": "life"}
    rows = [
        row | {"qid": 1, "clue_intervals": [[4, 4], [0, 10]]},
        row | {"qid": 2, "clue_intervals": [[4, 4]]},
    ]
    write(tmp_path, "cgbench.json", rows)
    questions, problems = read(tmp_path, "cg-bench-miou")
    assert problems == [] and [q.score("0 to 10 s") for q in questions] == [1, 0]
    assert [p.line for p in read(tmp_path, "cg-bench-clue")[1]] == []


def test_mlvu_counts_what_its_authors_count(tmp_path):
    row = {"video": "v.mp4", "question": "Q?", "candidates": ["B", "A"], "question_type": "ego"}
    rows = [row | {"answer": "A"}, row | {"answer": "A"}]  # the option, not the letter
    rows += [row | {"answer": "no option"}, row | {"answer": "", "candidates": ["x", "", "y", ""]}]
    rows += [{"video": "v.mp4", "question": "Q", "answer": "free", "question_type": "summary"}]
    write(tmp_path, "json/3_ego.json", rows)
    questions, problems = read(tmp_path, "mlvu")
    assert problems == [] and [q.id for q in questions] == [f"3_ego:{i}" for i in range(1, 5)]
    assert [q.answer for q in questions] == ["B", "B", "", "D"]
    assert [q.score(letter) for q, letter in zip(questions, "BABD", strict=True)] == [1, 0, 0, 1]
    assert all(questions[2].score(text) == 0 for text in ("A", "", "no option"))


def test_docvqa_and_infovqa_in_one_download(tmp_path):
    png = {"bytes": b"\x89PNG1", "path": None}
    row = {"questionId": "1", "question": "Q?", "image": png, "answers": ["a"]}
    write(tmp_path, "DocVQA/validation-0.parquet", [row | {"ucsf_document_id": "x"}])
    write(tmp_path, "DocVQA/test-0.parquet", [row | {"answers": None}])
    write(
        tmp_path,
        "InfographicVQA/validation-0.parquet",
        [row | {"questionId": "2", "operation/reasoning": []}],
    )
    found = {name: read(tmp_path, name) for name in ("docvqa", "infovqa")}
    assert {name: [q.id for q in questions] for name, (questions, _) in found.items()} == {
        "docvqa": ["1"],
        "infovqa": ["2"],
    }
    assert all(problems == [] for _, problems in found.values())
    for name, folder, message in (
        ("docvqa", "InfographicVQA", "a question of InfoVQA, not of DocVQA"),
        ("infovqa", "DocVQA", "a question of DocVQA, not of InfoVQA"),
    ):
        questions, (problem,) = read(tmp_path / folder, name)  # the other's folder by itself
        assert questions == [] and problem.reason == message


def test_openeqa_s_clone_has_other_tables_that_are_not_it(tmp_path):
    file, rows, *_ = CASES["openeqa"]
    write(tmp_path, f"data/{file}", rows)
    for other in ("open-eqa-demo-data.json", "open-eqa-v0-184-questions.json"):
        write(tmp_path, f"assets/{other}", ["e1"])
    questions, problems = read(tmp_path, "openeqa")
    assert [q.id for q in questions] == ["e1"] and problems == []


def test_answers_to_other_questions_do_not_go_on(tmp_path):
    file, rows, *_ = CASES["mlvu"]
    write(tmp_path, file, rows)
    first = digest_of(read(tmp_path, "mlvu")[0])
    assert digest_of(read(tmp_path, "mlvu")[0]) == first
    write(tmp_path, file, [{**rows[0], "answer": "I"}, *rows[1:]])
    assert digest_of(read(tmp_path, "mlvu")[0]) != first


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_mark_before_the_first_character_is_no_part_of_it(tmp_path, mark):
    row = ["7", "Which?", "one", "", "three", "C", base64.b64encode(b"\x89PNG").decode()]
    lines = ["\t".join(line) for line in (["index", "question", "A", "B", "C", "answer", "image"], row)]
    (tmp_path / "MMStar.tsv").write_bytes(mark + "\n".join(lines).encode())
    (question,), problems = read(tmp_path, "mmstar")
    assert not problems and question.id == "7"
    # An empty option before others keeps its letter, and they theirs; after the last one there is none.
    assert question.options == ("one", "", "three") and question.answer == "C"


def test_line_ends_within_texts_end_no_line(tmp_path):
    record = {"question": "Which\u2028of\x85these?", "metric": "exact", "answer": "x"}
    text = "".join(json.dumps(record | {"id": k}, ensure_ascii=False) + "\n\n" for k in "ab")
    (tmp_path / "own.jsonl").write_bytes(text.encode("utf-8-sig"))
    questions, problems = read_benchmark(tmp_path / "own.jsonl")
    assert [question.id for question in questions] == ["a", "b"] and not problems
