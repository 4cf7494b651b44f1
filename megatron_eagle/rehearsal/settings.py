"""The run that is rehearsed: from its file, with its data or, where these are not there yet, without."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_eagle.config import from_dict
from megatron_eagle.errors import UserError
from megatron_eagle.model.presets import expand_preset
from megatron_eagle.training.run_config import RunConfig, RunFile, stated_positions
from megatron_eagle.training.stage_settings import stage_settings
from megatron_eagle.training.stages import load_stages


def read_runs(path: str, overrides: Sequence[str], *, stage: str | None, gpus: int) -> dict[str, RunConfig]:
    """The file's run, or its stages by name, with what their data and checkpoints say.

    Raises:
        UserError: as training would end with, the data that are not there among it.
    """
    names = list(stage_settings(path, overrides, stage=stage))
    return dict(zip(names, load_stages(path, overrides, stage=stage, world_size=gpus), strict=True))


def read_runs_without_data(
    path: str, overrides: Sequence[str], *, stage: str | None, gpus: int, preset: str | None
) -> dict[str, RunConfig]:
    """As `read_runs`, where neither data nor checkpoint need be there.

    Args:
        preset: the model, where the file takes it from a checkpoint.
    Raises:
        UserError: settings that do not fit, or a model that neither names.
    """
    runs = {}
    for name, values in stage_settings(path, overrides, stage=stage).items():
        model = values.get("model")
        if preset is not None:
            model = {**(model or {}), "preset": preset}
        if not model:
            raise UserError(
                f"{path}: its model is that of a checkpoint; without data say which with --preset NAME"
            )
        stated = stated_positions(model)
        values["model"] = expand_preset(model) if isinstance(model, dict) else model
        values.setdefault("checkpoint", {"path": "nowhere"})
        values.setdefault("data", {}).setdefault("path", "nowhere")
        run = from_dict(RunFile, values)
        run.data = replace(run.data, follow=None)  # made-up packs are there
        rows = run.model.text.vocab_size
        if rows is None:
            raise UserError(f"{path}: the vocabulary is that of the data: add model.text.vocab_size=N")
        image_token = run.model.image_token_index or 0  # any will do
        complete = run.model.with_data(vocab_size=rows, image_token_index=image_token)
        config = run.complete(complete, stated=stated)
        config.validate(gpus)
        runs[name] = config
    return runs
