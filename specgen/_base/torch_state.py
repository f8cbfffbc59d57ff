"""torch's state of a thread (inference mode, autocast, default device), which belongs to whoever calls specgen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu")


@contextmanager
def plain_torch() -> Iterator[None]:
    """Put the calling thread's state of torch aside, so that what is made here is what the engine's thread would make.

    Under the caller's inference mode a pool would be of tensors that nobody else may write to, under his autocast
    weights would be packed in another precision, and under his default device ids would land beside the model.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in _AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
