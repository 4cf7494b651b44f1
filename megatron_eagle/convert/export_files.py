"""The small files of an export: configuration, remote code, tokenizer, processor and generation settings."""

import json
import shutil
from pathlib import Path
from typing import Any

import megatron_eagle.hf_model
from megatron_eagle.convert.hf_metadata import HfMetadata
from megatron_eagle.convert.plugin_files import write_plugin
from megatron_eagle.convert.shards import read_json
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.media_files import DEFAULT_MAX_FRAMES
from megatron_eagle.hf_model.prompt import (
    END_OF_TEXT,
    IM_END,
    IMG_CONTEXT,
    IMG_END,
    IMG_START,
    chat_template,
    thinks,
)
from megatron_eagle.hf_model.tiles import MEAN, RESCALE_FACTOR, STD
from megatron_eagle.model.presets import EagleConfig

_CODE = Path(megatron_eagle.hf_model.__file__).parent
# All of the folder: the files import each other as neighbours, and nothing else of this project.
CODE_FILES = tuple(sorted(path.name for path in _CODE.glob("*.py") if path.name != "__init__.py"))
_MODEL_CLASS = "modeling_eagle2_5_vl.Eagle2_5_VLForConditionalGeneration"
_AUTO_MAP = {
    "AutoConfig": "configuration_eagle2_5_vl.Eagle2_5_VLConfig",
    "AutoModel": _MODEL_CLASS,
    "AutoModelForCausalLM": _MODEL_CLASS,
    "AutoModelForImageTextToText": _MODEL_CLASS,
    "AutoModelForMultimodalLM": _MODEL_CLASS,
    "AutoModelForVision2Seq": _MODEL_CLASS,  # its name in transformers 4
}
_PROCESSOR = "Eagle2_5_VLProcessor"
_PROCESSOR_MAP = {
    "AutoProcessor": f"processing_eagle2_5_vl.{_PROCESSOR}",
    "AutoImageProcessor": "image_processing_eagle2_5_vl.Eagle2_5_VLImageProcessor",
}
# How pictures are cut does not follow from the weights: what the source says wins over the defaults.
_SOURCE_WINS = (
    "dynamic_image_size",
    "use_thumbnail",
    "min_dynamic_tiles",
    "max_dynamic_tiles",
    "min_dynamic_patch",
    "max_dynamic_patch",
    "template",
)
# Other names under which a source may limit a prompt's length; vLLM takes the least of those in text_config.
_LENGTHS = (
    "model_max_length",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_length",
    "seq_len",
)
_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
IMAGE_TOKENS = (IMG_START, IMG_END, IMG_CONTEXT)


def write_config(
    folder: Path, config: EagleConfig, metadata: HfMetadata, dtypes: dict[str, str], *, has_head: bool
) -> None:
    """config.json: the source's with this model's sizes on top, and the code files it points to."""
    source, own = _public(metadata.json("config.json")), config.to_hf()
    source.setdefault("text_config", source.pop("llm_config", {}))  # its older name
    merged = {**source, **own, **{key: source[key] for key in _SOURCE_WINS if key in source}}
    for part in ("vision_config", "text_config"):
        merged[part] = {**source.get(part, {}), **own[part]}
    _raise_lengths(merged["text_config"], config)
    merged["vision_config"]["vision_use_head"] = has_head
    merged["text_config"].setdefault("sliding_window", None)  # transformers 4.51 warns of its default
    # vLLM reads the tile limits under these names.
    merged["min_dynamic_patch"] = merged["min_dynamic_tiles"]
    merged["max_dynamic_patch"] = merged["max_dynamic_tiles"]
    merged["auto_map"] = _AUTO_MAP
    used = set(dtypes.values())
    merged.pop("dtype", None)  # transformers 5 reads both spellings, 4.51 this one
    merged["torch_dtype"] = _TORCH_NAMES[used.pop()] if len(used) == 1 else "float32"
    _write_json(folder / "config.json", merged)
    for name in CODE_FILES:
        shutil.copyfile(_CODE / name, folder / name)
    write_plugin(folder)


def write_processor(
    folder: Path,
    config: EagleConfig,
    metadata: HfMetadata,
    max_tiles: int | None = None,
    max_frames: int | None = None,
) -> None:
    """Tokenizer, chat template, processor and generation settings; only the last without a tokenizer.

    Raises:
        UserError: the tokenizer lacks a token that the model needs, or has other ids than the model.
    """
    generation = _public(metadata.json("generation_config.json"))
    if metadata.tokenizer_files:
        ids = _copy_tokenizer(folder, config, metadata)
        stop = generation.get("eos_token_id")
        if ids[IM_END] not in (stop if isinstance(stop, list) else [stop]):
            generation["eos_token_id"] = ids[IM_END]
        generation["pad_token_id"] = ids.get(END_OF_TEXT, ids[IM_END])
        generation.pop("bos_token_id", None)  # Qwen writes none; a wrong one would be put before a prompt
        _write_processor_settings(folder, config, metadata, max_tiles, max_frames, thinks(ids))
    if generation:
        _write_json(folder / "generation_config.json", generation)


