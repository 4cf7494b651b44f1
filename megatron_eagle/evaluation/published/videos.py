"""Benchmarks about videos: one question of a published table -> its record.

Each function takes the benchmark's folder, the name of the question's table without its ending, and the
question as the table has it (see `published.rows`), and gives records of `evaluation.benchmarks`; without an
`id` a record is named by its row. What it cannot read raises KeyError, TypeError, ValueError or IndexError.
"""

from collections.abc import Iterator
from typing import Any

from megatron_eagle.evaluation.published import subtitles
from megatron_eagle.evaluation.published.options import (
    first_of,
    inline_options,
    letter,
    letter_of,
    listed,
    without_letters,
)
from megatron_eagle.evaluation.published.source import Source

Records = Iterator[dict[str, Any]]
_MVBENCH = {  # the folders in which MVBench's authors keep the videos of a task
    **dict.fromkeys(("action_sequence", "action_prediction", "object_interaction"), "star/Charades_v1_480"),
    **dict.fromkeys(
        ("object_existence", "moving_direction", "moving_count", "moving_attribute")
        + ("counterfactual_inference",),
        "clevrer/video_validation",
    ),
    **dict.fromkeys(
        ("object_shuffle", "action_count", "state_change", "character_order"), "perception/videos"
    ),
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "fine_grained_pose": "nturgbd",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
}
_MLVU = {  # tasks of M-Avg -> the folders in which MLVU's authors keep their videos
    "plotQA": "1_plotQA",
    "findNeedle": "2_needle",
    "needle": "2_needle",
    "ego": "3_ego",
    "count": "4_count",
    "order": "5_order",
    "anomaly_reco": "6_anomaly_reco",
    "topic_reasoning": "7_topic_reasoning",
}


def choice(row: dict[str, Any], video: Any, options: Any, **more: Any) -> dict[str, Any]:
    """The record of a multiple-choice question about one video."""
    videos = video if isinstance(video, list) else [video]
    record = {
        "question": row["question"],
        "metric": "choice",
        "videos": videos,
        "options": without_letters(listed(options)),
    }
    return record | more


def video_mme(source: Source, table: str, row: dict[str, Any]) -> Records:
    """Parquet of questions, JSON of videos with `questions`, or VLMEvalKit's TSV."""
    name = first_of(row, "videoID", "video")
    more = {"answer": row.get("answer"), "category": row["duration"]}
    more |= {"id": str(row["question_id"])} if row.get("question_id") else {}
    yield choice(row, source.video(name), first_of(row, "options", "candidates"), **more)


