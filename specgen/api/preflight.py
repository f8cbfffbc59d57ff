"""Whether an engine can be built by its config, as far as that can be told before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedModel

from specgen._base.memory import available_bytes
from specgen._base.options import declared_options, read_options
from specgen.config import EngineConfig
from specgen.errors import InvalidRequest, UnknownName, UnsupportedModel
from specgen.model.loading import check_source
from specgen.plugins.manager import Plugins
from specgen.types import Speculation

_DRAFT_MODEL = "draft-model"


def check_options(config: EngineConfig, plugins: Plugins) -> None:
    """Raise UnknownName or InvalidRequest for what no plugin offers, for options of drafters that do not fit, for
    folders and draft models that are not there, and for caches larger than memory."""
    formats = plugins.collect("kv_formats")
    if config.kv_format not in formats:
        raise UnknownName("KV format", config.kv_format, formats, param="kv_format")
    _check_drafters(config, plugins)
    check_speculation(config.speculation, config)
    _check_folders(config)
    _check_caches(config)
    if config.gpu_kernels and find_spec("triton") is None:
        reason = "triton is not installed: pip install 'specgen-llm[gpu]'"
        raise UnsupportedModel(f"gpu_kernels=True cannot be kept: {reason}; take gpu_kernels=None")


def check_speculation(speculation: Speculation, config: EngineConfig) -> None:
    """Raise UnknownName for a drafter that the engine will not have."""
    for name in speculation.drafters or ():
        if name not in config.drafters:
            raise UnknownName("drafter", name, config.drafters, param="speculation")


def _check_drafters(config: EngineConfig, plugins: Plugins) -> None:
    offered = plugins.collect("drafters")
    for name, options in config.drafters.items():
        if name not in offered:
            raise UnknownName("drafter", name, offered, param="drafters")
        if (fields := declared_options(offered[name])) is not None:
            read_options(f"drafter {name!r}", options, fields)
    model = config.drafters.get(_DRAFT_MODEL, {}).get("model")
    if model is not None and not isinstance(model, PreTrainedModel):
        check_source(model, {})


def _check_folders(config: EngineConfig) -> None:
    root = config.adapters.root
    if root is not None and not Path(root).expanduser().is_dir():
        raise InvalidRequest(f"adapters.root is {str(root)!r}, which is no folder", param="adapters")
    if config.disk_cache is not None and any(place.is_file() for place in _upwards(Path(config.disk_cache))):
        message = f"disk_cache {str(config.disk_cache)!r} cannot be used: it is, or lies below, a file"
        raise InvalidRequest(f"{message}; choose a folder to write to", param="disk_cache")


def _upwards(path: Path) -> Iterable[Path]:
    return path, *path.parents


def _check_caches(config: EngineConfig) -> None:
    """Caches in host memory are filled in time, so one that is too large would end the process hours later."""
    available = available_bytes(torch.device("cpu"))
    caches = {name: getattr(config, name) for name in ("host_cache_bytes", "response_cache_bytes")}
    if sum(caches.values()) <= available:
        return
    name = max(caches, key=caches.__getitem__)
    told = " and ".join(f"{name} is {count}" for name, count in caches.items() if count)
    raise InvalidRequest(f"{told}, and {available} bytes of memory are available", param=name)
