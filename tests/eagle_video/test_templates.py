"""The recipe templates of the mixture: valid entries, each with its source and a note on its licence."""

import re

import pytest
import yaml

from megatron_eagle.data.annotations.mixture import read_recipe
from tests.paths import REPO

DATA = REPO / "examples" / "eagle2.5-8b" / "data"
FILES = ("captions", "images", "mixed", "mixed-video")


@pytest.mark.parametrize("name", FILES)
def test_every_entry_can_be_read_and_says_where_it_is_from(name, tmp_path):
    text = (DATA / f"{name}.yaml").read_text()
    entries = yaml.safe_load(text)
    for entry in entries.values():  # what a user brings
        (tmp_path / entry["annotation"]).write_text("{}\n")
    (tmp_path / "recipe.yaml").write_text(text)
    datasets = read_recipe(tmp_path / "recipe.yaml")
    assert [d.name for d in datasets] == list(entries)
    assert not any(d.ignored for d in datasets) and all(0 < d.repeat_time <= 3 for d in datasets)
    noted = re.findall(r"^(\w+): # source: \S.*; licence: \S.*$", text, re.MULTILINE)
    assert noted == list(entries)


def test_stages_build_on_each_other():
    images, mixed, video = (yaml.safe_load((DATA / f"{n}.yaml").read_text()) for n in FILES[1:])
    assert images.items() <= mixed.items() and mixed.items() <= video.items()
    assert {name for name in video if name not in mixed} == {"eagle_video_story", "eagle_video_clips"}
