"""The shared vocabulary.

target      the user's model
drafter     what guesses ahead
tree        the guess: a chain is a tree, no guess is the empty tree
root        the last committed token
row         one token in the packed forward
walk        verification of a tree against the target
accepted    tree tokens that the walk took
bonus       the token the walk ends on, the target's own
committed   accepted + bonus
acceptance length   committed tokens per verify step, bonus included
p, q        the target's processed distribution, a drafter's

Everything here is frozen and complete when built.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import msgspec

from specgen.errors import InvalidRequest

if TYPE_CHECKING:
    from torch import FloatTensor, LongTensor, Tensor
    from transformers import PreTrainedTokenizerBase


class LogitsProcessor(Protocol):
    """transformers' own protocol, used unchanged: those of transformers are such."""

    def __call__(self, input_ids: LongTensor, scores: FloatTensor, /) -> Tensor:
        """input_ids int64[1, n] and logits float32[1, vocab] to logits float32[1, vocab]."""


LogitsProcessorFactory: TypeAlias = Callable[..., LogitsProcessor]
"""`factory(tokenizer, **options) -> LogitsProcessor`.

Called once for each sequence that asks for the processor by name, so the processor may keep state. `options` are what
the request says; declare them as keywords, then Python itself refuses the unknown ones.
"""


class StoppingCriterion(Protocol):
    """transformers' protocol for a single sequence."""

    def __call__(self, input_ids: LongTensor, scores: FloatTensor, /) -> Tensor | bool:
        """Whether a text ends behind its last token: ids int64[1, n] and logits float32[1, vocab] to truth."""


Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Message: TypeAlias = Mapping[str, object]
Prompt: TypeAlias = "str | Sequence[int] | Sequence[Message] | Chat"
"""One prompt: text, token ids, or messages (`{"role": ..., "content": ...}`), with what their template wants or not."""
Prompts: TypeAlias = (
    "list[str] | list[list[int]] | list[list[Message]] | list[Chat] | "
    "tuple[str, ...] | tuple[Sequence[int], ...] | tuple[Sequence[Message], ...] | tuple[Chat, ...]"
)
"""Several prompts of one kind: a list or a tuple of them."""
FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "error"]


class Tokenizer(Protocol):
    """What a tokenizer must have; those of transformers do. A chat template, special tokens and the rest of theirs are
    used where they are there."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text."""

    def decode(self, token_ids: list[int], **kwargs: bool) -> str:
        """The text of ids; `skip_special_tokens` and `clean_up_tokenization_spaces` are given."""


AnyTokenizer: TypeAlias = "Tokenizer | PreTrainedTokenizerBase"

_SHOWN = 80

MAX_TREE_NODES = 63
"""So that a row's ancestors, the root included, fit one 64-bit mask."""


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages, and what their chat template may want besides.

    tools: the functions that the model may call, as JSON schemas in OpenAI's form. options: further variables of the
    template (`enable_thinking`), and `add_generation_prompt` and `continue_final_message` of transformers.
    literal: the tokenizer's special tokens in what the messages say are spelt out, so that nobody writes an end of
    turn; otherwise they are read as in transformers.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, object]] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    literal: bool = False


class Speculation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one request drafts.

    drafters: names; `None` means all that the engine has. Guesses are merged: the order decides exact ties alone.
    max_nodes: most tree nodes per step, 0 to 63; 0 turns drafting off.
    adaptive: take only nodes that pay by the measured cost of rows. `False` takes all that are offered.
    """

    drafters: tuple[str, ...] | None = None
    max_nodes: int = MAX_TREE_NODES
    adaptive: bool = True

    def __post_init__(self) -> None:
        whole = isinstance(self.max_nodes, int) and not isinstance(self.max_nodes, bool)
        if not whole or not 0 <= self.max_nodes <= MAX_TREE_NODES:
            raise InvalidRequest(
                f"speculation.max_nodes is {self.max_nodes!r}; it must be 0 to {MAX_TREE_NODES}", param="speculation"
            )

    @classmethod
    def of(cls, value: Literal["auto", "off"] | Mapping[str, object] | Speculation) -> Speculation:
        """Read what a user may write: `"auto"`, `"off"`, a mapping of the fields, or a `Speculation`.

        Raises InvalidRequest for anything else.
        """
        if isinstance(value, Speculation):
            return value
        if value == "auto":
            return cls()
        if value == "off":
            return cls(max_nodes=0)
        if isinstance(value, Mapping):
            try:
                return msgspec.convert(dict(value), cls)
            except msgspec.ValidationError as error:
                known = ", ".join(cls.__struct_fields__)
                raise InvalidRequest(f"speculation: {error}; fields: {known}", param="speculation") from None
        raise InvalidRequest(
            f"speculation is {value!r}; choices: 'auto', 'off', or a mapping of drafters, max_nodes, adaptive",
            param="speculation",
        )


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a request's text must look like: the name of a kind that a plugin offers, and its value as JSON, so that
    nobody can change it any more and the order of a schema's properties stays. `param` is the field that asked for
    it, which errors name."""

    kind: str
    json: str
    param: str = field(default="constraint", compare=False)

    @classmethod
    def of(cls, value: str | Mapping[str, object] | Constraint, *, param: str = "constraint") -> Constraint:
        """Read what a user may write: `{"json_schema": {...}}`, or `"json_object"` for a kind without a value.

        Raises InvalidRequest for anything else.
        """
        if isinstance(value, Constraint):
            return value
        (name, given), *more = value.items() if isinstance(value, Mapping) and value else [(value, None)]
        if more or not isinstance(name, str) or not name:
            raise InvalidRequest(
                f"{param} is {value!r}; it must be one kind and its value, as {{'json_schema': {{...}}}}", param=param
            )
        try:
            return cls(name, json.dumps(given, allow_nan=False), param)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"{param} {name!r} must hold JSON: {error}", param=param) from None

    @property
    def value(self) -> Json:
        """The value, made anew."""
        value: Json = json.loads(self.json)
        return value


