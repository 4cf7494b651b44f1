"""A prompt's media to what the network takes, and their places in it, by the export's own processor.

An item is a part of a message, `{"image": file}` or `{"video": file, "fps": 4}`; a file is bytes, a path or a
PIL image, a video also a list of pictures. What a prompt says of an item is kept with its tiles, its number
is not: a cached item gets the label of the place where it stands.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature
from vllm import envs
from vllm.logger import init_logger
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import MultiModalDataItems, MultiModalDataParser, ProcessorBatchItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdateDetails,
)
from vllm.multimodal.processing.processor import PlaceholderFeaturesInfo

from .export import ANSWER, NAME, load_medium, prompt_medium, reading, served_processor
from .seen import SEEN, describe_medium

_KINDS = ("image", "video")
_TILING = ("min_dynamic_tiles", "max_dynamic_tiles", "use_thumbnail")
_logger = init_logger(f"vllm.{__name__}")  # below vLLM's own, whose handlers it has


class MediaParts(ProcessorBatchItems[dict[str, Any]]):
    """Parts of messages, hashed by their files and settings."""


class PartParser(MultiModalDataParser):
    """Items in any of their forms to parts of messages."""

    def _parse_image_data(self, data: Any) -> MediaParts:
        return MediaParts([_part("image", item) for item in _items(data)], "image")

    def _parse_video_data(self, data: Any) -> MediaParts:
        return MediaParts([_part("video", item) for item in _items(data)], "video")


def _items(data: Any) -> list[Any]:
    return list(data) if isinstance(data, list) else [data]


def _part(kind: str, item: Any) -> dict[str, Any] | None:
    """None, as vLLM gives an item that only a cache knows, stays None."""
    if item is None:
        return None
    part = item if isinstance(item, dict) else {kind: item}
    source = part.get(kind)
    if isinstance(source, MediaWithBytes) and kind == "image":  # without our connector: decoded by vLLM
        source = source.original_bytes
    elif isinstance(source, str | Path):
        source = Path(source).read_bytes()
    if not isinstance(source, (bytes, Image.Image) if kind == "image" else (bytes, list)):
        raise ValueError(
            f"this {kind} is not a file but {type(source).__name__}; is VLLM_MEDIA_CONNECTOR={NAME} set?"
        )
    return {**part, kind: source}


class Eagle2_5_VLProcessingInfo(BaseProcessingInfo):
    """The export's processor, and how large an item can be."""

    def get_hf_processor(self, **_: object) -> Any:
        """The export's, made once."""
        if not hasattr(self, "_export"):
            self._export = served_processor(self.ctx.model_config)
            if self.ctx.model_config.tokenizer_mode != NAME or envs.VLLM_MEDIA_CONNECTOR != NAME:
                _logger.warning(
                    "Prompts are not quite as in training: this server lacks %s",
                    f"VLLM_MEDIA_CONNECTOR={NAME} or --tokenizer-mode {NAME}",
                )
        return self._export

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of each."""
        return dict.fromkeys(_KINDS)

    def get_data_parser(self) -> MultiModalDataParser:
        """Of parts of messages."""
        return PartParser()

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Of the largest picture and the longest video."""
        export = self.get_hf_processor()
        shown, _ = export.show(self.largest_image(), self.read_tiling({})[0])
        image = len(export.encode(shown.write(100, export.tokens_per_tile)))
        video = self.most_frames(seq_len) * self._tokens_per_frame()
        return {"image": min(image, seq_len), "video": min(video, seq_len)}

    def largest_image(self) -> Image.Image:
        """A picture that gets as many tiles as the server allows: --mm-processor-kwargs, or the export."""
        images = self.get_hf_processor().image_processor
        tiles = self.read_tiling({})[0].get("max_dynamic_tiles", images.max_dynamic_tiles)
        side = images.size["height"]
        return Image.new("RGB", (side * tiles, side), "white")

    def most_frames(self, seq_len: int) -> int:
        """Frames of a video that memory is kept for: the processor's own limit, or `num_frames` of
        --limit-mm-per-prompt, as far as they fit into a prompt."""
        limits = self.ctx.get_mm_config().limit_per_prompt.get("video")
        wanted = getattr(limits, "num_frames", None) or self.get_hf_processor().max_frames
        return max(2, min(int(wanted), seq_len // self._tokens_per_frame()) // 2 * 2)

    def _tokens_per_frame(self) -> int:
        """With the longest label."""
        export = self.get_hf_processor()
        longest = prompt_medium(export)((1,), 1.0, (99999.99,)).write(1, export.tokens_per_tile)
        return len(export.encode(longest))

    def read_tiling(self, asked: Mapping[str, object]) -> tuple[dict[str, Any], int | None, Any]:
        """How a request wants pictures cut, into how many tiles a frame (None: one, as in training), and the
        number under which it asks what was made of its media (None: it does not; see `seen`).

        Args:
            asked: `mm_processor_kwargs`: `min_dynamic_tiles`, `max_dynamic_tiles` and `use_thumbnail`, or
                those in `images_kwargs`; `max_dynamic_tiles` in `videos_kwargs`; `seen`.

        Raises:
            ValueError: another name, or a value that is none.
        """
        # Not `get_merged_mm_kwargs`, which drops what stands beside a scope that has the same name.
        merged: dict[str, Any] = dict(self.ctx.get_mm_config().merge_mm_processor_kwargs(asked))
        seen = merged.pop("seen", None)
        scopes = {name: merged.pop(name, None) or {} for name in ("images_kwargs", "videos_kwargs")}
        if not all(isinstance(scope, dict) for scope in scopes.values()):
            raise ValueError(f"{' and '.join(scopes)} must be objects")
        images, videos = {**merged, **scopes["images_kwargs"]}, scopes["videos_kwargs"]
        for name, value in [*images.items(), *videos.items()]:
            if name not in _TILING:
                raise ValueError(
                    f"mm_processor_kwargs has no {name}; known: {', '.join(_TILING)}, {' and '.join(scopes)}"
                )
            if name == "use_thumbnail" and not isinstance(value, bool):
                raise ValueError(f"use_thumbnail must be true or false, not {value!r}")
            if name != "use_thumbnail":
                self.check_count(name, value, limited=name.startswith("min"))
        return images, videos.get("max_dynamic_tiles"), seen

    def check_count(self, name: str, count: Any, *, limited: bool) -> None:
        """Refuse a number of tiles or frames that is none, or, where it is `limited`, one that no prompt can
        hold: what a request demands, not what it sets as a limit.

        Raises:
            ValueError: it is such a number.
        """
        limit = self.ctx.model_config.max_model_len // self.get_hf_processor().tokens_per_tile
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {count!r}")
        if limited and count > limit:
            raise ValueError(
                f"{name} is {count}; a prompt of this server holds {limit} tiles and frames (--max-model-len)"
            )

    def fitted(self, inputs: ProcessorInputs) -> ProcessorInputs:
        """A request with limits of frames and tiles that a prompt of this server holds, by the export's own
        rule (its processor's `fit`); unchanged where only a cache knows its media.

        Raises:
            ValueError: a number of frames that is none, or that no prompt can hold.
        """
        asked = dict(inputs.hf_processor_mm_kwargs)
        if ANSWER not in asked:  # no request: vLLM measures its memory
            return inputs
        answer, items = asked.pop(ANSWER), inputs.mm_data_items
        parts = {kind: list(items[kind].data) if kind in items else [] for kind in _KINDS}
        for part in parts["video"]:
            for name in {"nframes", "max_frames"} & (part or {}).keys():
                self.check_count(name, part[name], limited=name == "nframes")
        if any(part is None for own in parts.values() for part in own):
            return replace(inputs, hf_processor_mm_kwargs=asked)
        export, length = self.get_hf_processor(), self.ctx.model_config.max_model_len
        tiling, frame_tiles, _ = self.read_tiling(asked)
        text, pictures = self.text_of(inputs.prompt), [part["image"] for part in parts["image"]]
        with reading():
            fitted = export.fit(text, pictures, parts["video"], length, answer or None, tiling, frame_tiles)
        if fitted.lowered:
            _logger.warning_once(
                "Prompts show fewer frames or tiles than requests ask for: as many as %d tokens hold",
                length,
                scope="process",
            )
        if fitted.tiling != tiling:
            asked["images_kwargs"] = fitted.tiling
        if fitted.frame_tiles != frame_tiles:
            asked["videos_kwargs"] = {"max_dynamic_tiles": fitted.frame_tiles}
        if fitted.videos == parts["video"]:
            return replace(inputs, hf_processor_mm_kwargs=asked)
        # Under a client's own names for its videos others may be cached.
        names = {**(inputs.mm_uuid_items or {}), "video": [None] * len(fitted.videos)}
        shown = MultiModalDataItems({**items, "video": MediaParts(fitted.videos, "video")})
        return replace(inputs, hf_processor_mm_kwargs=asked, mm_data_items=shown, mm_uuid_items=names)

    def text_of(self, prompt: list[int]) -> str:
        """A prompt with its placeholders."""
        tokenizer = self.get_hf_processor().tokenizer
        return str(tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class Eagle2_5_VLDummyInputs(BaseDummyInputsBuilder[Eagle2_5_VLProcessingInfo]):
    """The largest media, for vLLM's measurement of memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """A placeholder for each item."""
        return "".join(f"<{kind}-{i + 1}>" for kind in _KINDS for i in range(mm_counts.get(kind, 0)))

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Any:
        """As many as are asked for."""
        side = self.info.largest_image().height
        frames = [Image.new("RGB", (side, side), "white")] * self.info.most_frames(seq_len)
        return {
            "image": [self.info.largest_image()] * mm_counts.get("image", 0),
            "video": [{"video": frames}] * mm_counts.get("video", 0),
        }


@dataclass
class _Written(PromptUpdateDetails):
    """What a prompt says of an item (`PromptMedium` of the export), without its number."""

    medium: Any = None


class Eagle2_5_VLMultiModalProcessor(BaseMultiModalProcessor[Eagle2_5_VLProcessingInfo]):
    """Cuts the items that no cache has, and writes the prompt of all."""

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        """vLLM's, of as many frames and tiles as fit."""
        return super().apply(self.info.fitted(inputs), timing_ctx)

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        export = self.info.get_hf_processor()
        tiling, frame_tiles, seen = self.info.read_tiling(hf_kwargs)
        data: dict[str, Any] = {}
        facts = []
        for kind in _KINDS:
            shown = []
            for part in mm_items.get(kind, ()):
                item = load_medium(export, part)
                shown.append(export.show(item, tiling, frame_tiles))
                if seen is not None:
                    said, tiles = shown[-1]
                    facts.append(describe_medium(export, item, said, tiles["pixel_values"], tiling))
            if shown:
                media = [medium for medium, _ in shown]
                data[f"{kind}_pixels"] = torch.cat([tiles["pixel_values"] for _, tiles in shown])
                data[f"{kind}_tiles"] = torch.tensor([sum(medium.tiles) for medium in media])
                data[f"{kind}_parts"] = torch.tensor([len(medium.tiles) for medium in media])
                data[f"{kind}_part_tiles"] = torch.tensor([n for medium in media for n in medium.tiles])
            if shown and kind == "video":
                times = [time for medium in media for time in medium.times]
                data["video_times"] = torch.tensor(times, dtype=torch.float64)
                data["video_fps"] = torch.tensor([medium.fps for medium in media], dtype=torch.float64)
                said = [json.dumps(getattr(medium, "said", ())).encode() for medium in media]
                data["video_said"] = torch.tensor([*b"".join(said)], dtype=torch.uint8)
                data["video_said_bytes"] = torch.tensor([len(own) for own in said])
        if seen is not None:
            SEEN.keep(seen, facts)
        return BatchFeature(data)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields: dict[str, MultiModalFieldConfig] = {}
        for kind in _KINDS:
            tiles, parts = (hf_inputs.get(f"{kind}_{name}", torch.empty(0)) for name in ("tiles", "parts"))
            fields[f"{kind}_pixels"] = MultiModalFieldConfig.flat_from_sizes(kind, tiles)
            fields[f"{kind}_tiles"] = MultiModalFieldConfig.batched(kind, keep_on_cpu=True)
            fields[f"{kind}_part_tiles"] = MultiModalFieldConfig.flat_from_sizes(
                kind, parts, keep_on_cpu=True
            )
        fields["video_times"] = MultiModalFieldConfig.flat_from_sizes("video", parts, keep_on_cpu=True)
        fields["video_fps"] = MultiModalFieldConfig.batched("video", keep_on_cpu=True)
        said = hf_inputs.get("video_said_bytes", torch.empty(0))
        fields["video_said"] = MultiModalFieldConfig.flat_from_sizes("video", said, keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        medium = prompt_medium(self.info.get_hf_processor())

        def image(i: int) -> _Written:
            item = out_mm_kwargs["image"][i]
            return _Written([], medium=medium(item["image_part_tiles"].data.tolist()))

        def video(i: int) -> _Written:
            item = out_mm_kwargs["video"][i]
            tiles, times = (item[f"video_{name}"].data.tolist() for name in ("part_tiles", "times"))
            said = json.loads(bytes(item["video_said"].data.tolist()))
            more = {"said": said} if said else {}  # exports of before have none
            return _Written([], medium=medium(tiles, float(item["video_fps"].data), times, **more))

        return [PromptReplacement("image", [], image), PromptReplacement("video", [], video)]

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> tuple[list[int], Any]:
        """Written and encoded as a whole, as in training: a label merges with the text before it."""
        export = self.info.get_hf_processor()
        tokenizer = export.tokenizer
        media = {
            kind: [update.content.medium for (update,) in mm_res.prompt_updates.get(kind, ())]
            for kind in _KINDS
        }
        text, order = export.place(self.info.text_of(mm_res.prompt_ids), media)
        for kind, own in media.items():
            used = sum(shown == kind for shown, _ in order)
            if used != len(own):
                raise ValueError(f"{len(own)} {kind}s were given and the prompt uses {used}")
        ids = export.encode(text)
        start, end, shown = (
            tokenizer.convert_tokens_to_ids(getattr(export, f"image_{name}token"))
            for name in ("start_", "end_", "")
        )
        starts = [i for i, token in enumerate(ids) if token == start]
        ends = [i + 1 for i, token in enumerate(ids) if token == end]
        if not len(starts) == len(ends) == sum(len(media[kind][number].tiles) for kind, number in order):
            raise ValueError("the prompt spells image tokens that belong to no medium")
        places: dict[str, list[PlaceholderFeaturesInfo]] = {kind: [] for kind in _KINDS}
        for kind, number in order:
            parts = len(media[kind][number].tiles)
            first, last = starts[0], ends[parts - 1]
            del starts[:parts], ends[:parts]
            own = ids[first:last]
            places[kind].append(PlaceholderFeaturesInfo(kind, number, first, own, torch.tensor(own) == shown))
        return ids, {kind: sorted(found, key=lambda place: place.item_idx) for kind, found in places.items()}
