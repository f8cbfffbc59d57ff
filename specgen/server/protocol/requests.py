"""What requests may hold: OpenAI's fields, vLLM's extra ones under its names, and ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from specgen.errors import InvalidRequest

Ids: TypeAlias = list[int]
Stop: TypeAlias = Annotated[list[Annotated[str, Meta(max_length=256)]], Meta(max_length=16)]
Short: TypeAlias = Annotated[str, Meta(max_length=256)]
Object: TypeAlias = dict[str, Any]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """include_usage: a last chunk with the usage. continuous_usage_stats: the usage so far with every chunk.
    include_obfuscation: chunks are padded, so that their sizes tell little about what they hold."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class TextPart(msgspec.Struct, gc=False):
    """A part of a message; `type` is "text"."""

    type: str
    text: str | None = None


class Prediction(msgspec.Struct, forbid_unknown_fields=True):
    """Text that the answer is expected to be much like; it is drafted where it fits and changes no token."""

    type: Literal["content"]
    content: str | list[TextPart]


class Function(msgspec.Struct, omit_defaults=True):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Short
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    """A tool; `type` is "function"."""

    function: Function
    type: Literal["function"] = "function"


class CalledFunction(msgspec.Struct, gc=False):
    """A call that the model made; `arguments` is JSON."""

    name: str
    arguments: Annotated[str, Meta(max_length=128 << 10)]


class ToolCall(msgspec.Struct, gc=False):
    """A call in an earlier message."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class Message(msgspec.Struct, omit_defaults=True, gc=False):
    """One message of a conversation. What else a client's message object holds is passed over."""

    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class ResponseFormat(msgspec.Struct):
    """How the answer is to be formed. A schema stands under `json_schema` in chats, beside `type` in responses."""

    type: str
    json_schema: Object | None = None
    name: str | None = None
    schema: Object | bool | None = None
    strict: bool | None = None


class Sampling(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields that chat and completions share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1)] | None = None
    max_tokens: int | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: float | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: float | None = None
    typical_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: Ids | None = None
    banned_token_ids: Ids | None = None
    bad_words: Annotated[list[Short], Meta(max_length=128)] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop: Short | Stop | None = None
    stop_token_ids: Annotated[Ids, Meta(max_length=128)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    prediction: Prediction | None = None
    speculation: str | Object | None = None
    trace: bool = False
    cache_salt: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None
    plugin_processors: dict[str, Object] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: Object | None = None
    guided_json: Object | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    return_token_ids: bool = False
    parallel_tool_calls: bool | None = None


class ChatRequest(Sampling, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: str | Object | None = None
    chat_template_kwargs: Object | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class ResponseTool(msgspec.Struct):
    """A function, as the responses API writes it."""

    type: Literal["function"]
    name: Short
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None


class InputItem(msgspec.Struct):
    """A message, a call that the model made, or what the call gave."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: str | None = None
    content: str | list[TextPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[TextPart] | None = None


class TextOptions(msgspec.Struct, forbid_unknown_fields=True):
    """How the text is to be formed."""

    format: ResponseFormat | None = None
    verbosity: Literal["medium"] | None = None


Metadata: TypeAlias = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]
"""What a client wants to read again beside its answer."""


class ResponsesRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/responses. Nothing is kept: what went before comes with the input."""

    input: str | Annotated[list[InputItem], Meta(min_length=1)]
    model: str | None = None
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: float | None = None
    tools: Annotated[list[ResponseTool], Meta(max_length=128)] | None = None
    tool_choice: str | Object | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    metadata: Metadata | None = None
    seed: int | None = None
    speculation: str | Object | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None
    plugin_processors: dict[str, Object] | None = None


class CompletionRequest(Sampling, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/completions."""

    prompt: str | list[str | int | Ids]
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /detokenize."""

    tokens: Ids
    model: str | None = None


class LoadAdapterRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /v1/load_lora_adapter. `lora_path` lies below the server's lora_root."""

    lora_name: Annotated[str, Meta(min_length=1, max_length=128)]
    lora_path: Annotated[str, Meta(min_length=1, max_length=1024)]
    load_inplace: bool = False


class UnloadAdapterRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /v1/unload_lora_adapter."""

    lora_name: Annotated[str, Meta(min_length=1, max_length=128)]
    lora_int_id: int | None = None


def text_of(content: str | Sequence[TextPart] | None, param: str) -> str | None:
    """The text of a message or a prediction. Raises InvalidRequest for parts that are no text."""
    if content is None or isinstance(content, str):
        return content
    for part in content:
        if part.text is None or part.type not in ("text", "input_text", "output_text"):
            raise InvalidRequest(f"a part of type {part.type!r}: this server reads text only", param=param)
    return "".join(part.text or "" for part in content)
