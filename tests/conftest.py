"""Fixtures for all tests: the real small model, and memory that is never zero by luck."""

from __future__ import annotations

import os
import signal

# Before anything imports transformers, which reads it once: no test may depend on a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import sys
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch

# Before anything imports triton, which reads it once: without a GPU its interpreter runs the kernels. Users without a
# GPU have no triton, nor have the environments of the newest and the oldest releases.
if find_spec("triton") and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

# A shell's background job ignores Ctrl-C, and so would this process and all that tests start.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# What takes a worker longest. The others are dealt out after them, so that none is alone with a long file in the end.
LONGEST = (
    *("exactness/test_kv.py", "docs/test_docs.py", "exactness/test_real_models.py", "forward/test_compiled.py"),
    *("tests/test_benchmarks.py", "exactness/test_grammar.py", "exactness/test_architectures.py", "test_distill.py"),
    *("server/test_faults.py", "exactness/test_gpu.py", "test_eagle.py", "model/test_model_state.py"),
    *("server/test_soak.py", "draft/drafters/test_translation.py", "model/test_invariant_layers.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    places = {name: place for place, name in enumerate(LONGEST)}

    def place(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((place for name, place in places.items() if path.endswith(name)), len(LONGEST))

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` and its like return with NaN or huge integers, so that reading before writing shows.

    Only for calls out of specgen's own modules: torch and transformers know what they do with theirs. For the whole
    session, so that fixtures of any scope get it.
    """
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, _poisoning(getattr(owner, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def small_pools() -> Iterator[None]:
    """Engines whose pool nobody sized get one of two full contexts, not of sixteen: filling gigabytes with NaN takes
    longer than most tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specgen.model.kv_size._FULL_CONTEXTS", 2)
        yield


def _poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("specgen.") and not tensor.is_meta:
            tensor.fill_(_poison(tensor.dtype))
        return tensor

    return poisoned


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    # As an index it is out of range, as a token id in no vocabulary, as a length absurd.
    return True if dtype == torch.bool else torch.iinfo(dtype).max


@pytest.fixture(scope="session", autouse=True)
def interpreted_products() -> Iterator[None]:
    """Sum products in Triton's interpreter in one order for every row, as a GPU's tensor cores do. numpy's own library
    rounds a row by its place in a matrix, on some processors."""
    if "TRITON_INTERPRET" not in os.environ:
        yield
        return
    interpreter = import_module("triton.runtime.interpreter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "np", _NumpyInOneOrder())
        yield


class _NumpyInOneOrder:
    """numpy, but for its products of matrices."""

    def __getattr__(self, name: str) -> Any:
        return self._product if name == "matmul" else getattr(np, name)

    def _product(self, a: np.ndarray, b: np.ndarray, dtype: Any) -> np.ndarray:
        return np.matmul(a[..., None, :], b[..., None, :, :], dtype=dtype)[..., 0, :]


@pytest.fixture(autouse=True)
def default_log() -> Iterator[None]:
    """What a test does to structlog ends with it, and with `capture_logs`, which leaves it configured."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: several threads only wait for one another, for ever so long where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The demo model's folder. The first use on a machine downloads 93 MB and takes some 20 seconds."""
    from specgen.demo_model import demo_model

    return demo_model()


@pytest.fixture(scope="session")
def smollm(demo_path: Path) -> PreTrainedModel:
    """SmolLM2-135M-Instruct in float32. Shared by all tests: leave it as you found it."""
    return AutoModelForCausalLM.from_pretrained(demo_path, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def smollm_tokenizer(demo_path: Path) -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer, with its chat template."""
    return AutoTokenizer.from_pretrained(demo_path)
