"""What answers and the events of streams hold: OpenAI's shapes, vLLM's extra fields under its names, and ours."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from specgen.server.protocol.requests import CalledFunction, Ids, ToolCall


class TokenizeAnswer(msgspec.Struct):
    """Ids, how many, and how many would fit."""

    count: int
    max_model_len: int
    tokens: Ids
    token_strs: list[str] | None = None


class DetokenizeAnswer(msgspec.Struct):
    """The text."""

    prompt: str


class ModelCard(msgspec.Struct):
    """A model or an adapter that requests may name."""

    id: str
    created: int
    max_model_len: int
    root: str
    parent: str | None = None
    object: str = "model"
    owned_by: str = "specgen"


class ModelList(msgspec.Struct):
    """The models."""

    data: list[ModelCard]
    object: str = "list"


class Status(msgspec.Struct):
    """One word, and why if it is not good."""

    status: str
    reason: str | None = None


class Version(msgspec.Struct):
    """specgen's version."""

    version: str


class PromptDetails(msgspec.Struct):
    """cached_tokens of the prompt were not computed again."""

    cached_tokens: int = 0
    audio_tokens: int = 0


class CompletionDetails(msgspec.Struct):
    """Of a request with a `prediction`: tokens of it that were drafted and accepted, and those that were rejected."""

    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0
    reasoning_tokens: int = 0
    audio_tokens: int = 0


class Usage(msgspec.Struct):
    """Tokens of a request; the prompt counts once, however many sequences it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class TopLogprob(msgspec.Struct):
    """A token and its log-probability under the model as it is."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the text, and the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Log-probabilities of a choice of a chat."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    """Log-probabilities of a choice of a completion, in four lists of equal length."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class CallDelta(msgspec.Struct, omit_defaults=True):
    """A call in a chunk, or a part of one."""

    index: int
    id: str | None = None
    type: str | None = None
    function: CalledFunction | None = None


class Delta(msgspec.Struct, omit_defaults=True):
    """What a chunk adds to a message."""

    role: str | None = None
    content: str | None = None
    tool_calls: list[CallDelta] | None = None


class TracedToken(msgspec.Struct):
    """A token of the text and who guessed it; nobody guessed a bonus token."""

    text: str
    drafters: list[str]


class TracedNode(msgspec.Struct):
    """A node of the tree that a step verified; parent -1 is the last token before it."""

    text: str
    parent: int
    drafters: list[str]
    accepted: bool
    confidence: float


class StepTrace(msgspec.Struct):
    """One step: the tokens that it committed and the tree that it verified."""

    tokens: list[TracedToken]
    tree: list[TracedNode]


class SpeculativeMetrics(msgspec.Struct, omit_defaults=True):
    """Acceptance of one sequence under vLLM's names; the last two only when details are asked for."""

    mean_acceptance_length: float
    draft_acceptance_rate: float
    acceptance_histogram: list[int]
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int
    by_drafter: dict[str, dict[str, Any]]
    per_step_accepted: list[int] | UnsetType = UNSET
    per_step_drafted: list[int] | UnsetType = UNSET


class RequestMetrics(msgspec.Struct):
    """What a request took; null for several sequences."""

    speculative_decoding: SpeculativeMetrics | None


class _Answer(msgspec.Struct, kw_only=True):
    id: str
    created: int
    model: str
    system_fingerprint: str | None = None


class AssistantMessage(msgspec.Struct):
    """The answer of a chat."""

    content: str | None
    role: str = "assistant"
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    """One of the n answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatAnswer(_Answer, kw_only=True):
    """The answer of POST /v1/chat/completions."""

    object: str = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage
    metrics: RequestMetrics | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    """What a chunk adds to one of the n answers."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    trace: StepTrace | UnsetType = UNSET


class ChatChunk(_Answer, kw_only=True):
    """An event of a streamed chat."""

    object: str = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    metrics: RequestMetrics | UnsetType = UNSET
    obfuscation: str | UnsetType = UNSET


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One text, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    trace: StepTrace | UnsetType = UNSET


class CompletionAnswer(_Answer, kw_only=True):
    """The answer of POST /v1/completions, or an event of a streamed one."""

    object: str = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    metrics: RequestMetrics | UnsetType = UNSET
    obfuscation: str | UnsetType = UNSET


class InputDetails(msgspec.Struct):
    """cached_tokens of the input were not computed again."""

    cached_tokens: int = 0


class OutputDetails(msgspec.Struct, frozen=True):
    """There is no reasoning apart from the text."""

    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct):
    """Tokens of a response."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails
    output_tokens_details: OutputDetails = OutputDetails()


class OutputText(msgspec.Struct, kw_only=True):
    """Text in a message."""

    type: str = "output_text"
    text: str
    annotations: list[str] = []


class OutputItem(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A message of the model, or a call."""

    id: str
    type: str
    status: str
    role: str | None = None
    content: list[OutputText] | UnsetType = UNSET
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None


class Incomplete(msgspec.Struct):
    """Why a response is not complete."""

    reason: str


class ResponseObject(msgspec.Struct, kw_only=True):
    """The answer of POST /v1/responses."""

    id: str
    object: str = "response"
    created_at: int
    status: str
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None = None
    error: None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None = None
    metadata: dict[str, str] = {}
    parallel_tool_calls: bool = True
    temperature: float | None = None
    top_p: float | None = None
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[dict[str, Any]] = []
    previous_response_id: None = None
    store: bool = False


class ResponseEvent(msgspec.Struct, kw_only=True):
    """An event of a streamed response; which fields there are, its type says."""

    type: str
    sequence_number: int
    response: ResponseObject | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    item: OutputItem | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    part: OutputText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    logprobs: list[float] | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    code: str | UnsetType = UNSET
    message: str | UnsetType = UNSET
    param: str | UnsetType | None = UNSET
