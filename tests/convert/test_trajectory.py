"""50 steps of training are those of an independent trainer: the export in transformers under torch's AdamW.

The trainer below shares no code with this project's training. It gives every document a row of its own, where
training packs them; it weighs tokens, clips, warms up and decays by its own few lines; and it makes its own
groups of parameters, as Megatron does: vectors, biases among them, do not decay.
"""

import math
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from megatron_eagle.checkpoint import load_checkpoint, read_model_config
from megatron_eagle.convert.from_hf import import_hf
from megatron_eagle.convert.mapping import ModelMapping
from megatron_eagle.convert.to_hf import export_hf
from megatron_eagle.convert.whole_model import whole_model
from megatron_eagle.data.loading.loader import DataConfig, PackLoader
from megatron_eagle.data.loading.packs import no_tiles
from megatron_eagle.data.packing.index import write_packs
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.training.loss import weighted_loss
from megatron_eagle.training.monitoring.metrics import read_metrics
from megatron_eagle.training.run_config import load_run_config
from megatron_eagle.training.schedule import build_batch, plan_batch
from megatron_eagle.training.train import train
from tests.convert.hf_folder import TILE, read_weights, rewrite_weights, write_hf_folder
from tests.data.helpers import conversation, make_image, make_store, read_media

STEPS, FEW, PACKS, LENGTH = 50, 8, 2, 192
# Their exact gradient is zero: a bias of the keys adds the same to all scores of a query, which softmax takes
# away again. What is computed in its place is rounding, and Adam turns rounding into steps.
WITHOUT_GRADIENT = {
    f"vision_model.vision_model.encoder.layers.{layer}.self_attn.k_proj.bias" for layer in range(2)
}
# In the language model a key's bias turns with its position. Pairs of features that hardly turn within a
# document have next to no gradient either, with a theta of 1e6 most of them: this one turns them all.
THETA = 100.0
TOLERANCE = 1e-5
NORMS = r"norm.*\.weight|mlp1\.0\.weight"


@dataclass(frozen=True)
class Recipe:
    """What the trainer does; the changed ones must be noticed."""

    lr: float = 2e-3
    min_lr: float = 2e-4
    warmup: int = 5
    weight_decay: float = 0.2
    clip: float = 2.0
    decayed_dimensions: int = 2  # parameters with as many, or more, decay
    root: float = 0.5  # a supervised token of a document with n of them weighs 1 / n ** root

    def lr_at(self, finished: int) -> float:
        """Linear from 0, then half a cosine down to `min_lr` at the end."""
        if finished <= self.warmup:
            return self.lr * finished / self.warmup
        part = (finished - self.warmup) / (STEPS - self.warmup)
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * part)) / 2


RECIPE = Recipe()


@dataclass(frozen=True)
class Document:
    """One sample: ids [n], whether each is part of an answer [n], tiles [t, 3, S, S]."""

    ids: Tensor
    supervised: Tensor
    tiles: Tensor


@dataclass(frozen=True)
class Trajectory:
    """Per step loss, gradient norm and learning rate; the parameters after the last, by exported name."""

    losses: Tensor
    norms: Tensor
    lrs: Tensor
    parameters: dict[str, Tensor]


def loss_of(model, documents: list[Document], recipe: Recipe = RECIPE) -> Tensor:
    """All weights of a step add up to 1."""
    lengths = [len(d.ids) for d in documents]
    ids = pad_sequence([d.ids for d in documents], batch_first=True)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    weights = [d.supervised.double() / d.supervised.double().sum() ** recipe.root for d in documents]
    weights = pad_sequence(weights, batch_first=True)[:, 1:]
    pixels = torch.cat([d.tiles for d in documents])
    logits = model(input_ids=ids, pixel_values=pixels.to(model.dtype), attention_mask=mask.long()).logits
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * (weights / weights.sum()).to(losses.dtype)).sum()


def load(export: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, dtype=dtype)


def train_in_transformers(export: Path, steps: list[list[Document]], recipe: Recipe) -> Trajectory:
    model = load(export).train()
    decayed = [p for p in model.parameters() if p.dim() >= recipe.decayed_dimensions]
    others = [p for p in model.parameters() if p.dim() < recipe.decayed_dimensions]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    curve = []
    for finished, documents in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(finished)
        optimizer.zero_grad(set_to_none=finished == 0)  # a step without pictures decays the encoder, too
        loss = loss_of(model, documents, recipe)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip or math.inf)
        optimizer.step()
        curve.append((loss.item(), norm.item(), recipe.lr_at(finished)))
    folder = export.parent / "trained"
    model.save_pretrained(folder)
    return Trajectory(*torch.tensor(curve, dtype=torch.float64).T, read_weights(folder))


