"""The README.md of an export says what runs and data say, works as written, and stays as people edit it."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from megatron_eagle.checkpoint import read_model_config
from megatron_eagle.convert.model_card import CardFacts, Score
from megatron_eagle.convert.to_hf import export_hf
from megatron_eagle.errors import UserError
from tests.convert.media import write_picture


def card_of(folder):
    head, text = (folder / "README.md").read_text().removeprefix("---\n").split("---\n", 1)
    return yaml.safe_load(head), text


@pytest.fixture
def trained(checkpoint, tmp_path):
    """A checkpoint as after two stages, of which the first lies beside it; its data are gone."""
    first, second = tmp_path / "stage1", tmp_path / "stage2"
    for folder, length, before in ((first, 32768, None), (second, 65536, str(first))):
        shutil.copytree(checkpoint, folder)
        [iteration] = folder.glob("iter_*")
        run = yaml.safe_load((iteration / "run.yaml").read_text())
        run |= {
            "data": {"path": f"/gone/data-{length}", "length": length},
            "training": {"global_batch_size": 8, "precision": "bf16"},
            "optimizer": {"trainable": ["connector"], "lr": 2e-5},
            "checkpoint": {"load": before},
        }
        (iteration / "run.yaml").write_text(yaml.safe_dump(run))
    return second


def test_both_stages_and_what_is_not_known(trained, tmp_path):
    export_hf(trained, tmp_path / "out", verify=False)
    head, text = card_of(tmp_path / "out")
    assert head["license"] == "other" and head["pipeline_tag"] == "image-text-to-text"
    stages = re.findall(r"^\| (stage\d) \| 0 \| (.*?) \| (.*?) \| (.*?) \|", text, re.M)
    assert stages == [
        (f"stage{k}", f"8 packs of {length} tokens", "connector", "2e-05")
        for k, length in ((1, "32,768"), (2, "65,536"))
    ]
    assert "The longest packs had 65,536 tokens." in text
    assert "`data-65536`: not at hand" in text
    assert f"up to **{read_model_config(trained).text.max_position_embeddings:,} tokens**" in text


def test_what_is_given(checkpoint, tmp_path):
    facts = CardFacts("apache-2.0", [Score("videomme", 71.236, 2600, 2700, 512)])
    export_hf(checkpoint, tmp_path / "out", verify=False, facts=facts)
    head, text = card_of(tmp_path / "out")
    assert head["license"] == "apache-2.0"
    assert "| videomme | 71.24 | 2,600 of 2,700 | 512 |" in text


def test_edited_by_hand_it_stays(checkpoint, tmp_path):
    out = tmp_path / "out"
    export_hf(checkpoint, out, verify=False)
    written = (out / "README.md").read_text()
    export_hf(checkpoint, out, verify=False, facts=CardFacts("mit"))
    assert card_of(out)[0]["license"] == "mit"  # not edited: written anew
    (out / "README.md").write_text("# Ours\n")
    for _ in range(2):
        export_hf(checkpoint, out, verify=False)
        assert (out / "README.md").read_text() == "# Ours\n"
    (out / "README.md").unlink()
    export_hf(checkpoint, out, verify=False)
    assert (out / "README.md").read_text() == written
    assert "README.md" in json.loads((out / "megatron_eagle_export.json").read_text())["files"]


def test_its_program_runs(exported, tmp_path):
    program = re.search(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.S)[1]
    write_picture(tmp_path / "photo.jpg", 90, 60)
    program = program.replace('folder = "."', f"folder = {str(exported)!r}").replace("=256", "=4")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_scores_of_nothing_are_refused(checkpoint, tmp_path):
    from megatron_eagle.commands.convert import main

    with pytest.raises((UserError, SystemExit)):
        main(
            [
                "export",
                "--checkpoint",
                str(checkpoint),
                "--hf",
                str(tmp_path / "o"),
                "--scores",
                str(tmp_path),
            ]
        )
    assert not (tmp_path / "o").exists()
