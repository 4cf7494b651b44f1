"""Our scorers agree with the authors' scripts: with clones of these in MEGATRON_EAGLE_AUTHORS.

The clones are MathVista, MMMU, mmf, VLMEvalKit and LongVideoBench; the first two hold answers of other
models.
"""

import os
from pathlib import Path

import pytest

from tests.evaluation import authors


@pytest.mark.slow
@pytest.mark.parametrize("name", authors.CHECKS)
def test_the_authors_scripts_say_the_same(name):
    folder = os.environ.get("MEGATRON_EAGLE_AUTHORS")
    needed = Path(name) / authors.NEEDED.get(name, "")
    if folder is None or not (Path(folder) / needed).is_dir():
        pytest.skip(f"no {needed} in MEGATRON_EAGLE_AUTHORS")
    rows = list(authors.CHECKS[name](Path(folder) / name))
    assert rows and [row for row in rows if row.same and row.differ] == []
    assert all(row.differ <= 0.2 * row.n for row in rows)  # by rule or guessed in another order


RULE = '''
"""A script that cannot be imported."""
import no_such_package

def relaxed_correctness(target, prediction):
    return target == prediction

def anls_compute(target, prediction):
    return levenshtein(target.strip(), prediction.strip()) / max(len(target), len(prediction), 1)

def levenshtein(a, b):
    return 0 if a.lower() == b.lower() else max(len(a), len(b))
'''


def test_another_rule_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(authors, "_MADE_UP", 200)
    script = tmp_path / "VLMEvalKit" / "vlmeval" / "dataset" / "utils" / "vqa_eval.py"
    script.parent.mkdir(parents=True)
    script.write_text(RULE)
    charts, documents = authors.check_short_answers(tmp_path / "VLMEvalKit")
    assert charts.differ > 0 and charts.theirs < charts.ours
    assert documents.differ > 0
    assert f"| ChartQA | made up | 200 | {charts.theirs / 2:.1f} |" in authors.table(tmp_path)
