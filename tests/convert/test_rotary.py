"""Rotary positions have the bits of transformers' `Qwen2RotaryEmbedding`, up to position 1,048,576."""

import copy
import re

import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from eagle_kernels.rope import inverse_frequencies, rotary_table
from megatron_eagle.checkpoint import load_checkpoint
from megatron_eagle.convert.from_hf import import_hf
from megatron_eagle.convert.to_hf import export_hf
from megatron_eagle.convert.whole_model import whole_model
from megatron_eagle.hf_model.modeling_eagle2_5_vl import Eagle2_5_VLForConditionalGeneration
from megatron_eagle.model.inputs import make_input
from megatron_eagle.model.rotary import PackedRotaryTable
from megatron_eagle.model.text import TextConfig
from megatron_eagle.model.yarn import YarnConfig, read_rope
from tests.convert.hf_folder import rewrite_weights, write_hf_folder

LAST = 1 << 20
PRESETS = [(128, 1e6), (16, 1e6)]  # of eagle2.5-8b and of tiny
# Other published thetas and head sizes, and some that nobody would choose.
OTHERS = [(64, 1e6), (128, 1e4), (128, 5e6), (80, 1e5), (12, 1e6), (96, 123456.7), (256, 3.0)]


# Published ones (Qwen's factor 4 of 32,768), and some that nobody would choose.
YARNS = [
    (128, 1e6, YarnConfig(4.0, 32768)),
    (64, 1e6, YarnConfig(4.0, 32768)),
    (128, 1e6, YarnConfig(2.5, 40960, truncate=False)),
    (80, 5e6, YarnConfig(8.0, 32768, beta_fast=16.0, beta_slow=2.0)),
    (128, 1e4, YarnConfig(32.0, 4096, attention_factor=0.7)),
    (12, 1e6, YarnConfig(1.0, 9)),
]


