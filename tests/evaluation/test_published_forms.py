"""What a hub's and a kit's download brings is what the authors' files bring."""

import copy
import re
from pathlib import Path

import pytest

from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.benchmarks import digest_of
from megatron_eagle.evaluation.judge import SCALES, Judge
from megatron_eagle.evaluation.published.facts import FACTS
from megatron_eagle.evaluation.published.held import LocalMedia
from megatron_eagle.evaluation.published.registry import BENCHMARKS
from megatron_eagle.evaluation.published.source import Source
from megatron_eagle.evaluation.published.tables import read_table
from megatron_eagle.evaluation.summary import overall
from megatron_eagle.inference.generate import Request
from tests.evaluation.kit_forms import KIT
from tests.evaluation.published_cases import CASES, PNG, PNG64, write
from tests.evaluation.published_forms import ERQA, HUB, MOVIE, tarred, tfrecord, zipped

FORMS = [(HUB, name) for name in HUB] + [(KIT, name) for name in KIT]
NAMES = [f"{'hub' if forms is HUB else 'kit'}-{name}" for forms, name in FORMS]


class _Marks:
    """Replies with the mark that the answer asks for."""

    def answer(self, request, sampling):
        return re.search(r"judge: ([\d.]+)", request.prompt)[1]


def read(folder, name):
    return BENCHMARKS[name].questions(Source(folder, folder / "out" / "pictures", 2.0, 256))


def lay(folder, file, content, others):
    write(folder, file, content)
    for other, data in others.items():
        write(folder, other, data)


@pytest.mark.parametrize(("forms", "name"), FORMS, ids=NAMES)
def test_form_and_score(tmp_path, forms, name):
    file, content, others, answers, score = forms[name]
    lay(tmp_path, file, content, others)
    questions, problems = read(tmp_path, name)
    assert problems == [] and len(questions) == len(answers)
    judge = Judge(_Marks()) if any(q.metric in SCALES for q in questions) else None
    scored = [(q, q.score(text, judge)) for q, text in zip(questions, answers, strict=True)]
    assert overall(BENCHMARKS[name], scored, questions) == pytest.approx(score)
    with LocalMedia(tmp_path / "out" / "media") as local:
        for question in questions:
            request = local(question.request)
            assert all(Path(path).is_file() for path in request.images)
            for video in request.videos:
                found = Path(video["video"])
                assert found.is_file() and found.read_bytes() in (MOVIE, b"", b"own")
            assert all(Path(path).read_bytes() == PNG for path in request.images[:1])
    assert not (tmp_path / "out" / "media").exists()


