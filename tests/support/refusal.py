"""Models that an older release of transformers than that of constraints.txt cannot offer: refused by name there."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
from packaging.version import Version
from transformers import PreTrainedModel

from specgen.errors import UnsupportedModel
from specgen.model.runner import ModelRunner, load_runner
from tests.releases.environment import pinned

OLDER = Version(version("transformers")) < Version(pinned()["transformers"])


def target_or_refusal(model: PreTrainedModel, **options: Any) -> ModelRunner | str:
    """The model behind a packed forward, or why it is refused; `options` are ModelRunner's."""
    try:
        return load_runner(model, **options)
    except UnsupportedModel as error:
        refusal = str(error)
        assert refusal.startswith(f"model type {model.config.model_type!r}: ")
        assert refusal.endswith("run it with transformers' own generate")
        return refusal


def supported(model: PreTrainedModel, **options: Any) -> ModelRunner:
    """The model behind a packed forward; skips where it takes a newer transformers. `options` are ModelRunner's."""
    found = target_or_refusal(model, **options)
    if isinstance(found, str):
        assert OLDER, found
        pytest.skip(f"transformers {version('transformers')}: {found}")
    return found
