"""What becomes of each key of a record, a turn, a part: used, refused, or known to change nothing.

Whatever can change what is seen or learned is used by its dialect (`dialects`), or refused here, with the
key's name; what is known to be about the sample and not of it is ignored.  A key that is neither is unknown:
nobody has said yet what it does.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from megatron_eagle.problems import Problem

UNKNOWN_KEY = "unknown key"
"""The kind of problem; its detail lists the keys as `unknown` names them."""
UNSUPPORTED_KEY = "unsupported key"
SWITCHES = ("loss", "train", "weight", "loss_weight", "loss_mask", "loss_scale")
"""Keys of a turn (or of a whole record) that say whether it is learned."""

MEDIA = frozenset(
    ("image", "images", "video", "videos", "document", "documents", "data", "lmdb_file", "lmdb_key", "system")
)
MEDIA_KEYS = MEDIA - {"system"}
CLIP = frozenset(f"{side}{tail}" for side in ("start", "end") for tail in ("", "_time"))
CLIP |= {"video_start", "video_end", "clip"}
RATE = ("fps", "sample_fps")
"""Frames a second, where frames are given one by one; `fps` of a video file is a wish for sampling."""
TIMES = ("times", "timestamps", "frame_times", "frame_timestamps")
"""Seconds of frames that are given one by one."""
SAMPLING = frozenset(
    ("fps", "min_frames", "max_frames", "max_tiles", "max_dynamic_tiles", "max_dynamic_patch")
)
OF_VIDEOS = CLIP | SAMPLING | {*RATE, *TIMES, "nframes"}
"""Keys that an object may have that names a video."""

USED = {
    "record": MEDIA | CLIP | SAMPLING | frozenset((*RATE, *TIMES, *SWITCHES)),
    "turn": frozenset(SWITCHES),
    "part": CLIP
    | {"type", "text", "image", "image_url", "url", "path", "value", "video", "video_url", "document"}
    | {"input_text", "input_image", "output_text", "lmdb_file", "lmdb_key"}
    | {"min_frames", "max_frames", "nframes", *RATE, *TIMES},
    "medium": CLIP
    | SAMPLING
    | {"nframes", "path", "url", "image", "video", "frames", "lmdb_file", "lmdb_key", *RATE, *TIMES}
    | {"type", "image_list", "video_list", "text"},  # the last four are Eagle's `data`
}
"""Keys that are used in every dialect, by where they stand."""

_UNSEEN = (
    ("audio", "audios", "audio_url", "input_audio", "bytes", "crop", "rotation", "rotate", "mask", "masks")
    + ("min_pixels", "max_pixels", "total_pixels", "resized_width", "resized_height", "nframes")
    + ("num_frames_to_sample", "video_fps_override", "augment", "data_augment", "file", "file_data")
)
_UNLEARNED = (
    ("tools", "functions", "tool_calls", "function_call", "objects", "bbox", "bboxes", "boxes", "points")
    + ("reasoning_content", "reasoning", "thinking", "thought", "refusal", "history", "prefix", "suffix")
    + (
        "chosen",
        "rejected",
        "rejected_response",
        "rejected_messages",
        "rejected_images",
        "kto_tag",
        "ranking",
    )
    + ("positive_messages", "negative_messages", "margin", "channel", "image", "images", "video", "videos")
    + ("document", "documents", *CLIP)
)
REFUSED = frozenset((*_UNSEEN, *_UNLEARNED))
"""Keys that change what is seen or learned, and are not used where their dialect does not say so."""
# Of these keys, values that change nothing.
_HARMLESS: dict[str, tuple[object, ...]] = {
    "detail": ("auto", "high"),
    "ranking": (False,),
    "prefix": (False,),
}
_WATCHED = {"detail"}  # known, but for some of its values
_STAND_FOR_MEDIA = ("image_id", "video_id", "youtube_id")  # where no medium is named otherwise

METADATA = {
    "record": frozenset(
        ("id", "idx", "index", "uid", "uuid", "qid", "key", "hash", "md5", "sha256", "name", "title", "url")
        + ("question_id", "sample_id", "image_id", "video_id", "doc_id", "data_id", "prompt_id", "pair_id")
        + ("conversation_id", "dialog_id", "source_id", "original_id", "unique_id", "new_id", "item_id")
        + (
            "source",
            "sources",
            "data_source",
            "dataset",
            "dataset_name",
            "datasource",
            "origin",
            "provenance",
        )
        + ("task", "task_type", "type", "question_type", "qa_type", "answer_type", "category", "categories")
        + ("subcategory", "sub_category", "domain", "subject", "topic", "topics", "tag", "tags", "keywords")
        + ("capability", "skill", "skills", "ability", "level", "difficulty", "split", "subset", "part")
        + ("width", "height", "widths", "heights", "width_list", "height_list", "image_size", "image_width")
        + ("image_height", "size", "resolution", "aspect_ratio", "duration", "video_duration", "num_frames")
        + ("frame_count", "n_frames", "total_frames", "video_length", "image_num", "num_images", "n_images")
        + ("num_videos", "num_turns", "length", "n_tokens", "num_tokens", "token_count", "model")
        + (
            "model_name",
            "model_id",
            "generator",
            "generated_by",
            "annotator",
            "author",
            "created",
            "created_at",
        )
        + (
            "date",
            "timestamp",
            "updated_at",
            "version",
            "license",
            "licence",
            "copyright",
            "language",
            "lang",
        )
        + ("languages", "score", "scores", "rating", "ratings", "quality", "similarity", "clip_score")
        + ("metadata", "meta", "meta_info", "info", "extra", "extra_info", "note", "notes", "comment")
        + ("text_only", "modality", "modalities", "has_image", "has_video", "is_multimodal", "youtube_id")
        + ("relevance_ratings", "relevance_min", "visual_dependency_ratings", "visual_dependency_min")
        + ("image_correspondence_ratings", "image_correspondence_min", "formatting_ratings", "formatting_min")
        + ("raw_fps", "video_fps", "original_url", "coco_url", "flickr_url")
        # What img2dataset writes beside each picture.
        + ("status", "error_message", "exif", "original_width", "original_height")
    ),
    "turn": frozenset(
        (
            "id",
            "idx",
            "index",
            "turn",
            "turn_id",
            "uuid",
            "name",
            "source",
            "model",
            "model_name",
            "timestamp",
        )
        + ("created_at", "tool_call_id", "status", "end_turn", "finish_reason", "lang", "language", "score")
        + (
            "rating",
            "tokens",
            "num_tokens",
            "token_count",
            "category",
            "type",
            "metadata",
            "meta",
            "markdown",
        )
    ),
    "part": frozenset(
        ("id", "index", "width", "height", "format", "mime_type", "media_type", "mimetype", "size", "raw_fps")
        + ("name", "title", "source", "metadata", "cache_control", "duration", "annotations", "detail")
    ),
}
METADATA["medium"] = METADATA["part"]
"""Keys about a sample, a turn or a medium that change nothing."""


def present(item: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of an object that say something: null is as if it were not there."""
    return {key: value for key, value in item.items() if value is not None}


