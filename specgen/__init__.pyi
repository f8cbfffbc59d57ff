"""The public names, each once: where it is defined. `__init__.py` reads them from here."""

from specgen._base.options import (
    read_options as read_options,
)
from specgen._base.options import (
    takes_options as takes_options,
)
from specgen._base.version import __version__ as __version__
from specgen.api.dropin.custom_generate import custom_generate as custom_generate
from specgen.api.engine import (
    Engine as Engine,
)
from specgen.api.engine import (
    wrap as wrap,
)
from specgen.api.kept_engine import generate as generate
from specgen.config import (
    EngineConfig as EngineConfig,
)
from specgen.config import (
    EngineOptions as EngineOptions,
)
from specgen.context.stage import (
    Context as Context,
)
from specgen.context.stage import (
    ContextStage as ContextStage,
)
from specgen.context.stage import (
    ContextStageFactory as ContextStageFactory,
)
from specgen.draft.drafter import (
    Drafter as Drafter,
)
from specgen.draft.drafter import (
    DrafterFactory as DrafterFactory,
)
from specgen.draft.drafter import (
    DrafterSetup as DrafterSetup,
)
from specgen.draft.drafter import (
    DraftHints as DraftHints,
)
from specgen.draft.drafter import (
    DraftSession as DraftSession,
)
from specgen.draft.drafter import (
    LoadedModel as LoadedModel,
)
from specgen.draft.features import (
    Features as Features,
)
from specgen.draft.features import (
    Wanted as Wanted,
)
from specgen.draft.growth import (
    Growth as Growth,
)
from specgen.draft.growth import (
    Levels as Levels,
)
from specgen.draft.growth import (
    best_first as best_first,
)
from specgen.engine.request import (
    PreparedRequest as PreparedRequest,
)
from specgen.engine.request import (
    Request as Request,
)
from specgen.engine.stream import Stream as Stream
from specgen.errors import (
    AdapterRefused as AdapterRefused,
)
from specgen.errors import (
    ContextLengthExceeded as ContextLengthExceeded,
)
from specgen.errors import (
    DrafterMismatch as DrafterMismatch,
)
from specgen.errors import (
    DuplicateName as DuplicateName,
)
from specgen.errors import (
    EngineClosed as EngineClosed,
)
from specgen.errors import (
    InvalidRequest as InvalidRequest,
)
from specgen.errors import (
    ModelChanged as ModelChanged,
)
from specgen.errors import (
    Overloaded as Overloaded,
)
from specgen.errors import (
    PluginError as PluginError,
)
from specgen.errors import (
    RequestCancelled as RequestCancelled,
)
from specgen.errors import (
    RequestFailed as RequestFailed,
)
from specgen.errors import (
    SpecgenError as SpecgenError,
)
from specgen.errors import (
    UnknownName as UnknownName,
)
from specgen.errors import (
    UnsupportedModel as UnsupportedModel,
)
from specgen.errors import (
    WouldDeadlock as WouldDeadlock,
)
from specgen.kv.formats import (
    Coder as Coder,
)
from specgen.kv.formats import (
    KVFormat as KVFormat,
)
from specgen.kv.formats import (
    KVFormatFactory as KVFormatFactory,
)
from specgen.kv.formats import (
    Plane as Plane,
)
from specgen.model.fingerprint import model_digest as model_digest
from specgen.model.packed_linear import (
    linears_together as linears_together,
)
from specgen.model.packed_linear import (
    pack_linears as pack_linears,
)
from specgen.plugins.hookspecs import hookimpl as hookimpl
from specgen.plugins.manager import load_plugins as load_plugins
from specgen.sampling.constraint import (
    ConstraintFactory as ConstraintFactory,
)
from specgen.sampling.constraint import (
    ConstraintSetup as ConstraintSetup,
)
from specgen.sampling.constraint import (
    Matcher as Matcher,
)
from specgen.sampling.keywords import SamplingOptions as SamplingOptions
from specgen.sampling.params import SamplingParams as SamplingParams
from specgen.tree import chain as chain
from specgen.types import (
    MAX_TREE_NODES as MAX_TREE_NODES,
)
from specgen.types import (
    Chat as Chat,
)
from specgen.types import (
    Constraint as Constraint,
)
from specgen.types import (
    DrafterStats as DrafterStats,
)
from specgen.types import (
    DraftTrace as DraftTrace,
)
from specgen.types import (
    LogitsProcessor as LogitsProcessor,
)
from specgen.types import (
    LogitsProcessorFactory as LogitsProcessorFactory,
)
from specgen.types import (
    Logprob as Logprob,
)
from specgen.types import (
    Message as Message,
)
from specgen.types import (
    Prompt as Prompt,
)
from specgen.types import (
    Prompts as Prompts,
)
from specgen.types import (
    Result as Result,
)
from specgen.types import (
    Speculation as Speculation,
)
from specgen.types import (
    SpeculativeStats as SpeculativeStats,
)
from specgen.types import (
    StepOutput as StepOutput,
)
from specgen.types import (
    StoppingCriterion as StoppingCriterion,
)
from specgen.types import (
    Tokenizer as Tokenizer,
)
from specgen.types import (
    TokenTree as TokenTree,
)
from specgen.types import (
    Usage as Usage,
)
