"""What is known when is a type: a wrong phase is refused, and nobody writes into one."""

from collections.abc import Sequence
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
import torch

from megatron_eagle.data.loading.packs import GlobalBatch, LoadedPack, PlannedPack, TilesAlone, TokenPack
from megatron_eagle.model.eagle import ModelInput, VisionInput
from megatron_eagle.model.inputs import InputPlan, VisionPlan
from megatron_eagle.model.language import Targets
from megatron_eagle.model.shapes import LocalShapes, PackShapes, StageShapes
from tests.project.types import Finding, run_mypy
from tests.training.synthetic_data import SyntheticLoader

FROZEN = [
    TokenPack,
    PlannedPack,
    LoadedPack,
    GlobalBatch,
    InputPlan,
    VisionPlan,
    Targets,
    ModelInput,
    VisionInput,
    LocalShapes,
    PackShapes,
    StageShapes,
]

SNIPPET = """
from torch import Tensor, device

from megatron_eagle.data.loading.packs import GlobalBatch, LoadedPack, PlannedPack, TokenPack
from megatron_eagle.model.inputs import InputPlan
from megatron_eagle.model.presets import EagleConfig, ModelSection
from megatron_eagle.model.shapes import LocalShapes, PackShapes
from megatron_eagle.planning.memory_shapes import Workload, language_layer
from megatron_eagle.runtime.parallel import ParallelConfig
from megatron_eagle.training.run_config import RunConfig, RunFile
from megatron_eagle.training.schedule import build_batch
from megatron_eagle.training.setup import OpenLoader
from megatron_eagle.training.start import start_models
from tests.training.synthetic_data import SyntheticLoader


class Forgetful(SyntheticLoader):
    leave_out = None  # type: ignore[assignment]


def right(cpu: device, loaded: LoadedPack[InputPlan], section: ModelSection, workload: Workload) -> int:
    build_batch(cpu, loaded)
    shapes = PackShapes(section.complete(), ParallelConfig(), workload.sequence_length)
    tokens: TokenPack = loaded  # a later phase has all of an earlier one
    made_up: OpenLoader = SyntheticLoader
    return language_layer(shapes, workload).total + len(tokens.input_ids)


def wrong(
    cpu: device,
    tokens: TokenPack,
    planned: PlannedPack[InputPlan],
    batch: GlobalBatch[InputPlan],
    section: ModelSection,
    parallel: ParallelConfig,
    run: RunFile,
    workload: Workload,
) -> None:
    build_batch(cpu, tokens)  # arg-type
    build_batch(cpu, planned)  # arg-type
    tokens.loss_weights = tokens.loss_weights * 2  # misc
    batch.total = 1.0  # misc
    batch.microbatches.append(planned)  # attr-defined
    rows: int = section.text.vocab_size  # assignment
    shapes = LocalShapes(section, parallel)  # arg-type
    language_layer(shapes, workload)  # arg-type
    config: RunConfig = run  # assignment
    opens: OpenLoader = Forgetful  # assignment
    config.model.text.vocab_size + rows
"""


def errors(folder: Path, text: str) -> Sequence[Finding]:
    """mypy's errors in a file with this text, under the project's configuration."""
    file = folder / "snippet.py"
    file.write_text(text)
    return [finding for finding in run_mypy([str(file)]) if finding.file.endswith(file.name)]


def test_a_wrong_phase_is_refused(tmp_path):
    """Each line of the snippet that ends with the name of an error has that error, and no other has one."""
    found = {finding.line: finding.code for finding in errors(tmp_path, SNIPPET)}
    wanted = {
        number: code
        for number, line in enumerate(SNIPPET.splitlines(), 1)
        if (code := line.rpartition("  # ")[2]) in ("arg-type", "misc", "attr-defined", "assignment")
    }
    assert len(wanted) == 10
    assert found == wanted


@pytest.mark.parametrize("kind", FROZEN, ids=lambda kind: kind.__name__)
def test_nobody_writes_into_a_phase(kind):
    empty = object.__new__(kind)
    for field in fields(kind):
        with pytest.raises(FrozenInstanceError):
            setattr(empty, field.name, None)


def test_a_later_phase_shares_the_tensors_of_the_one_before():
    tokens, pixels = SyntheticLoader._pack(1)
    planned = PlannedPack(**vars(tokens), plan=TilesAlone(range(tokens.n_tiles)))
    loaded = LoadedPack(**vars(planned), pixel_values=pixels)
    for field in fields(TokenPack):
        assert getattr(loaded, field.name) is getattr(tokens, field.name)
    assert loaded.plan is planned.plan and loaded.pixel_values is pixels
    assert sum(isinstance(value, torch.Tensor) for value in vars(loaded).values()) == 6