@pytest.mark.parametrize(
    ("forms", "name"),
    [(forms, name) for forms, name in FORMS if isinstance(forms[name][1], list)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rows_without_values_are_lines_with_their_rows(tmp_path, forms, name):
    file, content, others, *_ = forms[name]
    lay(tmp_path, file, content, others)
    whole, _ = read(tmp_path, name)
    rows = copy.deepcopy(content)
    for key in content[0]:
        changed = [{**rows[0], key: None if file.endswith(".parquet") else ""}, *rows[1:]]
        if key == "image" and len(rows) > 1 and file.endswith(".tsv"):
            continue  # another row's picture may be this one's
        write(tmp_path, file, changed)
        questions, problems = read(tmp_path, name)
        for problem in problems:
            assert problem.line <= len(rows) and problem.reason and "\n" not in problem.reason, key
    write(tmp_path, file, [*rows, dict.fromkeys(rows[0])])
    questions, problems = read(tmp_path, name)
    assert digest_of(questions) == digest_of(whole)
    modes = "task_mode" in rows[0]  # a row of none of the tasks
    assert [problem.line for problem in problems] == ([] if modes else [len(rows) + 1])


def test_every_form_that_is_named_is_tried():
    """What `FACTS` says is read is tried here or in the authors' cases."""
    tried = {"parquet": HUB, "TFRecord": HUB, "VLMEvalKit's TSV": KIT}
    of_authors = {"mmstar", "erqa", "mmb-video", "mmbench-1.1"}  # whose case is the TSV
    for name, facts in FACTS.items():
        if name == "video-mme-subtitles":
            continue
        for form in facts.forms.replace(" or ", ", ").split(", "):
            forms = tried.get(form, CASES)
            assert name in forms or name in of_authors or name in ("cg-bench-long", "hourvideo-test"), (
                name,
                form,
            )


def test_all_tsvs_of_a_kit_lie_in_one_folder(tmp_path):
    for name in KIT:
        file, content, others, *_ = KIT[name]
        lay(tmp_path / name, file, content, {})
        lay(tmp_path / "LMUData", file, content, {})
    for name in KIT:
        alone, together = (read(tmp_path / folder, name)[0] for folder in (name, "LMUData"))
        assert digest_of(together) == digest_of(alone), name
    (tmp_path / "LMUData" / "DocVQA_VAL.tsv").unlink()
    with pytest.raises(UserError, match=r"none of the files val_v1.0_withQT.json, DocVQA_VAL.tsv"):
        read(tmp_path / "LMUData", "docvqa")  # none of the others is it


def test_archives_are_as_if_they_were_unpacked(tmp_path):
    write(tmp_path, "json/moving_count.json", CASES["mvbench"][1][:1])
    inner = "clevrer/video_validation/a.mp4"
    write(tmp_path, "video/clevrer.zip", zipped(**{inner: MOVIE}))
    write(tmp_path, "video/perception.tar", tarred(**{"perception/videos/a.mp4": b"another"}))
    ((question,), problems) = read(tmp_path, "mvbench")
    address = question.request.videos[0]["video"]
    assert problems == [] and address.startswith("unzip://")
    local = LocalMedia(tmp_path / "media")
    first = local(question.request)
    assert Path(first.videos[0]["video"]).read_bytes() == MOVIE
    assert local(question.request) == first  # still there
    local(Request("nothing"))
    assert not list((tmp_path / "media").iterdir())
    write(tmp_path, f"video/{inner}", MOVIE)  # unpacked by hand: the file counts
    ((question,), _) = read(tmp_path, "mvbench")
    assert question.request.videos[0]["video"] == str(tmp_path / "video" / inner)


def test_damaged_archives_and_tables_are_one_line(tmp_path):
    write(tmp_path, "json/moving_count.json", CASES["mvbench"][1][:1])
    whole = zipped(**{"a.mp4": MOVIE})
    write(tmp_path, "video/a.zip", whole[: len(whole) // 2])
    with pytest.raises(UserError, match="a.zip is damaged or cut off"):
        read(tmp_path, "mvbench")
    write(tmp_path, "video/a.zip", whole)
    ((question,), _) = read(tmp_path, "mvbench")
    write(tmp_path, "video/a.zip", whole[:40] + b"x" + whole[41:])
    with pytest.raises(UserError, match="broken archive"):
        LocalMedia(tmp_path / "media")(question.request)
    data = tfrecord({"question": [ERQA.encode()], "answer": [b"A"]})
    for name, content in (("cut", data[:-9]), ("none", data[:12] + b"\xff" * (len(data) - 16) + data[-4:])):
        write(tmp_path, f"{name}.tfrecord", content)
        with pytest.raises(UserError, match="cannot be read as a benchmark's table: .*(cut off|no tf.train)"):
            list(read_table(tmp_path / f"{name}.tfrecord"))
    write(tmp_path, "x.parquet", b"PAR1" + bytes(40))
    with pytest.raises(UserError, match=r"x\.parquet"):
        list(read_table(tmp_path / "x.parquet"))


def test_a_picture_of_another_row_is_that_row_s(tmp_path):
    rows = [
        {"index": i, "question": "Q?", "answer": "['a']", "image": im}
        for i, im in enumerate(("1", PNG64, "7"))
    ]
    write(tmp_path, "DocVQA_VAL.tsv", rows)
    questions, (problem,) = read(tmp_path, "docvqa")
    assert [q.id for q in questions] == ["0", "1"] and len({q.request.images for q in questions}) == 1
    assert problem.line == 3 and problem.reason  # no such row
