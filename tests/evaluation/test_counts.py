"""A score stands beside the published one only if all of the same questions were asked."""

import json
import os
from pathlib import Path

import pytest

from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.published.facts import FACTS, Split, counts
from megatron_eagle.evaluation.published.registry import BENCHMARKS
from megatron_eagle.evaluation.published.source import Source
from megatron_eagle.evaluation.summary import comparison, comparison_rows, overall, read_result, remarks
from tests.data.helpers import make_video
from tests.eagle_video.helpers import call_tool
from tests.eagle_video.server import serving
from tests.evaluation.published_cases import CASES, PNG64, write
from tests.evaluation.published_forms import zipped

CLONES = "MEGATRON_EAGLE_AUTHORS"
# A clone's folder -> the benchmarks in it, whose counts are those of the authors' own files.
CLONED = {
    "CG-Bench": ("cg-bench-clue", "cg-bench-long", "cg-bench-miou", "cg-bench-open"),
    "MLVU": ("mlvu",),
    "open-eqa": ("openeqa",),
    "HallusionBench": ("hallusionbench",),
    "MultimodalOCR": ("ocrbench",),
    "MathVista": ("mathvista",),
    "hd-epic-annotations": ("hd-epic",),
}


def result(folder, name, asked, **more):
    scores = {"published": name, "overall": 70.0, "asked": {"choice": asked}, "limit": None, "found": asked}
    write(folder, "scores.json", scores | {"sampling": {"max_frames": 8}} | more)
    return read_result(folder)


def test_every_benchmark_has_its_facts():
    assert FACTS.keys() == BENCHMARKS.keys()
    for facts in FACTS.values():
        names = [split.name for split in facts.splits]
        assert len(set(names)) == len(names) and all(split.source for split in facts.splits)
        assert len({split.questions for split in facts.splits}) == len(names)  # a count says which it is
        assert facts.forms and facts.reference is None or facts.reference


@pytest.mark.parametrize(
    ("name", "asked", "published", "difference", "said"),
    [
        ("video-mme", 2700, "72.40", "-2.40", ""),
        ("video-mme", 2699, "72.40", "-", "2,699 of 2,700 questions (all): 1 are missing"),
        ("video-mme", 2701, "72.40", "-", "1 too many"),
        ("cg-bench-open", 3000, "-", "-", "mini was asked; Eagle 2.5 8B has no published score"),
        ("egoschema", 500, "72.20", "-", "500 of 500 questions (subset); the published score is that of all"),
        ("egoschema", 5031, "72.20", "-2.20", ""),
        ("docvqa", 5349, "94.10", "-", "(val); the published score is that of test"),
        ("hallusionbench", 951, "54.70", "+15.30", "with figures (951) or all (1,129), the published score"),
        ("hallusionbench", 1129, "54.70", "+15.30", "all was asked"),
        ("hd-epic", 6550, "42.90", "-", "the published score is that of all"),
        ("mmbench-1.1", 4876, "81.70", "-", "the published score is that of test"),
    ],
)
def test_a_difference_is_one_of_the_same_questions(tmp_path, name, asked, published, difference, said):
    found = result(tmp_path, name, asked)
    assert comparison_rows([found])[1][4:] == [published, difference]
    assert [said in note for note in remarks([found])] == ([True] if said else [])


def test_a_limit_never_stands_beside_a_published_score(tmp_path):
    found = result(tmp_path, "video-mme", 100, limit=100, found=2700)
    assert comparison_rows([found])[1] == ["video-mme", "100", "2,700", "70.00", "-", "-"]
    assert "100 of 2,700 questions (all), by --limit; no difference is given" in comparison([found])
    whole = result(tmp_path, "video-mme", 2700, limit=5000, found=2700)  # nothing was left out
    assert comparison_rows([whole])[1][4:] == ["72.40", "-2.40"]
    old = result(tmp_path, "video-mme", 2700, limit=2700, found=2700)
    assert not old.limited
    (tmp_path / "scores.json").write_text((tmp_path / "scores.json").read_text().replace('"found"', '"x"'))
    assert read_result(tmp_path).limited  # one that does not say how many could be asked
    with pytest.raises(UserError, match="no scores of a published"):
        result(tmp_path, "unknown", 1)


def mmbench(folder):
    rows = [f"{i}\tQ{i}?\tx\ty\tA\tc\t{PNG64}" for i in (1, 2)]
    write(
        folder, "MMBench_DEV_EN_V11.tsv", "\n".join(["index\tquestion\tA\tB\tanswer\tcategory\timage", *rows])
    )
    return BENCHMARKS["mmbench-1.1"].questions(Source(folder, folder / "p"))[0]


def test_groups_that_were_not_asked_whole_are_not_right(tmp_path):
    questions = mmbench(tmp_path)
    assert [q.id for q in questions] == ["1:0", "1:1", "2:0", "2:1"]

    def score(*scores):
        return overall(BENCHMARKS["mmbench-1.1"], list(zip(questions, scores, strict=False)), questions)

    assert score(1, 1, 1, 1) == 100 and score(1, 1, 1, 0) == 50
    assert score(1, 1, 1) == 100  # of one whole group
    assert score(1) is None
    found = result(tmp_path, "mmbench-1.1", 1, overall=None, limit=1, found=4)
    assert comparison_rows([found])[1][3:] == ["-", "-", "-"]


