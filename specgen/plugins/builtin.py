"""The built-ins, offered through the same hooks as a stranger's plugin."""

from __future__ import annotations

from collections.abc import Mapping

from specgen.context.chat_template import chat_template
from specgen.context.stage import ContextStageFactory
from specgen.context.truncation import truncate
from specgen.draft.drafter import DrafterFactory
from specgen.draft.drafters.grammar import Grammar
from specgen.draft.drafters.prediction import Prediction
from specgen.draft.drafters.prompt_lookup import PromptLookup
from specgen.draft.drafters.recycling import Recycling
from specgen.draft.drafters.translation import draft_model
from specgen.kv.formats import FORMATS, KVFormatFactory
from specgen.plugins.hookspecs import hookimpl


@hookimpl
def context_stages() -> Mapping[str, ContextStageFactory]:
    """The stages every engine can list."""
    return {"chat-template": chat_template, "truncate": truncate}


@hookimpl
def kv_formats() -> Mapping[str, KVFormatFactory]:
    """The model's own dtype, and four that take fewer bytes."""
    return FORMATS


@hookimpl
def drafters() -> Mapping[str, DrafterFactory]:
    """The drafters that need no training."""
    return {
        "grammar": Grammar,
        "prediction": Prediction,
        "prompt-lookup": PromptLookup,
        "recycling": Recycling,
        "draft-model": draft_model,
    }
