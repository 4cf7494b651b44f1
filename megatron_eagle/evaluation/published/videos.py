"""Benchmarks about videos: one row of a published table -> its questions.

Each function takes the benchmark's folder, the name of the row's table without its ending, and the row, and
gives records of `evaluation.benchmarks`. A row it cannot read raises KeyError, TypeError, ValueError or
IndexError.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from megatron_eagle.data.sample import clock_seconds
from megatron_eagle.evaluation.published.source import Source, columns, letter, without_letters

Records = Iterator[dict[str, Any]]
# Words that begin the names of HD-EPIC's tables -> the category whose mean counts.
_HD_EPIC = ("recipe", "ingredient", "nutrition", "fine_grained", "3d_perception", "object_motion", "gaze")


def choice(row: dict[str, Any], video: Any, options: Any, **more: Any) -> dict[str, Any]:
    """The record of a multiple-choice question about one video."""
    videos = video if isinstance(video, list) else [video]
    record = {
        "question": row["question"],
        "metric": "choice",
        "videos": videos,
        "options": without_letters(options),
    }
    return record | more


def video_mme(source: Source, table: str, row: dict[str, Any]) -> Records:
    """Parquet of questions, or JSON of videos with `questions`."""
    for item in row.get("questions") or [row]:
        item = row | item
        yield choice(
            item,
            source.video(item["videoID"]),
            item["options"],
            id=item["question_id"],
            answer=item.get("answer"),
            category=item["duration"],
        )


def video_mme_subtitles(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`video_mme`, with all of `subtitle/ID.srt` before the question."""
    for record in video_mme(source, table, row):
        text = source.subtitles(f"subtitle/{row['videoID']}")
        heading = f"Subtitles of the video:\n{text}\n\n" if text else ""
        yield record | {"question": heading + record["question"]}


def mvbench(source: Source, table: str, row: dict[str, Any]) -> Records:
    """One table per task. Videos that are folders of frames have to be made into files first."""
    video = source.video(row["video"], row.get("start"), row.get("end"))
    where = f"{row['video']}:{row.get('start', '')}:{row['question']}"
    yield choice(row, video, row["candidates"], id=f"{table}:{where}", answer=row["answer"], category=table)


def mlvu(source: Source, table: str, row: dict[str, Any]) -> Records:
    """One table per task; those with free answers are not part of M-Avg and give nothing."""
    if "candidates" in row:
        task = row["question_type"]
        name = f"{task}:{row['video']}:{row['question']}"
        yield choice(
            row,
            source.video(row["video"]),
            row["candidates"],
            id=name,
            answer=row["answer"],
            category=task,
        )