def test_figures_of_hallusionbench_that_were_not_asked_whole(tmp_path):
    file, rows, *_ = CASES["hallusionbench"]
    write(tmp_path, file, rows)
    questions = BENCHMARKS["hallusionbench"].questions(Source(tmp_path, tmp_path / "p"))[0]
    scored = list(zip(questions, (1.0, 1.0, 1.0, 1.0), strict=True))
    assert overall(BENCHMARKS["hallusionbench"], scored, questions) == 100
    assert overall(BENCHMARKS["hallusionbench"], scored[1:2], questions) is None
    # Without the last question 0 is not whole; question 1 and both figures are.
    part = [(question, float(i == 1)) for i, (question, _) in enumerate(scored[:3])]
    expected = (1 / 3 + 0 / 2 + 1 / 1) / 3 * 100
    assert overall(BENCHMARKS["hallusionbench"], part, questions) == pytest.approx(expected)


def test_what_was_read_is_said_with_its_source(tmp_path):
    questions = mmbench(tmp_path)
    said = counts(FACTS["mmbench-1.1"], questions)
    assert said.splitlines()[0].startswith("4 of 4,876 questions (dev) are read: VLMEvalKit's")
    assert said.splitlines()[1] == "1 videos or pictures"
    Path(questions[0].request.images[0]).unlink()
    assert counts(FACTS["mmbench-1.1"], questions).endswith("1 videos or pictures, 1 are missing")
    assert FACTS["egoschema"].split(501) == FACTS["egoschema"].splits[1]
    assert FACTS["egoschema"].split(9000).name == "all"


def test_a_run_over_an_archive_says_what_it_is_held_against(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    video = make_video(tmp_path / "v.mp4", 16, fps=2).read_bytes()
    row = {"qa": {"question": "Which?"}, "mcq": {"options": ["A. x", "B. y"], "correct_option": "B. y"}}
    rows = [row | {"path": name, "category": "c"} for name in ("v.mp4", "none.mp4")] + [{"path": "v.mp4"}]
    write(tmp_path / "data", "hr.jsonl", "\n".join(map(json.dumps, rows)))
    write(tmp_path / "data", "videos.zip", zipped(**{"videos/v.mp4": video}))
    shown = []

    def answer(request):
        shown.append(sum(part["type"] == "image_url" for part in request["messages"][0]["content"]))
        return "B"

    with serving(answer) as server:
        served = ["run", "--endpoint", server.url, "--model", "m", "--published", "hrvideobench"]
        served += ["--data", tmp_path / "data", "--output", tmp_path / "o", "--max-frames", 8]
        done = call_tool("evaluate", *served)
        assert done.returncode == 0, done.stderr
        for line in (
            "2 of 200 questions (test) are read: VISTA's paper",
            "2 videos or pictures, 1 are missing",
            "hrvideobench: 1 of 200 questions (test): 199 are missing; no difference is given",
            "bad question: 1, the first: hr, row 3: no mcq",
        ):
            assert line in done.stdout, line
        assert done.stdout.split("\n\n")[1].splitlines()[1].split()[1:] == [
            "1",
            "200",
            "100.00",
            "68.50",
            "-",
        ]
        limited = call_tool("evaluate", *served, "--limit", 1)
        assert "68.50" not in limited.stdout and "by --limit" in limited.stdout
        write(
            tmp_path / "data",
            "hr.jsonl",
            json.dumps(rows[0] | {"mcq": row["mcq"] | {"correct_option": "A. x"}}),
        )
        other = call_tool("evaluate", *served)
        assert other.returncode == 2 and "another evaluation" in other.stderr
    assert shown == [8] and not (tmp_path / "o" / "media").exists()
    page = call_tool("evaluate", "report", tmp_path / "o")
    assert page.returncode == 0, page.stderr


@pytest.mark.skipif(CLONES not in os.environ, reason=f"{CLONES}: no folder of the authors' repositories")
@pytest.mark.parametrize("clone", CLONED)
def test_counts_of_the_authors_files(tmp_path, clone):
    folder = Path(os.environ[CLONES]) / clone
    if not folder.is_dir():
        pytest.skip(f"no clone {clone}")
    for name in CLONED[clone]:
        questions, problems = BENCHMARKS[name].questions(Source(folder, tmp_path, 2.0, 256))
        split = FACTS[name].split(len(questions))
        assert problems == [] and isinstance(split, Split)
        assert len(questions) == split.questions, name
        media = {p for q in questions for p in [*q.request.images, *(v["video"] for v in q.request.videos)]}
        assert len(media) == split.media, name
        assert not any("<TIME" in q.request.prompt or "<BBOX" in q.request.prompt for q in questions)
        json.dumps([q.request.prompt for q in questions])
