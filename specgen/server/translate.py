"""From the fields of a request to the engine's own terms."""

from __future__ import annotations

from typing import Any

import msgspec

from specgen.api.engine import Engine
from specgen.sampling.params import SamplingParams
from specgen.server.auth import Caller
from specgen.server.config import ServerConfig
from specgen.server.constraints import constraint_of
from specgen.server.protocol.errors import invalid
from specgen.server.protocol.requests import ChatRequest, CompletionRequest, Message, Sampling, Tool, text_of
from specgen.types import Chat, Prompt

_SAME_NAME = (
    "top_p",
    "min_p",
    "typical_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "allowed_token_ids",
    "banned_token_ids",
    "bad_words",
    "min_tokens",
    "ignore_eos",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "speculation",
    "plugin_processors",
    "trace",
)
_FORMS = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
)
"""What says how a text is to be formed."""
_COMPLETION_TOKENS = 16
"""OpenAI's default for completions."""
_MOST_BIASED = 1024


class RequestTranslator:
    """Reads requests for one engine, whose model they call `name`; any other name that they may use is an adapter's."""

    def __init__(self, config: ServerConfig, name: str, engine: Engine) -> None:
        self._config = config
        self._name = name
        self._samples = bool(engine.target.model.generation_config.do_sample)

    def chat(self, asked: ChatRequest, caller: Caller) -> tuple[list[Prompt], SamplingParams]:
        """The prompt of a chat and its settings. Raises ApiError or InvalidRequest naming the field."""
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        if asked.top_logprobs and not asked.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
        most = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
        params = self._params(asked, caller, max_tokens=most, logprobs=logprobs)
        return [self._conversation(asked)], params

    def completion(self, asked: CompletionRequest, caller: Caller) -> tuple[list[Prompt], SamplingParams]:
        """The prompts of a completion and their settings."""
        most = _COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens
        if asked.echo and asked.logprobs is not None:
            raise invalid("echo with logprobs is not supported: the prompt has no log-probabilities", "echo")
        return self._prompts(asked), self._params(asked, caller, max_tokens=most, logprobs=asked.logprobs)

    def _params(
        self, asked: Sampling, caller: Caller, *, max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        if (asked.n or 1) > self._config.max_n:
            raise invalid(f"n is {asked.n}; at most {self._config.max_n}", "n")
        if asked.stream_options is not None and not asked.stream:
            raise invalid("stream_options needs stream: true", "stream_options")
        options: dict[str, object] = {name: getattr(asked, name) for name in _SAME_NAME}
        if asked.model not in (None, self._name):
            options["adapter"] = asked.model
        if asked.logit_bias is not None:
            options["logit_bias"] = _biases(asked.logit_bias)
        if asked.prediction is not None:
            options["prediction"] = text_of(asked.prediction.content, "prediction") or ()
        # Nobody's config says how to draw: then it is OpenAI's default, the model's distribution as it is.
        drawn = 1.0 if asked.temperature is None and not self._samples else asked.temperature
        options |= {
            "n": asked.n or 1,
            "temperature": drawn,
            # vLLM's "off" is -1.
            "top_k": asked.top_k and max(0, asked.top_k),
            "seed": None if asked.seed is None else asked.seed % 2**64,
            "max_tokens": max_tokens,
            "logprobs": logprobs,
            "cache_salt": caller.cache_salt(asked.cache_salt or ""),
            "constraint": constraint_of(msgspec.to_builtins({name: getattr(asked, name, None) for name in _FORMS})),
        }
        return SamplingParams.of(options)

    def _prompts(self, asked: CompletionRequest) -> list[Prompt]:
        prompt: Any = asked.prompt
        several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)
        prompts: list[Prompt] = list(prompt) if several else [prompt]
        if len(prompts) > self._config.max_prompts:
            raise invalid(f"{len(prompts)} prompts; at most {self._config.max_prompts}", "prompt")
        return prompts

    def _conversation(self, asked: ChatRequest) -> Chat:
        options = dict(asked.chat_template_kwargs or {})
        for name in options:
            if name not in self._config.template_options:
                choices = ", ".join(self._config.template_options) or "none"
                raise invalid(f"chat_template_kwargs holds {name!r}; choices: {choices}", "chat_template_kwargs")
        if asked.continue_final_message:
            if asked.add_generation_prompt:
                raise invalid("continue_final_message and add_generation_prompt exclude each other", None)
            options |= {"continue_final_message": True, "add_generation_prompt": False}
        elif asked.add_generation_prompt is not None:
            options["add_generation_prompt"] = asked.add_generation_prompt
        return conversation(asked.messages, asked.tools if asked.tool_choice != "none" else None, options)


def conversation(messages: list[Message], tools: list[Tool] | None, options: dict[str, Any]) -> Chat:
    """Messages as templates read them. Raises InvalidRequest for content that is no text."""
    return Chat(
        [_message(message, f"messages[{place}].content") for place, message in enumerate(messages)],
        # As OpenAI's own clients write them, which is what templates were trained on.
        tools=[{"type": tool.type, "function": msgspec.to_builtins(tool.function)} for tool in tools or ()],
        options=options,
        literal=True,
    )


def _message(message: Message, param: str) -> dict[str, object]:
    found: dict[str, Any] = msgspec.to_builtins(message)
    # Templates know no "developer", which is OpenAI's newer word.
    found["role"] = "system" if message.role == "developer" else message.role
    found["content"] = text_of(message.content, param) or ""
    for call in found.get("tool_calls", ()):
        try:
            # Templates write the arguments out themselves. Clients say "" for a call without any.
            call["function"]["arguments"] = msgspec.json.decode(call["function"]["arguments"] or "{}")
        except (msgspec.DecodeError, RecursionError):
            raise invalid("the arguments of a tool call are not JSON, or nested too deeply", "messages") from None
    return found


def _biases(asked: dict[str, float]) -> dict[int, float]:
    if len(asked) > _MOST_BIASED:
        raise invalid(f"logit_bias has {len(asked)} entries; at most {_MOST_BIASED}", "logit_bias")
    try:
        return {int(token): bias for token, bias in asked.items()}
    except ValueError:
        raise invalid("logit_bias: keys must be token ids", "logit_bias") from None