def _is_empty(value: object) -> bool:
    return value in (None, "", [], {}, [""], [None], "[]", "{}", "null")


class Keys:
    """The keys of one record, looked at as they are met; `used` are those of its dialect, by place.

    `ignore` lists further keys that the recipe says to ignore.
    """

    def __init__(self, used: Mapping[str, Collection[str]], ignore: Collection[str] = ()):
        self._used, self._ignore = used, ignore
        self.unknown: dict[str, None] = {}
        self.refused: dict[str, None] = {}

    def look(self, item: Mapping[str, Any], place: str) -> None:
        """Sort the keys of an object that stands at a place: record, turn, part or medium."""
        known, metadata = USED[place], METADATA[place]
        for key, value in item.items():
            if key in known or key in self._used.get(place, ()) or key in self._ignore:
                continue
            alone = key in _STAND_FOR_MEDIA and not MEDIA_KEYS & item.keys()
            if key in metadata and key not in _WATCHED and not alone:
                continue
            where = f'"{key}" of a {place}'
            if key in REFUSED or key in _WATCHED:
                if not _is_empty(value) and value not in _HARMLESS.get(key, ()):
                    self.refused[where] = None
            elif value is not None:
                self.unknown[where] = None

    def look_at_all(self, items: object, place: str) -> None:
        """The same for every object in a list (and in lists in it), or for one object."""
        for item in _objects(items):
            self.look(item, place)

    def check(self) -> None:
        """Refuse keys that are not used and are no metadata.

        Raises:
            Problem: with the names of those that are refused, else of those that are unknown.
        """
        if self.refused:
            raise Problem(UNSUPPORTED_KEY, ", ".join(self.refused))
        if self.unknown:
            raise Problem(UNKNOWN_KEY, ", ".join(self.unknown))


def _objects(items: object) -> Iterator[Mapping[str, Any]]:
    if isinstance(items, dict):
        yield items
    elif isinstance(items, list):
        for item in items:
            yield from _objects(item)


def is_learned(item: Mapping[str, Any], what: str) -> bool | None:
    """What the switches of a turn or a record say: learned, not learned, or nothing (None).

    Raises:
        Problem: a weight between the two.
    """
    found = {key: item[key] for key in SWITCHES if item.get(key) is not None}
    for key, value in found.items():
        if isinstance(value, str) or value not in (0, 1):
            raise Problem(UNSUPPORTED_KEY, f'"{key}" of {what} is {value!r}; it is learned (1, true) or not')
    return all(found.values()) if found else None
