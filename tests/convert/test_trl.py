"""An export goes on training elsewhere; `make test-serving` makes the environment."""

import pytest

from tests.convert.media import write_picture
from tests.convert.test_old_transformers import run
from tests.paths import REPO

TRL = REPO / ".venv-trl-1.16" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TRL.exists(), reason="no TRL: make test-serving"),
]


def test_two_steps_of_sft(exported, tmp_path):
    write_picture(tmp_path / "p.png", 200, 130)
    run(TRL, str(REPO / "tests" / "convert" / "use_trl.py"), str(exported), str(tmp_path))
