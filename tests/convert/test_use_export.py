"""transformers' own ways to use a model, on an export."""

import pytest

from megatron_eagle.hf_model.content import read_part
from tests.convert.media import write_picture
from tests.convert.use_export import CHECKS


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_picture(folder / "p.png", 200, 130)
    return folder


@pytest.mark.parametrize("name", CHECKS)
def test_as_people_use_it(name, exported, files):
    CHECKS[name](exported, files)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "audio", "audio": "a.wav"}, "type audio and audio"),
        ({"type": "text", "text": None}, "type text and no value"),
        ({"fps": 2}, "type None and fps"),
    ],
)
def test_a_part_of_another_kind_is_refused(part, message):
    with pytest.raises(ValueError, match=message):
        read_part(part)