class Case:
    """A tiny model's export, a store of pictures and text, and a run that starts from the same weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        source = write_hf_folder(folder / "source", text={"rope_theta": THETA})
        # Norms as a model has them; so small a model's own are random like its other weights.
        rewrite_weights(source, lambda t: {k: v + 1 if re.search(NORMS, k) else v for k, v in t.items()})
        import_hf(source, folder / "start")
        export_hf(folder / "start", folder / "export")
        self.store = write_store(folder, source)
        settings = {
            "data": {"path": str(self.store), "length": LENGTH, "prefetch": False},
            "training": {"train_iterations": STEPS, "global_batch_size": PACKS, "precision": "fp32"},
            "optimizer": {
                "lr": RECIPE.lr,
                "min_lr": RECIPE.min_lr,
                "lr_warmup_iterations": RECIPE.warmup,
                "weight_decay": RECIPE.weight_decay,
                "clip_grad": RECIPE.clip,
            },
            "checkpoint": {"path": str(folder / "run"), "load": str(folder / "start")},
            "logging": {"progress": False, "tensorboard": False},
        }
        self.config = folder / "run.yaml"
        self.config.write_text(yaml.safe_dump(settings))

    def train_here(self, last: int = STEPS) -> Trajectory:
        run, export = self.folder / f"run{last}", self.folder / f"ours{last}"
        overrides = [f"checkpoint.path={run}", f"training.stop_at_iteration={last}"]
        train(load_run_config(self.config, overrides, world_size=1))
        export_hf(run, export)
        lines = read_metrics(run / "logs" / "metrics.jsonl")
        curve = torch.tensor([(m.loss, m.grad_norm, m.lr) for m in lines], dtype=torch.float64)
        return Trajectory(*curve.T, read_weights(export))

    def loader(self, plan=no_tiles) -> PackLoader:
        return PackLoader(
            DataConfig(str(self.store), LENGTH, prefetch=False),
            global_batch_size=PACKS,
            data_parallel_rank=0,
            data_parallel_size=1,
            plan=plan,
        )

    def steps(self) -> list[list[Document]]:
        """The samples of every global batch, each by itself."""
        store, loader = SampleStore(self.store, LENGTH), self.loader()
        packs = [loader.step(PACKS * step).microbatches for step in range(STEPS)]
        assert max(len(pack.sample_rows) for step in packs for pack in step) > 1
        assert min(pack.n_tiles for step in packs for pack in step) == 0
        rows = {row for step in packs for pack in step for row in pack.sample_rows}
        read = {row: self._document(store, row) for row in rows}
        return [[read[row] for pack in step for row in pack.sample_rows] for step in packs]

    @staticmethod
    def _document(store: SampleStore, row: int) -> Document:
        sample = store[row]
        ids, answers = (torch.from_numpy(x.astype("int64")) for x in (sample.ids, sample.answers))
        tiles = torch.cat([torch.empty(0, 3, TILE, TILE), *read_media(store, row)])
        return Document(ids, answers > 0, tiles)


def write_store(folder: Path, tokenizer: Path) -> Path:
    """Text of one and two answers, pictures of one and of several tiles."""
    records = []
    for k in range(8):
        records.append(conversation("What?", "A rocket " * (2 * k + 1)))
        records[-1]["conversations"] += conversation("And?", "No. " * (k + 1))["conversations"]
        if k % 2:
            make_image(folder / f"{k}.png", (64 * (k % 3 + 1), 64), seed=k)
            records.append(conversation("<image-1>?", "A cup. " * k, image=[f"{k}.png"]))
    sampling = {"tile_size": TILE, "max_tiles": 2}
    store = make_store(folder, tokenizer, records, (LENGTH,), sampling=sampling, patch_size=16)
    write_packs(store, LENGTH, seed=0)
    return store


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("trajectory"))


@pytest.fixture(scope="module")
def steps(case):
    return case.steps()


@pytest.fixture(scope="module")
def ours(case):
    return case.train_here()


@pytest.fixture(scope="module")
def theirs(case, steps):
    return train_in_transformers(case.folder / "export", steps, RECIPE)


def assert_same(ours: Trajectory, theirs: Trajectory) -> None:
    assert torch.equal(ours.lrs, theirs.lrs)
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(ours.norms, theirs.norms, rtol=TOLERANCE, atol=0)
    assert ours.parameters.keys() == theirs.parameters.keys() > WITHOUT_GRADIENT
    apart = {
        name: (ours.parameters[name] - value).abs().max().item() for name, value in theirs.parameters.items()
    }
    assert {name for name, worst in apart.items() if worst > TOLERANCE} <= WITHOUT_GRADIENT, apart


def test_the_loss_curve_and_all_parameters_are_the_same(ours, theirs):
    assert ours.norms.min() < RECIPE.clip < ours.norms.max() and len(ours.losses) == STEPS  # some are clipped
    assert_same(ours, theirs)


def test_a_few_steps_alone(case, steps):
    """Which `make parity-mutants` repeats with every factor of one process."""
    assert_same(case.train_here(FEW), train_in_transformers(case.folder / "export", steps[:FEW], RECIPE))


def test_training_went_somewhere(case, ours):
    """Every parameter that has a gradient has moved much farther than the two sides are apart."""
    start = read_weights(case.folder / "export")
    moved = {name: (ours.parameters[name] - value).abs().max().item() for name, value in start.items()}
    still = {name for name, farthest in moved.items() if farthest < 100 * TOLERANCE}
    assert still == WITHOUT_GRADIENT | {name for name in start if ".head." in name}
    assert ours.losses[-1] < 0.3 * ours.losses[0]


CHANGED = {
    "vectors decay, too": {"decayed_dimensions": 1},
    "less decay": {"weight_decay": 0.15},
    "nothing is clipped": {"clip": 0.0},
    "one more step of warm-up": {"warmup": 6},
    "the cosine ends at 0": {"min_lr": 0.0},
    "every token weighs the same": {"root": 0.0},
}


@pytest.mark.parametrize("change", CHANGED)
def test_another_trainer_is_noticed(case, steps, ours, change):
    other = train_in_transformers(case.folder / "export", steps[:15], replace(RECIPE, **CHANGED[change]))
    assert (other.losses - ours.losses[:15]).abs().max() > 100 * TOLERANCE


def gradients(case: Case) -> dict[str, Tensor]:
    """Of the first step in training's own model, by exported name."""
    with whole_model(read_model_config(case.folder / "start"), torch.float32) as (model, mesh, device):
        load_checkpoint(case.folder / "start", models=[model])
        config = model.eagle
        for batch in case.loader(partial(plan_batch, config, mesh, False)).step(0).microbatches:
            inputs = build_batch(device.torch_device, batch)
            weighted_loss(model(inputs), inputs.targets.loss_weights).backward()
        plan = ModelMapping(config, has_head=False)
        return dict(plan.to_hf(lambda name: model.get_parameter(name).grad))


