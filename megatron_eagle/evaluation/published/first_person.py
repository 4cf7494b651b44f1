"""Benchmarks about videos that a person films while acting: as `published.videos`."""

import re
from typing import Any

from megatron_eagle.data.sample import clock_seconds
from megatron_eagle.evaluation.published.options import first_of, letter, listed
from megatron_eagle.evaluation.published.source import Source
from megatron_eagle.evaluation.published.videos import Records, choice

# Words that begin the names of HD-EPIC's tables -> the category whose mean counts.
HD_EPIC = ("recipe", "ingredient", "nutrition", "fine_grained", "3d_perception", "object_motion", "gaze")
_TIME = re.compile(r"<TIME\s+([\d:.]+)\s+([^>]+?)\s*>")
_BOX = re.compile(r"<BBOX\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s*>")
_PREDICTIVE = "reasoning/predictive"  # the task of HourVideo that must not see how it ends
_PIXELS = 1408  # both sides of HD-EPIC's frames, in which its boxes are written


def hd_epic(source: Source, table: str, row: dict[str, Any]) -> Records:
    """One table per question type, an object of questions.

    Videos stand in the order of their numbers, then pictures, each of them the one frame at its time. Times
    in question and choices become seconds from where the input begins, and boxes parts of 1000, as in the
    authors' `base_model.py` (which rounds times down to whole seconds). Frames say their time in the file;
    where a part of a file is shown, what its second 0 is there stands before the question.
    """
    inputs = dict(sorted(row["inputs"].items(), key=_order))
    starts = {key: clock_seconds(one["start_time"]) for key, one in inputs.items() if "start_time" in one}
    many = len(inputs) > 1

    def plain(text: Any) -> str:
        def time(tag: re.Match[str]) -> str:
            seconds = clock_seconds(tag[1]) - starts.get(tag[2], 0.0)
            return f"{seconds:.1f} s" + (f" of {tag[2]}" if many else "")

        def box(tag: re.Match[str]) -> str:
            return f"({', '.join(str(int(float(side) / _PIXELS * 1000)) for side in tag.groups())})"

        return _BOX.sub(box, _TIME.sub(time, ", ".join(text) if isinstance(text, list) else str(text)))

    names = [f"{key}: <video-{number}>" for number, key in enumerate(inputs, 1)] if many else []
    timed = {tag[2] for tag in _TIME.finditer(f"{row['question']} {row['choices']}")}
    notes = [
        f"Times of {key} count from {at:.2f}s, where it begins." for key, at in starts.items() if key in timed
    ]
    yield choice(
        {"question": "\n".join([*names, *notes, plain(row["question"])])},
        [_input(source, key, value) for key, value in inputs.items()],
        [plain(one) for one in row["choices"]],
        id=row["name"],
        answer=letter(row.get("correct_idx")),
        category=next((kind for kind in HD_EPIC if table.startswith(kind)), table),
    )


def _order(item: tuple[str, Any]) -> tuple[bool, int]:
    kind, number = item[0].rsplit(" ", 1)
    return kind != "video", int(number)


def _input(source: Source, key: str, value: dict[str, Any]) -> dict[str, Any]:
    if key.startswith("image"):
        return source.frame(value["id"], clock_seconds(value["time"]))
    part = (clock_seconds(value[name]) if name in value else None for name in ("start_time", "end_time"))
    return source.video(value["id"], *part)


def egoschema(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`questions.json` with `subset_answers.json`, or parquet with answers."""
    name = first_of(row, "q_uid", "video_idx")
    options = listed(row.get("option")) or [row[f"option {i}"] for i in range(5)]
    answer = row.get("answer")
    if answer is None:
        answer = source.object("subset_answers.json").get(name)
    yield choice(row, source.video(name), options, id=name, answer=letter(answer))


def egoplan(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`EgoPlan_validation.json` or parquet, with videos cut at the current observation, named by sample or by
    video."""
    name = first_of(row, "rearranged_id", "video_path", "sample_id")
    question = row.get("question") or f"What is the next step towards this goal: {row['task_goal']}?"
    yield choice(
        {"question": question},
        source.video(str(name)),
        [row[f"choice_{letter}"] for letter in "abcd"],
        id=str(row["sample_id"]),
        answer=first_of(row, "golden_choice_idx", "answer"),
        category=row.get("video_source") or row.get("domain", "all"),
    )


def hourvideo(source: Source, table: str, row: dict[str, Any]) -> Records:
    """Annotations by video. Options may be pictures, and a question about
    what comes next is shown the video up to there, as in the authors' `gemini_utils.py`."""
    options = [str(row[f"answer_{i}"]) for i in range(1, 6)]
    shown = all(option.endswith((".png", ".jpg", ".jpeg")) for option in options)
    images = [source.picture(option) for option in options] if shown else []
    end = clock_seconds(row["relevant_timestamps"].split("-")[0]) if row["task"] == _PREDICTIVE else None
    yield choice(
        row,
        source.video(row["video_uid"], end=end),
        [f"<image-{i}>" for i in range(1, 6)] if shown else options,
        id=row["qid"],
        answer=row.get("correct_answer_label"),
        category=row["task"],
        images=images,
    )


def hourvideo_test(source: Source, table: str, row: dict[str, Any]) -> Records:
    """As `hourvideo`, where the authors keep the answers."""
    for record in hourvideo(source, table, row):
        yield record | {"metric": "submission"}


def openeqa(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`open-eqa-v0.json`; each episode's frames made into a video of the episode's name."""
    yield {
        "id": row["question_id"],
        "question": row["question"],
        "metric": "judge-openeqa",
        "answer": [row["answer"], *(row.get("extra_answers") or [])],
        "videos": [source.video(row["episode_history"])],
        "category": row["category"],
    }
