"""The authors' scripts beside our scorers, on the answers of other models that the authors have published.

    python -m tests.evaluation.authors FOLDER      a Markdown table, as in docs/evaluation.md

FOLDER holds clones of their repositories by name: MathVista (with `results/`), MMMU, mmf, VLMEvalKit and
LongVideoBench, as many as there are.
Of their files single functions are run; nothing of theirs is kept here.
"""

import ast
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Optional

import numpy as np

from megatron_eagle.evaluation import metrics
from megatron_eagle.evaluation.published.subtitles import read_subtitle_file
from megatron_eagle.evaluation.scoring import mathvista, mmmu, textvqa
from megatron_eagle.hf_model.subtitles import between_frames, read_subtitles

_MADE_UP, _FILES = 20_000, 1_000
_PIECES = (
    "the a an one two ten none dont isn't she's mcdonald's 5 5. 5% 1,000 1000 .5 3.50 -3 1e3 0 0.0 nan red "
    "car Red Yes Yes. no? U.S.A. x-y a/b @ ( ) ; _ $7 7-11 kitten sitting \n"
)


@dataclass(frozen=True)
class Beside:
    """One row of the table: what is right by the authors and by us.

    Attributes:
        differ: answers with two scores.
        same: the same rule, so that none may differ.
    """

    benchmark: str
    answers: str
    n: int
    theirs: float
    ours: float
    differ: int
    same: bool = True