@dataclass(frozen=True, slots=True)
class TokenTree:
    """A drafter's guess: node i holds `tokens[i]` under node `parents[i]`; -1 is the root, the last committed token.

    Always `parents[i] < i`, and no two children of one node hold the same token. `confidence[i]` is the drafter's
    estimate, 0 to 1, that the node is right given that its parent is; all ones where the drafter has none.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    confidence: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)


EMPTY_TREE = TokenTree()


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probabilities of one committed token under the unprocessed model: its own and the `top` most likely."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What a walk took: `committed` = accepted tokens in order, then the bonus; `nodes` are the accepted tree nodes.

    `finish` is set when a stop rule ended the walk at the last committed token.
    """

    committed: tuple[int, ...]
    nodes: tuple[int, ...]
    logprobs: tuple[Logprob, ...] = ()
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class Finish:
    """Why a sequence ended; `stop` is the token id or the string that ended it, if one did. is_callers_error: as in
    `Result`."""

    reason: FinishReason
    stop: int | str | None = None
    error: BaseException | None = None
    is_callers_error: bool = False


@dataclass(frozen=True, slots=True)
class DraftTrace:
    """The tree that a step verified for one sequence: `drafters[i]` names who guessed node i, `accepted` are the nodes
    that the walk took."""

    tree: TokenTree
    drafters: tuple[tuple[str, ...], ...]
    accepted: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step added to one sequence. `text` is safe to show: it never ends inside a character or a stop string.
    `result` is set with the last output of a sequence, `trace` where the request asks for it and a tree was walked."""

    request_id: str
    index: int
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[Logprob, ...] = ()
    result: Result | None = None
    trace: DraftTrace | None = None


@dataclass(frozen=True, slots=True)
class SpeculativeStats:
    """Acceptance of one sequence, under vLLM's per-request names. Lengths include the bonus token.

    A step is a verify step: one forward that committed tokens. Steps without a draft count too, so
    `mean_acceptance_length` is committed tokens per target forward after the prompt.
    """

    num_spec_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    per_step_accepted: tuple[int, ...] = ()
    per_step_drafted: tuple[int, ...] = ()
    by_drafter: Mapping[str, DrafterStats] = field(default_factory=dict)

    @property
    def mean_acceptance_length(self) -> float:
        """Committed tokens per verify step, bonus included; 0 before the first step."""
        steps = self.num_spec_steps
        return (self.num_accepted_draft_tokens + steps) / steps if steps else 0.0

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted draft tokens over verified draft tokens; 0 when nothing was drafted."""
        return self.num_accepted_draft_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def acceptance_histogram(self) -> tuple[int, ...]:
        """`histogram[k]` = verify steps that accepted exactly k draft tokens."""
        longest = max(self.per_step_accepted, default=-1)
        return tuple(self.per_step_accepted.count(k) for k in range(longest + 1))


@dataclass(frozen=True, slots=True)
class DrafterStats:
    """One drafter's share in one request: nodes it offered, nodes of it verified, tokens of it accepted, why it was
    switched off if it was, and the steps in which it was asked. What several offered counts for each of them."""

    offered: int = 0
    verified: int = 0
    accepted: int = 0
    disabled: str | None = None
    asked: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request, under OpenAI's names. `cached_tokens` of the prompt were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt plus completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Result:
    """A finished generation. `ids` holds the committed tokens, the stop token included; `text` stops before a stop
    string and skips special tokens. is_callers_error: whether `error` is what a processor or a stopping criterion of
    the request raised."""

    request_id: str
    index: int
    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    stop: int | str | None
    usage: Usage
    stats: SpeculativeStats
    seed: int
    logprobs: tuple[Logprob, ...] = ()
    error: BaseException | None = None
    is_callers_error: bool = False

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= _SHOWN else f"{self.text[:_SHOWN]}..."
        speed = f"{self.stats.mean_acceptance_length:.2f} tokens per forward"
        failure = f", {self.error!r}" if self.error else ""
        return f"<Result {text!r}, {self.finish_reason}, {len(self.ids)} tokens, {speed}{failure}>"
