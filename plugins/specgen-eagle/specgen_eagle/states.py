"""What the target computes over the corpus, kept on disk: hidden states once, read many times."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import torch
from torch import Tensor

from specgen_eagle.corpus import Conversation

_ROWS = 4096

Padded: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""ids int64[batch, longest], states [batch, longest, layers, width], and lengths int64[batch]."""


@dataclass(frozen=True)
class States:
    """Rows of all conversations, one behind the other.

    ids: int64[rows]. states: [rows, layers, width] in the target's dtype; the last layer is what its head reads.
    starts: first row of each conversation, and behind the last one the number of rows.
    """

    ids: Tensor
    states: Tensor
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def length(self, conversation: int) -> int:
        """Rows of a conversation."""
        return self.starts[conversation + 1] - self.starts[conversation]

    def padded(self, conversations: Sequence[int]) -> Padded:
        """Rows of some conversations; zeros behind the shorter ones."""
        lengths = torch.tensor([self.length(c) for c in conversations])
        ids = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64)
        states = torch.zeros(*ids.shape, *self.states.shape[1:], dtype=self.states.dtype)
        for row, conversation in enumerate(conversations):
            span = slice(self.starts[conversation], self.starts[conversation + 1])
            ids[row, : lengths[row]] = self.ids[span]
            states[row, : lengths[row]] = self.states[span]
        return ids, states, lengths


def open_states(
    model: Any, corpus: Sequence[Conversation], layers: Sequence[int], path: Path, told: Callable[[int], None]
) -> States:
    """The states of `corpus`, computed unless `path` holds them; tells the rows done so far.

    layers: as transformers counts `hidden_states`; the last, which the target's head reads, comes by itself.
    """
    starts = [0]
    for conversation in corpus:
        starts.append(starts[-1] + len(conversation.ids))
    config = model.config.get_text_config(decoder=True)
    kept = (*layers, config.num_hidden_layers)
    shape = (starts[-1], len(kept), config.hidden_size)
    ids = torch.tensor([i for c in corpus for i in c.ids])
    digest = hashlib.sha256(msgspec.json.encode([conversation.ids for conversation in corpus])).hexdigest()
    said = {"rows": starts[-1], "layers": kept, "width": config.hidden_size, "dtype": str(model.dtype), "ids": digest}
    key = msgspec.json.encode(said)
    done = path.with_suffix(".json")
    there = path.exists() and done.exists() and done.read_bytes() == key
    done.unlink(missing_ok=True)
    size = shape[0] * shape[1] * shape[2]
    states = torch.from_file(str(path), shared=True, size=size, dtype=model.dtype).view(shape)
    if not there:
        for rows in _fill(model, corpus, starts, kept, states):
            told(rows)
    done.write_bytes(key)
    return States(ids, states, tuple(starts))


@torch.inference_mode()
def _fill(
    model: Any, corpus: Sequence[Conversation], starts: Sequence[int], kept: Sequence[int], states: Tensor
) -> Iterator[int]:
    """Conversations of similar length at once."""
    order = sorted(range(len(corpus)), key=lambda c: len(corpus[c].ids))
    done = 0
    for batch in batches(order, [len(c.ids) for c in corpus], _ROWS):
        longest = max(len(corpus[c].ids) for c in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, c in enumerate(batch):
            ids[row, : len(corpus[c].ids)] = torch.tensor(corpus[c].ids)
            mask[row, : len(corpus[c].ids)] = 1
        # Logits of one row: the head over a large vocabulary costs as much as many layers.
        answer = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, logits_to_keep=1)
        for row, c in enumerate(batch):
            length = len(corpus[c].ids)
            for place, layer in enumerate(kept):
                states[starts[c] : starts[c] + length, place] = answer.hidden_states[layer][row, :length]
            done += length
        yield done


def batches(order: Sequence[int], lengths: Sequence[int], rows: int) -> list[list[int]]:
    """`order` cut into pieces that take at most `rows` rows, each padded to its longest; at least one in each."""
    cut: list[list[int]] = []
    longest = 0
    for item in order:
        longest = max(longest, lengths[item])
        if not cut or (len(cut[-1]) + 1) * longest > rows:
            cut.append([])
            longest = lengths[item]
        cut[-1].append(item)
    return cut
