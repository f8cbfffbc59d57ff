"""specgen: any Hugging Face causal LM generates several tokens per forward, and not one token of its output changes.

import specgen

engine = specgen.Engine.from_pretrained("path/to/model")
print(engine.generate("The capital of France is", max_tokens=16).text)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from specgen._base.version import __version__

if TYPE_CHECKING:
    from specgen._base.options import read_options, takes_options
    from specgen.api.dropin.custom_generate import custom_generate
    from specgen.api.engine import Engine, generate, wrap
    from specgen.config import EngineConfig
    from specgen.context.stage import Context, ContextStage, ContextStageFactory
    from specgen.draft.drafter import Drafter, DrafterFactory, DrafterSetup, DraftHints, DraftSession
    from specgen.draft.features import Features, Wanted
    from specgen.draft.growth import Growth, Levels, best_first
    from specgen.engine.request import Request
    from specgen.engine.stream import Stream
    from specgen.errors import (
        AdapterRefused,
        ContextLengthExceeded,
        DrafterMismatch,
        DuplicateName,
        EngineClosed,
        InvalidRequest,
        ModelChanged,
        PluginError,
        RequestCancelled,
        RequestFailed,
        SpecgenError,
        UnknownName,
        UnsupportedModel,
        WouldDeadlock,
    )
    from specgen.kv.formats import Coder, KVFormat, KVFormatFactory, Plane
    from specgen.model.fingerprint import model_digest
    from specgen.model.packed_linear import linears_together, pack_linears
    from specgen.plugins.hookspecs import hookimpl
    from specgen.plugins.manager import load_plugins
    from specgen.sampling.constraint import ConstraintFactory, ConstraintSetup, Matcher
    from specgen.sampling.params import SamplingParams
    from specgen.tree import chain
    from specgen.types import (
        MAX_TREE_NODES,
        Chat,
        DrafterStats,
        DraftTrace,
        LogitsProcessorFactory,
        Logprob,
        Result,
        Speculation,
        SpeculativeStats,
        StepOutput,
        TokenTree,
        Usage,
    )


__all__ = [
    "MAX_TREE_NODES",
    "AdapterRefused",
    "Chat",
    "Coder",
    "ConstraintFactory",
    "ConstraintSetup",
    "Context",
    "ContextLengthExceeded",
    "ContextStage",
    "ContextStageFactory",
    "DraftHints",
    "DraftSession",
    "DraftTrace",
    "Drafter",
    "DrafterFactory",
    "DrafterMismatch",
    "DrafterSetup",
    "DrafterStats",
    "DuplicateName",
    "Engine",
    "EngineClosed",
    "EngineConfig",
    "Features",
    "Growth",
    "InvalidRequest",
    "KVFormat",
    "KVFormatFactory",
    "Levels",
    "LogitsProcessorFactory",
    "Logprob",
    "Matcher",
    "ModelChanged",
    "Overloaded",
    "Plane",
    "PluginError",
    "Request",
    "RequestCancelled",
    "RequestFailed",
    "Result",
    "SamplingParams",
    "SpecgenError",
    "Speculation",
    "SpeculativeStats",
    "StepOutput",
    "Stream",
    "TokenTree",
    "UnknownName",
    "UnsupportedModel",
    "Usage",
    "Wanted",
    "WouldDeadlock",
    "__version__",
    "best_first",
    "chain",
    "custom_generate",
    "generate",
    "hookimpl",
    "linears_together",
    "load_plugins",
    "model_digest",
    "pack_linears",
    "read_options",
    "takes_options",
    "wrap",
]

# What a name needs is imported when it is first asked for: torch and transformers take seconds, a command's help none.
_HOMES = {
    "AdapterRefused": "specgen.errors",
    "Chat": "specgen.types",
    "Plane": "specgen.kv.formats",
    "KVFormatFactory": "specgen.kv.formats",
    "KVFormat": "specgen.kv.formats",
    "Coder": "specgen.kv.formats",
    "ConstraintFactory": "specgen.sampling.constraint",
    "ConstraintSetup": "specgen.sampling.constraint",
    "Context": "specgen.context.stage",
    "ContextLengthExceeded": "specgen.errors",
    "ContextStage": "specgen.context.stage",
    "ContextStageFactory": "specgen.context.stage",
    "DraftHints": "specgen.draft.drafter",
    "DraftSession": "specgen.draft.drafter",
    "DraftTrace": "specgen.types",
    "Drafter": "specgen.draft.drafter",
    "DrafterFactory": "specgen.draft.drafter",
    "DrafterMismatch": "specgen.errors",
    "DrafterSetup": "specgen.draft.drafter",
    "DrafterStats": "specgen.types",
    "DuplicateName": "specgen.errors",
    "Engine": "specgen.api.engine",
    "EngineClosed": "specgen.errors",
    "EngineConfig": "specgen.config",
    "Features": "specgen.draft.features",
    "Growth": "specgen.draft.growth",
    "Levels": "specgen.draft.growth",
    "InvalidRequest": "specgen.errors",
    "LogitsProcessorFactory": "specgen.types",
    "MAX_TREE_NODES": "specgen.types",
    "Overloaded": "specgen.errors",
    "Logprob": "specgen.types",
    "Matcher": "specgen.sampling.constraint",
    "ModelChanged": "specgen.errors",
    "PluginError": "specgen.errors",
    "Request": "specgen.engine.request",
    "RequestCancelled": "specgen.errors",
    "RequestFailed": "specgen.errors",
    "Result": "specgen.types",
    "SamplingParams": "specgen.sampling.params",
    "SpecgenError": "specgen.errors",
    "Speculation": "specgen.types",
    "SpeculativeStats": "specgen.types",
    "StepOutput": "specgen.types",
    "Stream": "specgen.engine.stream",
    "TokenTree": "specgen.types",
    "UnknownName": "specgen.errors",
    "UnsupportedModel": "specgen.errors",
    "Usage": "specgen.types",
    "Wanted": "specgen.draft.features",
    "WouldDeadlock": "specgen.errors",
    "best_first": "specgen.draft.growth",
    "chain": "specgen.tree",
    "custom_generate": "specgen.api.dropin.custom_generate",
    "generate": "specgen.api.engine",
    "hookimpl": "specgen.plugins.hookspecs",
    "linears_together": "specgen.model.packed_linear",
    "load_plugins": "specgen.plugins.manager",
    "model_digest": "specgen.model.fingerprint",
    "pack_linears": "specgen.model.packed_linear",
    "read_options": "specgen._base.options",
    "takes_options": "specgen._base.options",
    "wrap": "specgen.api.engine",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'specgen' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value
