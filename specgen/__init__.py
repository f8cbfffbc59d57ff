"""specgen: any Hugging Face causal LM generates several tokens per forward, and not one token of its output changes.

import specgen

engine = specgen.Engine.from_pretrained("path/to/model")
print(engine.generate("The capital of France is", max_tokens=16).text)
"""

from specgen.api import Engine, generate, wrap
from specgen.config import EngineConfig
from specgen.context.stage import Context, ContextStage, ContextStageFactory
from specgen.draft.drafter import Drafter, DrafterFactory, DrafterSetup, DraftHints, DraftSession
from specgen.dropin import custom_generate
from specgen.errors import (
    ContextLengthExceeded,
    DrafterMismatch,
    DuplicateName,
    EngineClosed,
    InvalidRequest,
    PluginError,
    RequestCancelled,
    RequestFailed,
    SpecgenError,
    UnknownName,
    UnsupportedModel,
)
from specgen.hookspecs import LogitsProcessorFactory, hookimpl
from specgen.options import read_options
from specgen.params import SamplingParams
from specgen.stream import Stream
from specgen.types import Logprob, Result, Speculation, SpeculativeStats, StepOutput, TokenTree, Usage

__version__ = "0.1.0"

__all__ = [
    "Context",
    "ContextLengthExceeded",
    "ContextStage",
    "ContextStageFactory",
    "DraftHints",
    "DraftSession",
    "Drafter",
    "DrafterFactory",
    "DrafterMismatch",
    "DrafterSetup",
    "DuplicateName",
    "Engine",
    "EngineClosed",
    "EngineConfig",
    "InvalidRequest",
    "LogitsProcessorFactory",
    "Logprob",
    "PluginError",
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
    "__version__",
    "custom_generate",
    "generate",
    "hookimpl",
    "read_options",
    "wrap",
]