def _copy_tokenizer(folder: Path, config: EagleConfig, metadata: HfMetadata) -> dict[str, int]:
    """Copy the tokenizer's files; returns its tokens' ids."""
    where = metadata.folder
    for path in metadata.tokenizer_files:
        shutil.copyfile(path, folder / path.name)
    ids = token_ids(metadata.folder)
    for token in (IM_END, *IMAGE_TOKENS):
        if token not in ids:
            raise UserError(f"{where}: the tokenizer has no token {token}; an export needs it")
    if ids[IMG_CONTEXT] != config.image_token_index:
        raise UserError(
            f"{where}: the tokenizer's {IMG_CONTEXT} is {ids[IMG_CONTEXT]}, the model's image token "
            f"{config.image_token_index}; this is the tokenizer of another model"
        )
    if max(ids.values()) >= config.text.vocab_size:
        raise UserError(
            f"{where}: the tokenizer's ids reach {max(ids.values())} and the model has "
            f"{config.text.vocab_size} rows; this is the tokenizer of another model"
        )
    settings = metadata.json("tokenizer_config.json")
    _say_in_words_of_4(settings)
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    settings.setdefault("eos_token", IM_END)
    settings.setdefault("pad_token", END_OF_TEXT if END_OF_TEXT in ids else IM_END)
    settings.pop("chat_template", None)  # it is in its own file
    _raise_lengths(settings, config)
    settings["processor_class"] = _PROCESSOR
    settings["padding_side"] = "left"  # for generation: every row of a batch ends where its answer starts
    _write_json(folder / "tokenizer_config.json", settings)
    return ids


def _say_in_words_of_4(settings: dict[str, Any]) -> None:
    """What transformers 5 saves of a tokenizer in the words of 4, which both read."""
    if settings.get("tokenizer_class") == "TokenizersBackend":
        del settings["tokenizer_class"]
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    for name in ("backend", "is_local", "local_files_only"):  # of the machine that saved it
        settings.pop(name, None)


def _raise_lengths(settings: dict[str, Any], config: EagleConfig) -> None:
    """Let no number that the source has beside `max_position_embeddings` keep prompts shorter than that."""
    for name in _LENGTHS:
        if isinstance(settings.get(name), int | float):
            settings[name] = max(settings[name], config.text.max_position_embeddings)


def token_ids(folder: Path) -> dict[str, int]:
    """Token -> id, from tokenizer.json or from the slow tokenizer's files; empty without either."""

    def read(name: str) -> dict[str, Any]:
        return read_json(folder / name) if (folder / name).is_file() else {}

    definition = read("tokenizer.json")
    if definition:
        vocabulary = definition.get("model", {}).get("vocab", {})
        ids = (
            dict(vocabulary) if isinstance(vocabulary, dict) else {v[0]: i for i, v in enumerate(vocabulary)}
        )
        return ids | {token["content"]: token["id"] for token in definition.get("added_tokens", [])}
    added = read("tokenizer_config.json").get("added_tokens_decoder", {})
    ids = read("vocab.json") | read("added_tokens.json")
    return ids | {token["content"]: int(i) for i, token in added.items()}


def _write_processor_settings(
    folder: Path,
    config: EagleConfig,
    metadata: HfMetadata,
    max_tiles: int | None,
    max_frames: int | None,
    thinks: bool,
) -> None:
    side = config.vision.image_size
    exported, source = read_json(folder / "config.json"), metadata.json("preprocessor_config.json")
    cutting = {
        key: source.get(key, exported[key])
        for key in ("min_dynamic_tiles", "max_dynamic_tiles", "use_thumbnail")
    }
    if max_tiles is not None:
        cutting["max_dynamic_tiles"] = max_tiles
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Eagle2_5_VLImageProcessor",
            "processor_class": _PROCESSOR,
            "auto_map": _PROCESSOR_MAP,
            "size": {"height": side, "width": side},
            "rescale_factor": RESCALE_FACTOR,
            "image_mean": list(MEAN),
            "image_std": list(STD),
            **cutting,
            "tiling": source.get("tiling", "iap"),
        },
    )
    exported |= cutting
    for end in ("min", "max"):  # vLLM's names
        exported[f"{end}_dynamic_patch"] = cutting[f"{end}_dynamic_tiles"]
    _write_json(folder / "config.json", exported)
    frames = metadata.json("processor_config.json").get("max_frames", DEFAULT_MAX_FRAMES)
    _write_json(
        folder / "processor_config.json",
        {
            "processor_class": _PROCESSOR,
            "auto_map": _PROCESSOR_MAP,
            "tokens_per_tile": config.tokens_per_tile,
            "max_frames": frames if max_frames is None else max_frames,
        },
    )
    (folder / "chat_template.jinja").write_text(chat_template(thinks=thinks), encoding="utf-8")


def _public(config: dict[str, Any]) -> dict[str, Any]:
    """Without transformers' own state (`_commit_hash`, `_attn_implementation`), which is not the model's."""
    return {
        key: _public(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not key.startswith("_")
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