def test_the_biases_of_the_encoders_keys_have_no_gradient(case, steps):
    """And nothing else: in double precision on one side, beyond rounding on the other."""
    model = load(case.folder / "export", torch.float64)
    loss_of(model, steps[0]).backward()
    exact = {name: p.grad.abs().max().item() for name, p in model.named_parameters() if p.grad is not None}
    largest = max(exact.values())
    zero = {name for name, worst in exact.items() if worst < 1e-16 * largest}
    assert {re.sub("^vision_model.", "vision_model.vision_model.", name) for name in zero} == WITHOUT_GRADIENT
    found = {name: grad.abs().max().item() for name, grad in gradients(case).items()}
    rounding = 1e-9 * max(found.values())
    assert {name for name, worst in found.items() if worst < rounding} == WITHOUT_GRADIENT


def test_a_shift_of_all_keys_changes_nothing(case, steps):
    """Why they have none; a shift of all queries does change something."""
    losses = {}
    model = load(case.folder / "export", torch.float64)
    for shifted in ("nothing", "k_proj.bias", "q_proj.bias"):
        for name, parameter in model.named_parameters():
            if name.startswith("vision_model.encoder") and name.endswith(shifted):
                parameter.data += torch.linspace(-1, 2, len(parameter))
        losses[shifted] = loss_of(model, steps[0]).item()
    assert losses["k_proj.bias"] == pytest.approx(losses["nothing"], rel=1e-12)
    assert losses["q_proj.bias"] != pytest.approx(losses["nothing"], rel=1e-7)
