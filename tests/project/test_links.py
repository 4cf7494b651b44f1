"""What pages point at is there; and the check notices what is not."""

import pytest

from tests.paths import REPO
from tests.project import links
from tests.project.markdown import pages

HERE = REPO / "docs" / "data.md"


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPO)))
def test_links_anchors_and_paths_lead_somewhere(page):
    assert not list(links.problems(page, page.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "text",
    [
        "[a](install.md)",
        "[a](../README.md)",
        "[a](../examples/cards)",
        "[a](#what-does-it-do)\n\n## What does it do?",
        "[a](#same-1)\n\n## Same\n\n## Same",
        "[a](#with-code-and-link)\n\n## With `code` and [link](install.md)",
        "[a](https://example.org/x)",
        "`tools/train.py`, `data/sample.py`, `train.sbatch`, `tests/slurm/`, `examples/demo/*.yaml`",
        "`dropped.jsonl`, `run.yaml`, `a/b and more`, `parallel.size=4`",
        "```text\n[a](missing.md) `missing/file.py`\n```",
    ],
)
def test_what_is_right_passes(text):
    assert not list(links.problems(HERE, text))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](missing.md)", "missing.md: no such file"),
        ("[a](../../elsewhere.md)", "../../elsewhere.md: no such file"),
        ("[a](#missing)\n\n## Here", "#missing: no such heading"),
        ("[a](install.md#missing)", "install.md#missing: no such heading"),
        ("[a](#comment)\n\n```bash\n# Comment\n```", "#comment: no such heading"),
        ("[a](http://example.org)", "http://example.org: no https link"),
        ("see `tools/missing.py`", "`tools/missing.py`: no such file"),
        ("see `missing.py`", "`missing.py`: no such file"),
        ("see `data/missing/`", "`data/missing/`: no such file"),
    ],
)
def test_what_leads_nowhere_is_noticed(text, problem):
    assert list(links.problems(HERE, text)) == [problem]


def test_the_check_of_make_lint_fails_on_a_bad_page(monkeypatch, tmp_path, capsys):
    (tmp_path / "README.md").write_text("[a](missing.md)\n")
    monkeypatch.setattr(links, "REPO", tmp_path)
    monkeypatch.setattr(links, "pages", lambda: [tmp_path / "README.md"])
    assert links.main() == 1
    assert capsys.readouterr().out == "README.md: missing.md: no such file\n"
    (tmp_path / "README.md").write_text("nothing\n")
    assert links.main() == 0