@pytest.mark.parametrize(("dim", "theta", "scaling"), YARNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_yarn_has_the_bits_of_transformers(dim, theta, scaling, dtype):
    """Frequencies, attention factor and table, from the words that an export writes."""
    text = TextConfig(
        hidden_size=2 * dim, num_attention_heads=2, vocab_size=9, rope_theta=theta, rope_scaling=scaling
    )
    module = Qwen2RotaryEmbedding(Qwen2Config(**text.to_hf()))
    ours = PackedRotaryTable(text, dtype)
    assert torch.equal(ours.frequencies, module.inv_freq) and ours.amplitude == module.attention_scaling
    for first in (0, 32_768, 131_071, LAST - 999):
        positions = torch.arange(first, first + 1000)
        cos, sin = module(torch.zeros(1, dtype=dtype), positions[None])
        table = rotary_table(positions, ours.frequencies, dtype, ours.amplitude)
        for one, other in zip(table, (cos, sin), strict=True):
            assert torch.equal(one, other[0, :, : dim // 2])


def test_the_attention_factor_of_four():
    assert YarnConfig(4.0, 32768).amplitude == pytest.approx(1.1386, abs=3e-5)
    assert YarnConfig(1.0, 9).amplitude == 1
    said = {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
    for scales in ({"mscale": 1.0, "mscale_all_dim": 0.8}, {"mscale": 0.5}):
        hf = {"rope_scaling": {**said, **scales}, "hidden_size": 256, "num_attention_heads": 2}
        _, scaling = read_rope(hf)
        theirs = Qwen2RotaryEmbedding(Qwen2Config(**copy.deepcopy(hf)))
        assert scaling.amplitude == theirs.attention_scaling


def transformers_table(dim, theta, positions, dtype=torch.float32):
    config = Qwen2Config(hidden_size=2 * dim, num_attention_heads=2, rope_theta=theta)
    module = Qwen2RotaryEmbedding(config)
    cos, sin = module(torch.zeros(1, dtype=dtype), positions[None])
    assert torch.equal(cos[..., : dim // 2], cos[..., dim // 2 :])  # both halves of a head turn alike
    return module.inv_freq, cos[0, :, : dim // 2], sin[0, :, : dim // 2]


def assert_same_bits(dim, theta, positions, dtype=torch.float32):
    frequencies = inverse_frequencies(dim, theta)
    ours = (frequencies, *rotary_table(positions, frequencies, dtype))
    for one, other in zip(ours, transformers_table(dim, theta, positions, dtype), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), (dim, theta, int(positions[0]))


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("dim", "theta"), PRESETS)
def test_positions_up_to_a_million_for_the_presets(dim, theta, every):
    for positions in torch.arange(LAST, -1, -every).flip(0).split(1 << 16):
        assert_same_bits(dim, theta, positions)


@pytest.mark.parametrize(("dim", "theta"), OTHERS)
def test_other_heads_and_thetas(dim, theta):
    for first in (0, 32_768, 131_071, LAST - 999):
        assert_same_bits(dim, theta, torch.arange(first, first + 1000))


def test_slices_of_packs():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9000, (40,), generator=generator).tolist()
    pack = torch.cat([torch.arange(n) for n in (*lengths, 131_072)])
    for dtype in (torch.float32, torch.bfloat16):
        for first, step in ((0, 1), (3, 1), (777, 7), (150_001, 2)):  # a rank's tokens, whatever they are
            assert_same_bits(128, 1e6, pack[first::step][:5003], dtype)


def test_the_old_order_of_operations_was_seen():
    """What this replaces: a power with a negative exponent, 24 of 64 frequencies in another bit."""
    exponent = torch.arange(0, 128, 2, dtype=torch.float32) / 128
    frequencies, ours = 1e6**-exponent, inverse_frequencies(128, 1e6)
    assert int((frequencies != ours).sum()) == 24
    old, new = (rotary_table(torch.arange(130_000, 131_072), f)[0] for f in (frequencies, ours))
    assert 7.5e-3 < (old - new).abs().max() < 8e-3


# Attention sees differences of positions: those between the tokens must be large.
SPREAD = torch.tensor([0, 1, 7, 900, 32_768, 32_769, 65_000, 131_071, 400_003, 777_777, LAST - 1, LAST])
POSITIONS = {"shifted": torch.arange(24) + 40_000, "spread": SPREAD, "shifted and spread": SPREAD + 32_768}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Logits by position of the training model, of its export, and of the model with the old frequencies."""
    folder = tmp_path_factory.mktemp("rotary")
    # Heads of the real size, and queries and keys large enough for attention to look somewhere.
    write_hf_folder(folder / "hf", text={"hidden_size": 256, "num_attention_heads": 2})
    rewrite_weights(
        folder / "hf",
        lambda tensors: {k: v * 6 if re.search("[qk]_proj", k) else v for k, v in tensors.items()},
    )
    config = import_hf(folder / "hf", folder / "checkpoint")
    export_hf(folder / "checkpoint", folder / "exported")
    hf = Eagle2_5_VLForConditionalGeneration.from_pretrained(folder / "exported").eval()
    text, size = config.text, config.vision.image_size
    assert text.head_dim == 128
    found = {}
    with whole_model(config, torch.float32) as (model, mesh, device), torch.no_grad():
        load_checkpoint(folder / "checkpoint", models=[model])
        rotary = model.language_model.rotary_pos_emb
        right, old = rotary.frequencies, text.rope_theta ** -(torch.arange(0, 128, 2) / 128)
        for name, positions in POSITIONS.items():
            ids = torch.randint(300, (len(positions),), generator=torch.Generator().manual_seed(0))

            def logits(frequencies, ids=ids, positions=positions):
                rotary.frequencies = frequencies
                pack = make_input(
                    config,
                    mesh,
                    device.torch_device,
                    input_ids=ids,
                    position_ids=positions,
                    document_bounds=[0, len(ids)],
                    pixel_values=torch.zeros(0, 3, size, size),
                    targets=None,
                )
                return model(pack)[..., : text.vocab_size]

            # With a mask transformers does not take a jump of positions for the start of a document.
            arguments = {"position_ids": positions[None], "attention_mask": torch.ones(1, len(ids))}
            found[name] = logits(right), hf(input_ids=ids[None], **arguments).logits, logits(old)
    return found


@pytest.mark.parametrize("name", POSITIONS)
def test_logits_beyond_32k_are_the_exports(both, name):
    ours, theirs, old = both[name]
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)
    # The old order of operations is seen.
    assert (old - theirs).abs().max() > 50 * (ours - theirs).abs().max()
