"""One YAML file is one run: its sections, and the rules between them, checked before any process group.

model:      {preset: tiny}              or sizes; left out: the model of checkpoint.load
parallel:   {tensor_model_parallel_size: 2}
data:       {path: data/demo, length: 2048}
training:   {train_iterations: 200, global_batch_size: 4, precision: fp32}
optimizer:  {lr: 1e-3}
lora:       {rank: 16, alpha: 32}       left out: the language model's own weights train
checkpoint: {path: runs/demo/checkpoint, save_interval: 50}
evaluation: {data: data/held-out, interval: 50}     left out: none
resilience: {on_nonfinite: skip}
logging:    {tensorboard: true}
"""

import filecmp
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tokenizers import Tokenizer

from megatron_eagle.checkpoint import (
    HF_FOLDER,
    CheckpointConfig,
    has_checkpoint,
    read_lora_config,
    read_model_config,
    read_trainable,
)
from megatron_eagle.config import apply_overrides, from_dict, load_yaml, to_dict
from megatron_eagle.context_parallel.te_attention import check_te_attention
from megatron_eagle.data.loading.loader import DataConfig
from megatron_eagle.data.store.manifest import read_manifest
from megatron_eagle.errors import UserError
from megatron_eagle.model.layers import LayersConfig, check_layers
from megatron_eagle.model.layout_rules import check_layout
from megatron_eagle.model.lora import LoraConfig, check_same_lora, check_targets
from megatron_eagle.model.presets import EagleConfig, ModelSection, expand_preset
from megatron_eagle.model.shapes import PackShapes
from megatron_eagle.model.specs import RecomputeConfig
from megatron_eagle.model.text import TextConfig
from megatron_eagle.model.yarn import YarnConfig
from megatron_eagle.ranges import Range, Ranged
from megatron_eagle.runtime.parallel import ParallelConfig
from megatron_eagle.training.evaluation import EvaluationConfig
from megatron_eagle.training.megatron_options import check_megatron_options
from megatron_eagle.training.monitoring.run_log import LoggingConfig
from megatron_eagle.training.optimizer import OptimizerConfig
from megatron_eagle.training.resilience.policy import ResilienceConfig

_POSITIONS = "model.text.max_position_embeddings"


