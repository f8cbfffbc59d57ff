"""The processors and criteria of one row, called as transformers' own loop calls them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import logits_process
from transformers.generation.streamers import BaseStreamer

from specgen.errors import RequestFailed

_STATELESS = """
    EpsilonLogitsWarper EtaLogitsWarper ExponentialDecayLengthPenalty ForcedBOSTokenLogitsProcessor
    ForcedEOSTokenLogitsProcessor InfNanRemoveLogitsProcessor LogitNormalization MinLengthLogitsProcessor
    MinNewTokensLengthLogitsProcessor MinPLogitsWarper NoBadWordsLogitsProcessor NoRepeatNGramLogitsProcessor
    RepetitionPenaltyLogitsProcessor SequenceBiasLogitsProcessor SuppressTokensAtBeginLogitsProcessor
    SuppressTokensLogitsProcessor TemperatureLogitsWarper TopHLogitsWarper TopKLogitsWarper TopPLogitsWarper
    TypicalLogitsWarper WatermarkLogitsProcessor
"""
"""transformers' processors that treat each row by itself and remember nothing between two calls."""
_KINDS = {getattr(logits_process, name) for name in _STATELESS.split() if hasattr(logits_process, name)}
_ENDS = (EosTokenCriteria, MaxLengthCriteria)


def is_stateless(function: object, rows: int) -> bool:
    """Whether a processor or criterion is one of transformers' own that looks at each of the rows by itself and
    remembers nothing, so that it does not matter how often, in which order and with which other rows it is called."""
    ignored = getattr(function, "prompt_ignore_length", None)
    if isinstance(ignored, Tensor) and len(ignored) != rows:
        return False
    return type(function) in _KINDS or type(function) in (*_ENDS, StopStringCriteria)


def is_end(criterion: object) -> bool:
    """Whether an engine has a stop rule of its own that does the same."""
    return type(criterion) in _ENDS


def stateless_calls(functions: Sequence[object], row: int, padding: Tensor) -> tuple[object, ...]:
    """Stateless processors or criteria as they act on one row of a batch, with int64[1, n] of padding."""
    of_row = [_of_row(function, row) for function in functions]
    return tuple(PaddedCall(function, padding) if padding.numel() else function for function in of_row)


def _of_row(function: Any, row: int) -> object:
    """The processor, or one like it that holds the row's entry alone where it has one for each."""
    ignored = getattr(function, "prompt_ignore_length", None)
    if isinstance(ignored, Tensor):
        return RepetitionPenaltyLogitsProcessor(function.penalty, prompt_ignore_length=ignored[row : row + 1])
    return function


class PaddedCall:
    """A stateless processor or criterion that sees a row with its left padding, as transformers shows it.

    padding: int64[1, n].
    """

    def __init__(self, function: Any, padding: Tensor) -> None:
        self._function = function
        self._padding = padding

    def __call__(self, ids: Tensor, scores: Tensor) -> Any:
        """What the function says of int64[1, n] and float32[1, vocab]."""
        return self._function(torch.cat([self._padding.to(ids.device), ids], dim=1), scores)


class RowCalls:
    """A batch of one row: everything of the caller's is called in the order of `generate`'s loop, on its own objects.

    The engine calls `process` before it draws a token and `stop` behind it, on its own thread. What the caller's code
    raises there is kept in `error`, whatever it is, and ends the row.
    padding: int64[1, n]. scores, logits: float32[1, vocab] of each step as they were asked for, None if they were not.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        padding: Tensor,
        config: GenerationConfig,
        streamer: BaseStreamer | None,
    ) -> None:
        self._process: Any = processors
        self._criteria = criteria
        self._padding = padding
        self._streamer = streamer
        self._inference = torch.is_inference_mode_enabled()
        recorded = bool(config.return_dict_in_generate)
        self.scores: tuple[Tensor, ...] | None = () if recorded and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if recorded and config.output_logits else None
        self.error: BaseException | None = None

    def process(self, ids: Tensor, logits: Tensor) -> Tensor:
        """The processed scores float32[1, vocab] of the token behind `ids` int64[1, n]. May write into `logits`."""
        with self._callers_code():
            logits = logits.to(self._padding.device)
            scores: Tensor = self._process(self._padded(ids), logits)
            # Both after the processors: transformers hands out what those that write in place have left.
            if self.scores is not None:
                self.scores += (scores,)
            if self.logits is not None:
                self.logits += (logits,)
            return scores.to(ids.device)

    def stop(self, ids: Tensor, _: Tensor) -> bool:
        """Whether the row ends behind `ids` int64[1, n]. Every criterion is asked, then the streamer gets the token."""
        with self._callers_code():
            padded = self._padded(ids)
            ended = bool(self._criteria(padded, self.scores).all())
            if self._streamer is not None:
                self._streamer.put(padded[0, -1:].cpu())
            return ended

    def _padded(self, ids: Tensor) -> Tensor:
        return torch.cat([self._padding, ids.to(self._padding.device)], dim=1)

    @contextmanager
    def _callers_code(self) -> Iterator[None]:
        try:
            with torch.inference_mode(self._inference):
                yield
        except BaseException as error:  # not even SystemExit may end the engine's thread, which serves others too
            self.error = error
            raise RequestFailed(f"a processor, criterion or streamer raised {error!r}") from error