def borrowed(path: Path, *names: str, **known: Any) -> list[Any]:
    """Functions or classes of a Python file, without running the rest of it; `known` are names they use."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    exec(compile(ast.Module(wanted, []), str(path), "exec"), known)
    return [known[name] for name in names]


def check_mathvista(clone: Path) -> Iterator[Beside]:
    """Their second step on the answers that GPT-4 extracted, and our rule in place of GPT-4."""
    (normalise,) = borrowed(
        clone / "evaluation" / "calculate_score.py",
        "normalize_extracted_answer",
        re=re,
        distance=metrics.levenshtein,
    )
    for path in sorted(clone.glob("results/*/output_*.json")):
        model = path.stem.removeprefix("output_")
        rows = [row for row in json.loads(path.read_text(encoding="utf-8")).values() if "extraction" in row]
        if any(word in model for word in ("test", "guess", "code")):
            continue  # answers of no model, or programs that answer when they are run
        second, rule = [], []
        for row in rows:
            wanted = mathvista.Wanted(row["answer"], row["answer_type"], int(row["precision"] or 0))
            options, extracted = row["choices"] or (), row["extraction"] or ""
            asked = (options, row["question_type"], row["answer_type"], row["precision"])
            theirs = normalise(extracted, *asked) == row["answer"]
            second.append((theirs, mathvista.accuracy(extracted, wanted, options)))
            taken = mathvista.as_it_is(row["response"], wanted, options)
            read = mathvista.by_rule(row["response"], wanted, options) if taken is None else taken
            rule.append((row["true_false"], mathvista.accuracy(read, wanted, options)))
        yield _beside("MathVista", f"{model}, both extracted by GPT-4", second)
        yield _beside("MathVista", f"{model}, ours read by rule", rule, same=False)


def check_mmmu(clone: Path) -> Iterator[Beside]:
    """Their parser and ours with the same stream of guesses, and ours with the guesses that we make."""
    place = clone / "mmmu"
    subjects = sorted(
        path.name for path in (place / "example_outputs" / "qwen_vl").iterdir() if path.is_dir()
    )
    for folder in sorted(path for path in (place / "example_outputs").iterdir() if path.is_dir()):
        known = {"re": re, "np": np, "random": random.Random(mmmu.SEED), "Dict": dict}
        names = ("parse_multi_choice_response", "parse_open_response", "eval_multi_choice", "eval_open")
        letter, parts, right_letter, right_part = borrowed(place / "utils" / "eval_utils.py", *names, **known)
        stream = random.Random(mmmu.SEED)
        same, own = [], []
        for subject in subjects:
            for row in json.loads((folder / subject / "output.json").read_text(encoding="utf-8")):
                text, answer = row["response"], row["answer"]
                if row["question_type"] == "multiple-choice":
                    options = [row["index2ans"][name] for name in row["all_choices"]]
                    theirs = right_letter(answer, letter(text, row["all_choices"], row["index2ans"]))
                    same.append((theirs, mmmu.chosen(text, options, stream.choice) == answer))
                    own.append((theirs, mmmu.letter_accuracy(text, options, answer, row["id"])))
                else:
                    theirs = right_part(answer, parts(text))
                    ours = mmmu.open_accuracy(text, answer if isinstance(answer, list) else [answer])
                    same.append((theirs, ours))
                    own.append((theirs, ours))
        yield _beside("MMMU val", f"{folder.name}, guessed in their order", same)
        yield _beside("MMMU val", f"{folder.name}, ours guessed by id", own, same=False)


def check_textvqa(clone: Path) -> Iterator[Beside]:
    """Ten made-up answers, of three, and one of the three to score."""
    names = ("EvalAIAnswerProcessor", "TextVQAAccuracyEvaluator")
    _, evaluator = borrowed(clone / "mmf" / "utils" / "m4c_evaluators.py", *names, re=re)
    theirs, draw, found = evaluator(), random.Random(7), []
    for _ in range(_MADE_UP):
        people = [_made_up(draw) for _ in range(3)]
        answers, text = draw.choices(people, k=10), draw.choice(people)
        entry = {"pred_answer": text, "gt_answers": answers}
        found.append((theirs.eval_pred_list([entry]), textvqa.vqa_accuracy(text, answers)))
    yield _beside("TextVQA", "made up", found)


def check_short_answers(clone: Path) -> Iterator[Beside]:
    """ChartQA's and DocVQA's comparisons on made-up answers."""
    names = ("relaxed_correctness", "anls_compute")
    path = clone / "vlmeval" / "dataset" / "utils" / "vqa_eval.py"
    relaxed, distance = borrowed(path, *names, Optional=Optional)
    draw, charts, documents = random.Random(7), [], []
    for _ in range(_MADE_UP):
        answer = _made_up(draw)
        text = draw.choice((answer, f" {answer.upper()}", f"{answer}.", answer[1:], _made_up(draw)))
        charts.append((relaxed(answer, text.strip()), metrics.relaxed_accuracy(text, answer)))
        similarity = 1 - distance(answer, text)
        documents.append((similarity if similarity >= 0.5 else 0.0, metrics.anls(text, [answer])))
    yield _beside("ChartQA", "made up", charts)
    yield _beside("DocVQA, InfoVQA", "made up", documents)


def check_longvideobench(clone: Path) -> Iterator[Beside]:
    """What stands between which frames, of made-up subtitles in both of their forms."""
    path = clone / "longvideobench" / "longvideobench_dataset.py"
    (insert, _) = borrowed(path, "insert_subtitles_into_frames", "timestamp_to_seconds", Dataset=object)
    draw, found = random.Random(7), []
    with TemporaryDirectory() as folder:
        file = Path(folder) / "said.json"
        for _ in range(_FILES):
            duration, shift = draw.uniform(5, 60), draw.choice((0.0, draw.uniform(0, 500)))
            times = sorted(draw.uniform(0, duration) for _ in range(draw.randint(1, 40)))
            entries = _subtitles(draw, duration, shift)
            file.write_text(json.dumps(entries))
            theirs: list[tuple[int, str]] = []
            frames = 0
            for one in insert(list(range(len(times))), times, entries, shift, duration):
                frames += isinstance(one, int)
                theirs += [(frames, one)] if isinstance(one, str) else []
            said = [[s.start - shift, s.end - shift, s.text] for s in read_subtitle_file(str(file), duration)]
            found.append((1.0, float(list(between_frames(read_subtitles(said), times)) == theirs)))
    yield _beside("LongVideoBench, places of subtitles", "made up", found)


def _subtitles(draw: random.Random, duration: float, shift: float) -> list[dict[str, Any]]:
    """In the order of their beginnings but for a few; some have no end."""
    clock = draw.random() < 0.5
    entries: list[dict[str, Any]] = []
    for number, start in enumerate(sorted(shift + draw.uniform(-3, duration) for _ in range(30))):
        start, end = max(0.0, start), max(0.0, start) + draw.uniform(0.1, 6)
        if clock:
            entry = {
                key: f"{int(t // 3600):02}:{int(t // 60 % 60):02}:{t % 60:06.3f}"
                for key, t in (("start", start), ("end", end))
            }
            entries.append(entry | {"line": f"line {number}"})
        else:
            entries.append(
                {"timestamp": [start, draw.choice((end, end, end, None, int(end)))], "text": f"text {number}"}
            )
    if draw.random() < 0.2:
        entries[3], entries[9] = entries[9], entries[3]
    return entries


NEEDED = {"MathVista": "results", "MMMU": "mmmu/example_outputs"}  # answers of models, which clones may lack
CHECKS: dict[str, Callable[[Path], Iterator[Beside]]] = {
    "MathVista": check_mathvista,
    "MMMU": check_mmmu,
    "mmf": check_textvqa,
    "VLMEvalKit": check_short_answers,
    "LongVideoBench": check_longvideobench,
}


def _made_up(draw: random.Random) -> str:
    """Words, numbers and marks that the rules treat in a way of their own."""
    return draw.choice((" ", "", " ")).join(draw.choices(_PIECES.split(" "), k=draw.randint(1, 3)))


def _beside(benchmark: str, answers: str, scores: list[tuple[float, float]], same: bool = True) -> Beside:
    differ = sum(abs(theirs - ours) > 1e-9 for theirs, ours in scores)
    theirs, ours = (sum(float(pair[i]) for pair in scores) for i in (0, 1))
    return Beside(benchmark, answers, len(scores), theirs, ours, differ, same)


def table(folder: Path) -> str:
    """Every check whose clone is in the folder, in Markdown."""
    lines = [
        "| benchmark | answers of | n | authors | ours | differ |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, check in CHECKS.items():
        if (folder / name / NEEDED.get(name, "")).is_dir():
            for row in check(folder / name):
                scores = " | ".join(f"{100 * score / row.n:.1f}" for score in (row.theirs, row.ours))
                lines.append(f"| {row.benchmark} | {row.answers} | {row.n:,} | {scores} | {row.differ} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
