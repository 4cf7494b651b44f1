"""What several unit tests need."""

import sys
from types import ModuleType, SimpleNamespace

import pytest


@pytest.fixture
def wandb(monkeypatch) -> ModuleType:
    """A module in wandb's place. `started`: settings of each start; `logged`: (step, values), "finished"."""
    module = ModuleType("wandb")
    module.__spec__ = SimpleNamespace(name="wandb")
    module.Error = type("Error", (Exception,), {})
    module.Settings = lambda **settings: settings
    module.started, module.logged = [], []

    def init(**settings):
        module.started.append(settings)
        return SimpleNamespace(
            id=settings["id"] or "abc123",
            log=lambda values, step: module.logged.append((step, values)),
            finish=lambda: module.logged.append("finished"),
        )

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module