def longvideobench(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`lvb_val.json`; subtitles go before the question, as its authors ask."""
    text = source.subtitles(row["subtitle_path"]) if row.get("subtitle_path") else ""
    question = f"Subtitles of the video:\n{text}\n\n{row['question']}" if text else row["question"]
    yield choice(
        {"question": question},
        source.video(row["video_path"]),
        row["candidates"],
        id=row["id"],
        answer=letter(row.get("correct_choice")),
        category=str(row.get("duration_group", "all")),
    )


def egoschema(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`questions.json` with `subset_answers.json`, or parquet with answers."""
    name = row.get("q_uid") or row["video_idx"]
    options = row.get("option") or [row[f"option {i}"] for i in range(5)]
    answer = row.get("answer")
    if answer is None:
        answer = source.object("subset_answers.json").get(name)
    yield choice(row, source.video(name), options, id=name, answer=letter(answer))


def perception_test(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`mc_question_valid.json` by video, or parquet by question."""
    if "question" in row:
        items = [(row["video_name"], row["question_id"], row)]
    else:
        items = [(name, item["id"], item) for name, video in row.items() for item in video["mc_question"]]
    for name, number, item in items:
        yield choice(
            item,
            source.video(name),
            item["options"],
            id=f"{name}:{number}",
            answer=letter(item.get("answer_id")),
            category=item.get("area", "all"),
        )


def cg_bench_long(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`cgbench.json`: the question about the whole video."""
    yield _cg_bench(source, row, source.video(row["video_uid"]))


def cg_bench_clue(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`cgbench.json`: the question about the parts that hold the clue, each as a video."""
    yield _cg_bench(source, row, [source.video(row["video_uid"], *part) for part in row["clue_intervals"]])


def cg_bench_miou(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`cgbench.json`: where in the video the clue is."""
    options = "\n".join(f"{chr(65 + i)}. {option}" for i, option in enumerate(row["choices"]))
    yield {
        "id": str(row["qid"]),
        "question": f"{row['question']}\n{options}\nIn which parts of the video is the evidence?",
        "metric": "intervals",
        "answer": row["clue_intervals"],
        "videos": [source.video(row["video_uid"])],
        "category": row["domain"],
    }


def _cg_bench(source: Source, row: dict[str, Any], video: Any) -> dict[str, Any]:
    more = {"id": str(row["qid"]), "answer": row["right_answer"], "category": row["domain"]}
    return choice(row, video, row["choices"], **more)


def hourvideo(source: Source, table: str, row: dict[str, Any]) -> Records:
    """Annotations by video. Questions whose options are pictures are refused."""
    for name, video in row.items():
        for item in video["benchmark_dataset"]:
            options = [item[f"answer_{i}"] for i in range(1, 6)]
            if any(str(option).endswith((".png", ".jpg")) for option in options):
                options = []  # refused further on, by name
            yield choice(
                item,
                source.video(name),
                options,
                id=item["qid"],
                answer=item.get("correct_answer_label"),
                category=item["task"],
            )


def charades_sta(source: Source, table: str, row: str) -> Records:
    """Lines `VIDEO START END##SENTENCE`."""
    place, sentence = row.split("##", 1)
    name, start, end = place.split()
    yield {
        "id": f"{name}:{start}:{end}:{sentence}",
        "question": f"When does this happen in the video: {sentence.strip()}",
        "metric": "grounding",
        "answer": [float(start), float(end)],
        "videos": [source.video(name)],
    }


def hd_epic(source: Source, table: str, row: dict[str, Any]) -> Records:
    """One table per question type, an object of questions; times are clock times."""
    category = next((kind for kind in _HD_EPIC if table.startswith(kind)), table)
    for name, item in row.items():
        videos = [
            source.video(video["id"], *(_clock(video.get(key)) for key in ("start_time", "end_time")))
            for _, video in sorted(item["inputs"].items())
            if "id" in video and "image" not in video
        ]
        question = re.sub(r"<TIME ([\d:.]+)[^>]*>", r"\1", item["question"])
        yield choice(
            {"question": question},
            videos,
            item["choices"],
            id=name,
            answer=letter(item.get("correct_idx")),
            category=category,
        )


def hrvideobench(source: Source, table: str, row: dict[str, Any]) -> Records:
    """A table of `video`, `question`, `options` (or columns A, B, ...) and `answer`."""
    name = next(row[key] for key in ("video", "video_path", "video_name", "video_id") if row.get(key))
    options = row.get("options") or row.get("choices") or columns(row)
    if isinstance(options, str):
        options = json.loads(options)
    where = str(row.get("id") or row.get("index") or f"{name}:{row['question']}")
    more = {"id": where, "answer": row["answer"], "category": str(row.get("category", "all"))}
    yield choice(row, source.video(name), options, **more)


def egoplan(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`EgoPlan_validation.json` with videos cut at the current observation, named by sample or by video."""
    name = next(row[key] for key in ("rearranged_id", "video_path", "sample_id") if row.get(key) is not None)
    question = row.get("question") or f"What is the next step towards this goal: {row['task_goal']}?"
    yield choice(
        {"question": question},
        source.video(str(name)),
        [row[f"choice_{letter}"] for letter in "abcd"],
        id=str(row["sample_id"]),
        answer=row["golden_choice_idx"],
        category=row.get("video_source") or row.get("domain", "all"),
    )


def mmbench_video(source: Source, table: str, row: dict[str, Any]) -> Records:
    """A TSV of open questions, judged from 0 to 3."""
    yield {
        "id": str(row["index"]),
        "question": row["question"],
        "metric": "judge",
        "answer": row["answer"],
        "videos": [source.video(row.get("video_path") or row["video"])],
        "category": row.get("video_type", "all"),
    }


def openeqa(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`open-eqa-v0.json`; each episode's frames made into a video of the episode's name."""
    yield {
        "id": row["question_id"],
        "question": row["question"],
        "metric": "judge",
        "answer": [row["answer"], *(row.get("extra_answers") or [])],
        "videos": [source.video(row["episode_history"])],
        "category": row["category"],
    }


def _clock(text: str | None) -> float | None:
    """Seconds of a clock time; None for none."""
    return None if text is None else clock_seconds(str(text))