def video_mme_subtitles(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`video_mme`, with those lines of `subtitle/ID.srt` before the question that are on the screen at a
    frame that is shown, as the authors show them; all, if the video cannot be looked at."""
    for record in video_mme(source, table, row):
        found = source.subtitles(f"subtitle/{first_of(row, 'videoID', 'video')}")
        if times := source.frame_times(record["videos"][0]):
            found = subtitles.at_frames(found, times)
        text = "\n".join(dict.fromkeys(one.text for one in found))
        heading = f"This video's subtitles are listed below:\n{text}\n\n" if text else ""
        yield record | {"question": heading + record["question"]}


def mvbench(source: Source, table: str, row: dict[str, Any]) -> Records:
    """One table per task, or VLMEvalKit's TSV; several of its sets have videos of the same names, and the
    task says which is meant. Videos that are folders of frames have to be made into files first."""
    task = str(row.get("task_type") or table).lower().replace(" ", "_").replace("-", "_")
    own = _MVBENCH.get(task)
    start, end = (None if row.get(key) in (None, "") else float(row[key]) for key in ("start", "end"))
    video = source.video(row["video"] if own is None else f"{own}/{row['video']}", start, end)
    if own and any(f"/{other}/" in video["video"] for other in {*_MVBENCH.values()} - {own}):
        video["video"] = str(source.folder / own / row["video"])  # what was found is another task's
    options = [str(option) for option in listed(row["candidates"])]
    answer = letter_of(options, row["answer"])
    yield choice(row, video, options) | {
        "answer": answer,
        "unanswerable": not answer,
        "category": task,
    }


def mlvu(source: Source, table: str, row: dict[str, Any]) -> Records:
    """One table per task, parquet, or VLMEvalKit's TSV; those with free answers are not part of M-Avg and
    give nothing. The right option is the last one that is the answer, and if none is the question counts as
    wrong, as in the authors' `choice_bench.py`."""
    if "candidates" in row:
        question, options = row["question"], [str(option) for option in listed(row["candidates"])]
        answer = letter_of(options, row["answer"])
    elif "video_name" in row:  # parquet has them in the question, and a letter
        question, options = inline_options(row["question"])
        answer = row["answer"]
    else:
        return
    task = first_of(row, "question_type", "task_type")
    if task not in _MLVU:
        return
    video = source.video(f"{_MLVU[task]}/{first_of(row, 'video', 'video_name')}")
    yield choice({"question": question}, video, options) | {
        "answer": answer,
        "unanswerable": "candidates" in row and not answer,
        "category": "needle" if task == "findNeedle" else task,
    }


def longvideobench(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`lvb_val.json`, parquet, or VLMEvalKit's TSV. Subtitles begin at `starting_timestamp_for_subtitles` of
    their own clock; those during which a frame is shown stand between the frames, as in the authors'
    `longvideobench_dataset.py`."""
    video = source.video(row["video_path"])
    name = row.get("subtitle_path")
    found = source.subtitles(f"subtitles/{name}", _number(row.get("duration"))) if name else []
    shift = _number(row.get("starting_timestamp_for_subtitles")) or 0.0
    if found:
        video["subtitles"] = [[one.start - shift, one.end - shift, one.text] for one in found]
    options = listed(row.get("candidates")) or [
        row[f"option{i}"] for i in range(5) if row.get(f"option{i}") not in (None, "", "N/A")
    ]
    yield choice(
        row,
        video,
        options,
        id=str(row["id"]),
        answer=letter(row.get("correct_choice")),
        category=str(row.get("duration_group", "all")),
    )


def perception_test(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`mc_question_valid.json` by video, or parquet by question."""
    name, number = row["video_name"], first_of(row, "question_id", "id")
    yield choice(
        row,
        source.video(name),
        row["options"],
        id=f"{name}:{number}",
        answer=letter(row.get("answer_id")),
        category=row.get("area", "all"),
    )


def cg_bench_long(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`cgbench.json`, `cgbench_mini.json` or VLMEvalKit's TSV: the question about the whole video."""
    if _asks(row, "long_acc"):
        yield _cg_bench(row, source.video(row["video_uid"]))


def cg_bench_clue(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`cgbench.json`, `cgbench_mini.json` or VLMEvalKit's TSV: the question about the parts that hold the
    clue, each as a video."""
    if _asks(row, "clue_acc"):
        parts = _clues(row["clue_intervals"])
        yield _cg_bench(row, [source.video(row["video_uid"], *part) for part in parts])


def cg_bench_miou(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`cgbench.json`, `cgbench_mini.json` or VLMEvalKit's TSV: where in the video the clue is."""
    if _asks(row, "miou"):
        options = "\n".join(f"{letter(i)}. {option}" for i, option in enumerate(listed(row["choices"])))
        answer = [part for part in _clues(first_of(row, "clue_intervals", "answer")) if part[0] < part[1]]
        yield {
            "id": str(row["qid"]),
            "question": f"{row['question']}\n{options}\nIn which parts of the video is the evidence?",
            "metric": "intervals",
            "answer": answer,
            "unanswerable": not answer,  # what lasts no time overlaps no answer
            "videos": [source.video(row["video_uid"])],
            "category": row["domain"],
        }


def _asks(row: dict[str, Any], mode: str) -> bool:
    """Whether a row is of this task: in the TSV every question stands once for each."""
    return mode == str(row.get("task_mode", mode))


def cg_bench_open(source: Source, table: str, row: dict[str, Any]) -> Records:
    """`cgbench.json`, `cgbench_mini.json` or VLMEvalKit's TSV of open questions: the question without its
    options; the judge may see the clue."""
    yield {
        "id": str(row["qid"]),
        "question": row["question"],
        "metric": "judge-cg-bench",
        "answer": row["answer"],
        "videos": [source.video(row["video_uid"])],
        "evidence": [source.video(row["video_uid"], *part) for part in _clues(row["clue_intervals"])],
        "category": row["domain"],
    }


def _cg_bench(row: dict[str, Any], video: Any) -> dict[str, Any]:
    answer = row["answer"] if "task_mode" in row else row["right_answer"]
    return choice(row, video, row["choices"], id=str(row["qid"]), answer=answer, category=row["domain"])


def _clues(intervals: Any) -> list[list[float]]:
    parts = [list(map(float, part)) for part in listed(intervals)]
    if not parts:
        raise ValueError("there are no clue_intervals")
    return parts


def charades_sta(source: Source, table: str, row: Any) -> Records:
    """Lines `VIDEO START END##SENTENCE`, or parquet of `video`, `caption`, `timestamp`. Where the end is not
    after the start, no answer is right."""
    if isinstance(row, str):
        place, sentence = row.split("##", 1)
        name, start, end = place.split()
    else:
        name, sentence, (start, end) = row["video"], row["caption"], row["timestamp"]
    answer = [float(start), float(end)]
    yield {
        "question": f"When does this happen in the video: {sentence.strip()}",
        "metric": "grounding",
        "answer": answer,
        "unanswerable": answer[0] >= answer[1],  # no answer overlaps it
        "videos": [source.video(name)],
    }


def hrvideobench(source: Source, table: str, row: dict[str, Any]) -> Records:
    """JSON Lines of `path`, `qa`, `mcq` and, in some copies, `video_path`; the letter before
    `correct_option` is right."""
    options, right = row["mcq"]["options"], str(row["mcq"]["correct_option"]).strip()
    yield choice(
        {"question": row["qa"]["question"]},
        source.video(first_of(row, "video_path", "path")),
        options,
        answer=right[:1] if right[1:2] in (".", ")", ":", "") else right,
        category=str(row.get("category", "all")),
    )


def mmbench_video(source: Source, table: str, row: dict[str, Any]) -> Records:
    """A TSV of open questions, judged from 0 to 3."""
    yield {
        "id": str(row["index"]),
        "question": row["question"],
        "metric": "judge-mmb-video",
        "answer": row["answer"],
        "videos": [source.video(first_of(row, "video_path", "video"))],
        "category": row.get("video_type", "all"),
    }


def _number(value: Any) -> float | None:
    return None if value in (None, "") else float(value)
