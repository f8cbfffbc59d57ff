"""One sequence of a request: its ids, its KV, its text. The only object that changes, in one place, all or nothing."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from specgen._base.log import Log
from specgen.draft.manager import DraftState
from specgen.engine.detokenizer import IncrementalDetokenizer
from specgen.engine.request import Request, StopRules
from specgen.kv.lease import Lease
from specgen.kv.pool import BlockTable
from specgen.kv.radix_tree import CacheKey
from specgen.model.segment import Segment, tree_segment
from specgen.sampling.constraint import Constrained
from specgen.sampling.sampler import Sampler, logprob
from specgen.sampling.verify import acceptance
from specgen.types import (
    Acceptance,
    Finish,
    Logprob,
    Result,
    SpeculativeStats,
    StepOutput,
    TokenTree,
    Usage,
)

if TYPE_CHECKING:
    from torch import FloatTensor, LongTensor

log = Log("specgen.engine")


class Verified(NamedTuple):
    """What a verified tree leaves to be committed: the tokens, and the detokenizer and the text behind them."""

    accepted: Acceptance
    cursor: IncrementalDetokenizer
    text: str


class Sequence:
    """The mutable state of one sample of one request. Changed by `adopt`, `prefilled`, `commit`, `restart`, `end`."""

    def __init__(
        self,
        request: Request,
        index: int,
        *,
        sampler: Sampler,
        stops: StopRules,
        cursor: IncrementalDetokenizer,
        constraint: Constrained | None,
        drafts: DraftState,
        table: BlockTable,
        key: CacheKey,
    ) -> None:
        self.request = request
        self.index = index
        self.sampler = sampler
        self.stops = stops
        self.cursor = cursor
        self.constraint = constraint
        self.drafts = drafts
        self.table = table
        self.key = key
        self.adapter = request.adapter
        self.cached_tokens: int | None = None
        self.ids = list(request.ids)
        self.finish: Finish | None = None
        # Few look at ids as a tensor: those behind `_buffered` are put there when somebody does.
        self._buffer = torch.tensor([self.ids], device=table.pool.device)
        self._buffered = len(self.ids)
        self._text: list[str] = []
        self._logprobs: list[Logprob] = []
        self._accepted: list[int] = []
        self._drafted: list[int] = []

    @property
    def pending(self) -> int:
        """Committed tokens whose KV is not computed yet; 1 while decoding."""
        return len(self.ids) - self.table.length

    @property
    def deepest_draft(self) -> int:
        """Draft tokens that could still be committed before the length ends the sequence."""
        return self.stops.max_length - len(self.ids) - 1

    def adopt(self, lease: Lease) -> None:
        """Begin on a cached prefix. What the first admission finds is what usage reports."""
        self.table.adopt(lease.pages, lease.tokens)
        if self.cached_tokens is None:
            self.cached_tokens = lease.tokens

    def restart(self, table: BlockTable) -> None:
        """Go on with an empty table: what was committed is pending again."""
        self.table = table

    def rows(self, chain: int, tree: TokenTree) -> Segment:
        """The next `chain` pending tokens as rows, and below them, if they are all that is pending, the tree."""
        start = self.table.length
        weights = self.adapter.resident if self.adapter else None
        if chain < self.pending:
            return Segment(self.table, self.ids[start : start + chain], range(start, start + chain), adapter=weights)
        return tree_segment(self.table, self.ids[start:], tree.tokens, tree.parents, weights)

    def verify(self, tree: TokenTree, logits: Tensor, tokens: Ids[int] | None) -> Verified:
        """Walk down `tree` given the logits [nodes + 1, vocab] of the root and each node.

        tokens: the token drawn at each row, `None` where the sampler draws them one by one. Ids, KV and text stay as
        they are until `commit`, which takes what this returns; the constraint's matcher and stateful processors move on
        with each token that is drawn.
        Raises what a processor raises, UserCodeRaised for processors and stopping criteria of the caller's.
        """
        scan = _Scan(self, logits, tokens)
        top = self.request.params.logprobs
        score = None if top is None else lambda node, token: logprob(logits[node + 1], token, top)
        accepted = acceptance(tree, scan.draw, score)
        return Verified(accepted, *scan.text(accepted.finish))

    def prefilled(self, num_tokens: int) -> None:
        """Take in a chunk of the prompt, behind which nothing was drawn."""
        self.table.commit(num_tokens)

    def commit(self, chain: int, drafted: int, verified: Verified) -> StepOutput:
        """Take in what `verify` found over `chain` pending rows and a tree of `drafted` nodes: ids, KV, text, end."""
        accepted, cursor, text = verified
        self.table.commit(chain, [chain + node for node in accepted.nodes])
        self.ids.extend(accepted.committed)
        self.cursor = cursor
        self._text.append(text)
        self._logprobs.extend(accepted.logprobs)
        self._accepted.append(len(accepted.nodes))
        self._drafted.append(drafted)
        self.finish = accepted.finish
        result = self._result(self.finish) if self.finish else None
        return StepOutput(self.request.id, self.index, accepted.committed, text, accepted.logprobs, result)

    def end(self, finish: Finish) -> StepOutput:
        """End the sequence where it stands, for another reason than a stop rule."""
        self.finish = finish
        return self.cut(finish)

    def cut(self, finish: Finish) -> StepOutput:
        """The last output if the sequence ended here; it may go on. Raises nothing: who ends what failed needs it."""
        try:
            text = self.cursor.flush()
        except Exception as error:  # the tokenizer is somebody else's code, and may be what failed
            log.warning("the end of a text cannot be decoded", request=self.request.id, error=repr(error))
            text = ""
        return StepOutput(self.request.id, self.index, (), text, (), self._result(finish, text))

    def _result(self, finish: Finish, rest: str = "") -> Result:
        """The generation as far as it came, with `rest` as the end of its text."""
        prompt = len(self.request.ids)
        stats = SpeculativeStats(
            num_spec_steps=len(self._accepted),
            num_draft_tokens=sum(self._drafted),
            num_accepted_draft_tokens=sum(self._accepted),
            per_step_accepted=tuple(self._accepted),
            per_step_drafted=tuple(self._drafted),
            by_drafter=self.drafts.stats(),
        )
        return Result(
            request_id=self.request.id,
            index=self.index,
            text="".join((*self._text, rest)),
            ids=tuple(self.ids[prompt:]),
            finish_reason=finish.reason,
            stop=finish.stop,
            usage=Usage(prompt, len(self.ids) - prompt, self.cached_tokens or 0),
            stats=stats,
            seed=self.request.seed,
            logprobs=tuple(self._logprobs),
            error=finish.error,
            is_callers_error=finish.is_callers_error,
        )

    def ids_with(self, path: Ids[int]) -> Tensor:
        """int64[1, n]: the ids and `path` behind them. Valid for good where the path is committed later."""
        length = len(self.ids) + len(path)
        if self._buffer.shape[1] < length:
            grown = self._buffer.new_zeros(1, 2 * length)
            grown[:, : self._buffer.shape[1]] = self._buffer
            self._buffer = grown
        if self._buffered < length:
            self._buffer[0, self._buffered : length] = torch.tensor([*self.ids[self._buffered :], *path])
        self._buffered = len(self.ids)
        return self._buffer[:, :length]


@dataclass(slots=True)
class _Scan:
    """One walk's view of a sequence: the path drawn so far and the text it makes. Thrown away after the commit."""

    sequence: Sequence
    logits: Tensor
    tokens: Ids[int] | None
    path: list[int] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    cursor: IncrementalDetokenizer | None = None

    def draw(self, node: int) -> tuple[int, Finish | None]:
        """Draw the token of `node`'s row and see whether the sequence ends with it."""
        if self.tokens is not None:
            token = self.tokens[node + 1]
        else:
            token = self.sequence.sampler.draw(self.sequence.ids_with(self.path), self._row(node))
        self.path.append(token)
        return token, self._finish(token, node)

    def _finish(self, token: int, node: int) -> Finish | None:
        sequence, stops = self.sequence, self.sequence.stops
        length = len(sequence.ids) + len(self.path)
        if token in stops.end_ids and length > stops.min_length:
            return Finish("stop", token)
        if sequence.cursor.stop and (string := self._advance([token])):
            return Finish("stop", string)
        if stops.criteria:
            ids = cast("LongTensor", sequence.ids_with(self.path))
            row = cast("FloatTensor", self._row(node))
            if any(bool(torch.as_tensor(stop(ids, row)).any()) for stop in stops.criteria):
                return Finish("stop")
        if sequence.constraint and sequence.constraint.advance(token):
            return Finish("stop")
        return Finish("length") if length >= stops.max_length else None

    def _row(self, node: int) -> Tensor:
        """float32[1, vocab], a copy: the caller's code may write into it, log-probabilities are of the row as it is."""
        return self.logits[node + 1 : node + 2].to(torch.float32, copy=True)

    def _advance(self, tokens: Ids[int]) -> str | None:
        self.cursor, text, string = (self.cursor or self.sequence.cursor).advance(tokens)
        self.shown.append(text)
        return string

    def text(self, finish: Finish | None) -> tuple[IncrementalDetokenizer, str]:
        """The cursor behind the path and the text to show for it. End ids never show."""
        if not self.sequence.cursor.stop:
            ended = finish is not None and finish.reason == "stop" and finish.stop is not None
            self._advance(self.path[:-1] if ended else self.path)
        cursor = self.cursor or self.sequence.cursor
        stopped_by_string = finish is not None and isinstance(finish.stop, str)
        if finish is not None and not stopped_by_string:
            self.shown.append(cursor.flush())
        return cursor, "".join(self.shown)
