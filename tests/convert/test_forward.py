"""The Megatron model, its Hugging Face export and the golden logits agree."""

import filecmp

import pytest
import torch
from safetensors.torch import load_file

from megatron_eagle.convert.from_hf import import_hf
from megatron_eagle.convert.to_hf import export_hf
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.modeling_eagle2_5_vl import Eagle2_5_VLForConditionalGeneration
from megatron_eagle.inference import logits
from tests.convert.hf_folder import SPARE_ROWS, TILE, TOKENS_PER_TILE
from tests.paths import GOLDEN, need_golden


def load(folder):
    model, report = Eagle2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[kind], report
    return model.eval()


@pytest.fixture(scope="module")
def hf(exported):
    return load(exported)


def make_prompt(model, n_tiles):
    generator = torch.Generator().manual_seed(n_tiles)
    image = model.config.image_token_index
    text = torch.randint(0, image - 5, (1, 9), generator=generator)
    pictures = torch.full((1, n_tiles * TOKENS_PER_TILE), image)
    pixels = torch.rand(n_tiles, 3, TILE, TILE, generator=generator) * 2 - 1
    return torch.cat([text[:, :4], pictures, text[:, 4:]], dim=1), pixels


@pytest.mark.parametrize("n_tiles", [0, 1, 3])
def test_checkpoint_and_export_give_the_same_logits(checkpoint, hf, n_tiles):
    ids, pixels = make_prompt(hf, n_tiles)
    ours = logits(checkpoint, ids, pixels)
    with torch.no_grad():
        theirs = hf(input_ids=ids, pixel_values=pixels).logits
    assert ours.shape == theirs.shape == (1, ids.shape[1], hf.config.text_config.vocab_size)
    assert SPARE_ROWS and ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    assert not torch.distributed.is_initialized()


def test_logits_takes_a_flat_sequence_without_pictures(checkpoint, hf):
    ids, _ = make_prompt(hf, 0)
    assert torch.equal(logits(checkpoint, ids[0]), logits(checkpoint, ids, None))


def test_logits_ignores_a_launchers_environment(checkpoint, hf, monkeypatch):
    ids, pixels = make_prompt(hf, 1)
    expected = logits(checkpoint, ids, pixels)
    for name, value in {"RANK": 3, "WORLD_SIZE": 8, "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert torch.equal(logits(checkpoint, ids, pixels), expected)


def test_logits_uses_a_group_that_exists_and_leaves_it(checkpoint, hf):
    ids, pixels = make_prompt(hf, 1)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        first = logits(checkpoint, ids, pixels)
        assert torch.distributed.is_initialized()
        assert torch.equal(logits(checkpoint, ids, pixels), first)
    finally:
        torch.distributed.destroy_process_group()


def test_logits_refuses_what_does_not_fit(checkpoint, hf, tmp_path):
    ids, pixels = make_prompt(hf, 2)
    with pytest.raises(UserError, match="8 image tokens.*1 tiles x 4 = 4 image features"):
        logits(checkpoint, ids, pixels[:1])
    with pytest.raises(UserError, match="must be one sequence"):
        logits(checkpoint, ids.repeat(2, 1), pixels)
    with pytest.raises(UserError, match="ids below"):
        logits(checkpoint, ids + 10_000, pixels)
    with pytest.raises(UserError, match="not a checkpoint"):
        logits(tmp_path, ids, pixels)
    with pytest.raises(UserError, match="the prompt has 4,097 tokens and the model was trained for 4,096 "):
        logits(checkpoint, torch.zeros(4097, dtype=torch.long))
    assert not torch.distributed.is_initialized()


def test_hf_model_counts_image_tokens(hf):
    ids, pixels = make_prompt(hf, 2)
    with pytest.raises(ValueError, match="hold 8 image tokens.*give 12 visual features"):
        hf.generate(input_ids=ids, pixel_values=torch.cat([pixels, pixels[:1]]), max_new_tokens=1)
    with pytest.raises(ValueError, match="hold 8 image tokens.*give 0 visual features"):
        hf(input_ids=ids)


def test_hf_model_drops_flagged_tiles(hf):
    ids, pixels = make_prompt(hf, 1)
    with torch.no_grad():
        plain = hf(input_ids=ids, pixel_values=pixels).logits
        flagged = hf(
            input_ids=ids, pixel_values=torch.cat([pixels, pixels]), image_flags=torch.tensor([1, 0])
        ).logits
    torch.testing.assert_close(plain, flagged)


def test_hf_model_saves_under_the_released_names(hf, exported, tmp_path):
    hf.save_pretrained(tmp_path)
    assert (
        load_file(tmp_path / "model.safetensors").keys() == load_file(exported / "model.safetensors").keys()
    )


@need_golden
def test_golden(tmp_path):
    folder = GOLDEN / "tiny_eagle"
    io = load_file(GOLDEN / "tiny_eagle_io.safetensors")
    import_hf(folder, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "out")
    shards = [path.name for path in folder.glob("model*")]
    assert len(shards) == 4
    assert filecmp.cmpfiles(folder, tmp_path / "out", shards, shallow=False)[0] == shards
    model = load(tmp_path / "out")
    used = 0
    for i in range(3):
        ids = io[f"sample{i}.input_ids"].reshape(1, -1)
        n = int(io[f"sample{i}.n_tiles"])
        pixels, used = io["pixel_values"][used : used + n], used + n
        expected = io[f"sample{i}.logits"].reshape(1, ids.shape[1], -1)
        torch.testing.assert_close(logits(tmp_path / "checkpoint", ids, pixels), expected, atol=1e-4, rtol=0)
        with torch.no_grad():
            theirs = model(input_ids=ids, pixel_values=pixels).logits
        torch.testing.assert_close(theirs, expected, atol=1e-4, rtol=0)