@dataclass
class TrainingConfig(Ranged):
    """Length and arithmetic of a run. An iteration is one optimizer step over `global_batch_size` packs.

    `stop_at_iteration` ends the run early, checkpoint included, as if the job's time were over; the
    learning-rate schedule is that of `train_iterations`.
    """

    train_iterations: Annotated[int, Range(1, 10**9)]
    global_batch_size: Annotated[int, Range(1, 10**6)] = 1
    precision: Literal["bf16", "fp32"] = "bf16"  # bf16 keeps fp32 main parameters in the optimizer
    # Of fresh parameters; the data order has its own (data.seed).
    seed: Annotated[int, Range(0, 2**63 - 1)] = 1234
    # The same bits in every run of the same layout on the same GPUs; what that takes: docs/training.md.
    deterministic: bool = True
    stop_at_iteration: Annotated[int, Range(1, 10**9)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop_at_iteration is not None and self.stop_at_iteration > self.train_iterations:
            raise ValueError(
                f"stop_at_iteration is {self.stop_at_iteration}: must be at most train_iterations "
                f"{self.train_iterations}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's parameters and activations."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def last_iteration(self) -> int:
        """Where this job ends."""
        return self.stop_at_iteration or self.train_iterations


@dataclass
class RunFile:
    """All sections of a run as its file has them; what the model takes from the data is open."""

    model: ModelSection
    data: DataConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    layers: LayersConfig = field(default_factory=LayersConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    # Adapters train in place of the language model's own weights; null: none.
    lora: LoraConfig | None = None
    # The loss on held-out packs; null: none.
    evaluation: EvaluationConfig | None = None
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def layout(self) -> ParallelConfig:
        """What groups and models are built for: `parallel` says the ranks of one pack, this of a sequence.

        Raises:
            UserError: more ranks than a context parallel group may have.
        """
        return self.parallel.joined(self.data.packs_per_sequence)

    def check(self, model: EagleConfig, world_size: int) -> None:
        """Check the sections, with `model`, against each other and against the number of processes.

        Raises:
            UserError: they do not fit; with the rule, the value and the nearest legal one.
        """
        layout, experts = self.layout, model.text.experts
        number = None if experts is None else experts.num_experts
        data_parallel_size = layout.data_parallel_size(world_size, number)
        model.validate()
        self.logging.check(world_size)
        if self.resilience.stragglers is not None:
            self.resilience.stragglers.check()
        check_layout(model, layout, self.data.length)
        if self.layers.attention == "te":
            check_te_attention(layout)
        check_layers(self.layers, self.training.dtype, model, layout)
        rows = PackShapes(model, self.parallel, self.data.length).r
        check_megatron_options(
            layout,
            self.recompute,
            self.layers,
            self.optimizer,
            self.training.precision,
            rows,
            experts is not None,
        )
        _check_batch(self.training.global_batch_size, data_parallel_size, layout)
        warmup = self.optimizer.warmup_iterations(self.training.train_iterations)
        if warmup >= self.training.train_iterations:
            raise UserError(
                f"optimizer.lr_warmup_iterations is {warmup}: must be below training.train_iterations "
                f"{self.training.train_iterations}"
            )
        if self.lora is not None:
            check_targets(self.lora, model)
        if self.lora is not None and "language" not in self.optimizer.trainable:
            raise UserError(
                "lora trains the language model through its adapters: add language to optimizer.trainable"
            )

    def complete(
        self, model: EagleConfig, *, trained: int | None = None, stated: int | None = None
    ) -> "RunConfig":
        """The run of this file with `model`, whose `max_position_embeddings` are raised to the longest pack
        that it is trained on, this run's too.

        They are no part of the architecture (rotary positions have no weights) but a property of the run,
        which its checkpoints record and their exports promise; they never fall.

        Args:
            model: that of the file, with what the data say.
            trained: positions of the weights which the run starts from or resumes; None: fresh ones.
            stated: what the run's file itself says, beyond a preset: more than was trained only so.

        Raises:
            UserError: YaRN does not reach so far.
        """
        notes, length, scaling = [], self.data.length, model.text.rope_scaling
        before = model.text.max_position_embeddings if trained is None else trained
        positions = max(before, length, stated or 0)
        if stated is not None and stated > max(trained or 0, length):
            known = "" if trained is None else f"{trained:,} of the checkpoint and the "
            notes.append(
                f"warning: {_POSITIONS} is {stated:,} as the run's file says, beyond the {known}{length:,} "
                "tokens of this run's packs: nothing is trained there"
            )
        elif length > before:
            notes.append(
                f"{_POSITIONS} is raised from {before:,} to {length:,}, the tokens of this run's packs"
            )
        if stated is not None and stated < before:
            notes.append(f"{_POSITIONS} stays {before:,} as in the checkpoint: {stated:,} would lower it")
        model = replace(model, text=replace(model.text, max_position_embeddings=positions)).validate()
        if scaling is not None and scaling.reach > before:
            # What readers of an export take for its length, whatever else it says.
            notes = [
                f"{_POSITIONS} is raised from {before:,} to {scaling.reach:,}, which rope_scaling reaches"
            ]
        config = RunConfig(**vars(self) | {"model": model})
        config.notes.extend(notes)
        return config


@dataclass
class RunConfig(RunFile):
    """A run of which everything is known."""

    model: EagleConfig
    # What was settled while the run's file was completed, in a line each, for the log.
    notes: list[str] = field(default_factory=list, init=False, compare=False)

    def validate(self, world_size: int) -> None:
        """As `check`."""
        self.check(self.model, world_size)


def load_run_config(
    path: str | Path, overrides: Iterable[str] = (), *, world_size: int | None = None
) -> RunConfig:
    """Read, complete and check the configuration of a run.

    What the model section leaves null is filled from the data's manifest.

    Args:
        overrides: `a.b=c` each.
        world_size: number of processes; None: WORLD_SIZE of the environment (torchrun sets it; 1 without).

    Raises:
        UserError: a setting, a layout, the data or a checkpoint cannot belong to this run.
    """
    values = load_yaml(path)
    if "stages" in values:
        raise UserError(f"{path}: a file of stages; this reads a single run")
    return complete_run_config(apply_overrides(values, overrides), world_size=world_size)


def complete_run_config(
    values: dict[str, Any], *, world_size: int | None = None, before: RunConfig | None = None
) -> RunConfig:
    """As `load_run_config`, from the settings themselves. `before`: the run that will leave its weights in
    checkpoint.load, if they are not there yet."""
    stated = stated_positions(values.get("model"))
    source = _complete_model(values, before)
    run = from_dict(RunFile, values)
    text = run.model.text
    if source is not None and stated is None:
        text.max_position_embeddings = _positions_under(text.rope_scaling, source.text)
    model = _fit_to_data(run.model.validate(), run.data)
    run.check(model, int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size)
    _check_new_tokens(run.optimizer.first_new_token, run.data)
    if run.evaluation is not None:
        _check_same_data(run.evaluation.data, run.data)
    path, load = run.checkpoint.path, run.checkpoint.load
    trained, fallen = [], []
    if has_checkpoint(path):
        _check_same_tokenizer(run.data.folder, path)
        trained.append(_check_same_model(model, path).text.max_position_embeddings)
        check_same_lora(run.lora, read_lora_config(path), path)
        _check_same_parts(run.optimizer, path)
    elif load is not None:
        if before is None or has_checkpoint(load):
            _check_same_tokenizer(run.data.folder, load)
            start = _check_same_model(model, load, may_differ=_NO_WEIGHTS).text
            trained.append(_positions_under(model.text.rope_scaling, start))
            if trained[-1] < start.max_position_embeddings:
                fallen.append(
                    f"{_POSITIONS}: {start.max_position_embeddings:,} of {load} were those of another "
                    f"rope_scaling; here {trained[-1]:,} are"
                )
            saved = read_lora_config(load)
            if saved is not None:  # weights without adapters may get new ones
                check_same_lora(run.lora, saved, load)
        if before is not None:
            trained.append(before.model.text.max_position_embeddings)
    config = run.complete(model, trained=max(trained, default=None), stated=stated)
    config.notes[:0] = fallen
    return config


def stated_positions(model: Any) -> int | None:
    """`max_position_embeddings` of a run file's own model section."""
    text = model.get("text") if isinstance(model, dict) else None
    stated: int | None = text.get("max_position_embeddings") if isinstance(text, dict) else None
    return stated


def _complete_model(values: dict[str, Any], before: RunConfig | None) -> EagleConfig | None:
    """Put the values of a preset, or of the model to start from, into the model section; that model."""
    model = values.get("model") or {}
    if not isinstance(model, dict):
        return None
    source = None if {"preset", "hf"} & model.keys() else _source_model(values.get("checkpoint"), before)
    if model or source is not None:
        values["model"] = expand_preset(model, None if source is None else to_dict(source))
    else:
        values.pop("model", None)  # an empty section is a missing one: no run trains a default model
    return source


def _source_model(checkpoint: Any, before: RunConfig | None) -> EagleConfig | None:
    """The model that a run goes on with; None: a fresh one."""
    source = None if before is None else before.model
    for place in ("path", "load"):
        root = checkpoint.get(place) if isinstance(checkpoint, dict) else None
        if source is None and isinstance(root, str) and (place == "load" or has_checkpoint(root)):
            source = read_model_config(root)
    return source


def _check_batch(batch: int, data_parallel_size: int, parallel: ParallelConfig) -> None:
    at_once = data_parallel_size * parallel.packs
    if batch % at_once:
        several = f" x data.packs_per_sequence {parallel.packs}" if parallel.packs > 1 else ""
        raise UserError(
            f"training.global_batch_size is {batch}: must be a multiple of the data parallel size "
            f"{data_parallel_size}{several}{_nearest(batch, at_once)}"
        )
    stages = parallel.pipeline_model_parallel_size
    if parallel.num_model_chunks > 1 and (batch // at_once) % stages:
        step = at_once * stages
        raise UserError(
            f"training.global_batch_size is {batch}: with virtual pipeline stages every data parallel rank "
            f"needs a multiple of {stages} microbatches (pipeline_model_parallel_size){_nearest(batch, step)}"
        )


def _nearest(value: int, step: int) -> str:
    below, above = value // step * step, -(-value // step) * step
    return f"; nearest: {below} or {above}" if below else f"; nearest: {above}"


def _fit_to_data(model: ModelSection, data: DataConfig) -> EagleConfig:
    """The model with the data's vocabulary; refuses data that was prepared for another model."""
    manifest = read_manifest(data.folder)
    if data.length not in manifest.lengths:
        prepared = ", ".join(map(str, manifest.lengths))
        raise UserError(f"data.length is {data.length}: {data.path} was prepared for {prepared}")
    for name, theirs, ours in (
        ("tile size", manifest.tile_size, model.vision.image_size),
        ("patch size", manifest.patch_size, model.vision.patch_size),
        ("number of tokens per tile", manifest.tokens_per_tile, model.tokens_per_tile),
    ):
        if theirs != ours:
            raise UserError(f"{data.path}: its {name} is {theirs} and the model's {ours}; prepare it again")
    return model.with_data(vocab_size=manifest.vocab_size, image_token_index=manifest.image_token_id)


def _check_new_tokens(first: int | None, data: DataConfig) -> None:
    tokens = read_manifest(data.folder).vocab_size
    if first is not None and first >= tokens:
        raise UserError(
            f"optimizer.first_new_token is {first}: must be below {tokens}, the number of tokens that the "
            f"tokenizer of {data.path} has"
        )


def _check_same_data(held_out: str, data: DataConfig) -> None:
    here, there = read_manifest(data.folder), read_manifest(held_out)
    if there.fingerprint != here.fingerprint:
        raise UserError(f"evaluation.data: {held_out} was prepared with another tokenizer than {data.path}")
    if data.length not in there.lengths:
        raise UserError(f"evaluation.data: {held_out} was not prepared for data.length {data.length}")


def _check_same_tokenizer(data: Path, checkpoint: str) -> None:
    """Refuse a number that stands for one token in the data and for another in the checkpoint."""
    files = Path(data, "tokenizer", "tokenizer.json"), Path(checkpoint, HF_FOLDER, "tokenizer.json")
    if not all(file.is_file() for file in files) or filecmp.cmp(*files, shallow=False):
        return
    here, there = (
        {number: token for token, number in Tokenizer.from_file(str(file)).get_vocab().items()}
        for file in files
    )
    for number in sorted(here.keys() & there.keys()):
        if here[number] != there[number]:
            raise UserError(
                f"{data}: prepared with another tokenizer than {checkpoint}: token {number} is "
                f"{here[number]!r} in the data and {there[number]!r} in the checkpoint"
            )


def _check_same_model(model: EagleConfig, checkpoint: str, may_differ: Collection[str] = ()) -> EagleConfig:
    """Refuse a checkpoint of another architecture; returns its model."""
    saved = read_model_config(checkpoint)
    differences = list(_differences(model, saved, "model", (*_NO_ARCHITECTURE, *may_differ)))
    if differences:
        raise UserError(f"{checkpoint}: the checkpoint is of another model: {'; '.join(differences)}")
    return saved


def _positions_under(scaling: YarnConfig | None, saved: TextConfig) -> int:
    """Positions of weights that go on with this `rope_scaling`. With another one they count no longer: they
    are those that it reaches, and without one those that YaRN had stretched."""
    positions = saved.max_position_embeddings
    if scaling == saved.rope_scaling:
        return positions
    if scaling is not None:
        return min(positions, scaling.reach)
    assert saved.rope_scaling is not None, "the two are not alike"
    return saved.rope_scaling.original_max_position_embeddings


def _check_same_parts(optimizer: OptimizerConfig, checkpoint: str) -> None:
    """Refuse to resume with other trained parts, whose optimizer state the checkpoint does not have."""
    saved, frozen = read_trainable(checkpoint)
    if set(optimizer.trainable) != set(saved) or optimizer.freeze_router != frozen:

        def said(parts: Collection[str], freeze_router: bool) -> str:
            return ", ".join(parts) + (" with freeze_router" if freeze_router else "")

        there, here = said(saved, frozen), said(optimizer.trainable, optimizer.freeze_router)
        raise UserError(
            f"{checkpoint}: optimizer.trainable is {there} there and {here} here: "
            "a run goes on with the same parts; to train others, start a run in another checkpoint.path with "
            f"checkpoint.load={checkpoint}"
        )


# What a run may change about a model that it goes on with.
_NO_ARCHITECTURE = ("initializer_range", "max_position_embeddings", "router_aux_loss_coef")
# And what a run that starts from its weights may: a longer stage switches YaRN on.
_NO_WEIGHTS = ("rope_scaling",)


def _differences(here: Any, there: Any, where: str, may_differ: Collection[str]) -> Iterable[str]:
    for f in fields(here):
        a, b, name = getattr(here, f.name), getattr(there, f.name), f"{where}.{f.name}"
        if f.name in may_differ:
            continue
        if is_dataclass(a) and is_dataclass(b):
            yield from _differences(a, b, name, may_differ)
        elif a != b:
            yield f"{name} is {b} there and {a} here"
