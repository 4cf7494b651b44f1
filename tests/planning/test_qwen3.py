"""Qwen3 as planned: parameters as transformers', a layer by hand, and the stage files of examples/qwen3."""

import pytest
import torch
import transformers

from megatron_eagle.model.presets import preset
from megatron_eagle.model.shapes import PackShapes, StageShapes
from megatron_eagle.planning.memory_shapes import Workload, count_parameters, language_layer
from megatron_eagle.rehearsal.formula import sequence_memory
from megatron_eagle.rehearsal.packs import MadeUp
from megatron_eagle.rehearsal.settings import read_runs_without_data
from megatron_eagle.runtime.parallel import ParallelConfig
from megatron_eagle.training.stage_settings import stage_settings
from tests.paths import REPO

EXAMPLES = REPO / "examples"
GPUS = {"8b": 64, "32b": 128, "30b-a3b": 64}  # of the stage files
BILLIONS = {"8b": 8.2, "32b": 32.8, "30b-a3b": 30.5}  # parameters, as published
ROOM = 76e9  # of 80 GB


@pytest.mark.parametrize("size", GPUS)
def test_parameters_are_those_of_transformers(size):
    eagle = preset(f"eagle2.5-qwen3-{size}").complete()
    text = eagle.text.to_hf() | {"vocab_size": eagle.text.padded_vocab_size}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**text))
    shapes = PackShapes(eagle, ParallelConfig(), 32768)
    counted = count_parameters(shapes, StageShapes.of(shapes, 0))
    assert counted.language == sum(each.numel() for each in model.parameters())
    assert counted.language / 1e9 == pytest.approx(BILLIONS[size], abs=0.05)


def test_a_layer_keeps_what_its_head_norms_read():
    """bf16 bytes a token of 8B: as `test_one_language_layer_by_hand`, and the heads' norms: a copy of the
    queries and 1 / deviation of 32 + 8 heads; the keys they read where they were projected. Of 32B the
    queries have other features than the hidden states. Ulysses keeps its own q, k, v and two outputs."""
    workload = Workload(sequence_length=32768, tiles=64, microbatches=1)
    for size, (h, q, heads, f) in {"8b": (4096, 4096, 32, 12288), "32b": (5120, 8192, 64, 25600)}.items():
        shapes = PackShapes(preset(f"eagle2.5-qwen3-{size}").complete(), ParallelConfig(), 32768)
        attention = 2 * (q + 2 * 1024 + q + 1024 + q) + 4 * heads
        head_norms = 2 * q + 4 * (heads + 8)
        norms, mlp = 2 * (4 * h + 4), 2 * 3 * f
        assert language_layer(shapes, workload).total == 32768 * (norms + attention + head_norms + mlp)
        ulysses = ParallelConfig(context_parallel_size=4, ulysses_parallel_size=4)
        attention = 2 * (q + 2 * 1024 + q + 2 * 1024 + 2 * q) + 4 * heads
        divided = PackShapes(shapes.eagle, ulysses, 32768)
        assert language_layer(divided, workload).total == 8192 * (norms + attention + head_norms + mlp)


@pytest.mark.parametrize("size", GPUS)
def test_every_stage_fits(size):
    file, settings = str(EXAMPLES / "qwen3" / f"{size}.yaml"), {"gpus": GPUS[size]}
    stages = list(stage_settings(file, []))
    assert stages == list(stage_settings(str(EXAMPLES / "eagle2.5-8b" / "progressive.yaml"), []))
    for stage in stages:
        preset_name = f"eagle2.5-qwen3-{size}"
        run = read_runs_without_data(file, [], stage=stage, preset=preset_name, **settings)[stage]
        packs = MadeUp(run.model, ("one document",)).packs(run.data, 0, 0)
        microbatches = run.training.global_batch_size // run.layout.data_parallel_size(GPUS[size])
        for number in range(run.layout.pipeline_model_parallel_size):
            memory = sequence_memory(run, "h100", GPUS[size], number, microbatches, packs)
            assert memory.total < ROOM, (stage, number, memory)


def test_32k_of_8b_is_planned_as_it_was_rehearsed():
    """62.04 GB: `train rehearse --stage stage1_5 --gpus 64 --gpu h100 --ranks 0 --microbatches 1`."""
    run = read_runs_without_data(
        str(EXAMPLES / "qwen3" / "8b.yaml"), [], stage="stage1_5", gpus=64, preset="eagle2.5-qwen3-8b"
    )["stage1_5"]
    packs = MadeUp(run.model, ("one document",)).packs(run.data, 0, 0)
    assert sequence_memory(run, "h100", 64, 0, 1, packs).total / 1e9 == pytest.approx(62.04, rel=0.005)
