"""What drafters are shown of the target's forward is what transformers says about the same text, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specgen import Drafter, DraftHints, DraftSession, Features, InvalidRequest, TokenTree, UnsupportedModel, Wanted
from specgen.kernels.cpu_backend import why_not
from specgen.model.runner import load_runner
from specgen.types import EMPTY_TREE
from tests.support.bench import PROMPTS, Bench, echoes
from tests.support.tiny import build

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = (0, 2, 3)
SUCCESSORS = 4


class Curious(Drafter):
    """Drafts nothing and keeps all it is shown."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.sessions: list[CuriousSession] = []

    def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
        self.sessions.append(CuriousSession(prompt))
        return self.sessions[-1]


class CuriousSession(DraftSession):
    def __init__(self, prompt: Sequence[int]) -> None:
        self.ids = list(prompt)
        self.prompt = len(prompt)
        self.seen: list[Features] = []

    def propose(self, max_nodes: int) -> TokenTree:
        return EMPTY_TREE

    def observe(self, features: Features) -> None:
        self.seen.append(features)

    def commit(self, tokens: Sequence[int]) -> None:
        self.ids.extend(tokens)


@torch.inference_mode()
def alone(model: PreTrainedModel, ids: Sequence[int]) -> tuple[tuple[Tensor, ...], Tensor]:
    output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return output.hidden_states, output.logits[0]


def check(model: PreTrainedModel, session: CuriousSession) -> set[int]:
    """All that the session saw is what transformers says; the positions that it saw."""
    hidden, logits = alone(model, session.ids)
    positions = set()
    for features in session.seen:
        for layer in LAYERS:
            rows = features.hidden[layer]
            start = features.position
            torch.testing.assert_close(rows, hidden[layer][0, start : start + len(rows)], rtol=1e-3, atol=1e-4)
        positions |= set(range(features.position, features.position + len(features.hidden[0])))
        if not features.asked:
            continue
        assert features.successors is not None
        assert features.scores is not None
        assert features.successors.shape == features.scores.shape == (len(features.asked), SUCCESSORS)
        for ids, scores in zip(features.successors, features.scores, strict=True):
            assert scores.tolist() == sorted(scores.tolist(), reverse=True)
            assert len(set(ids.tolist())) == SUCCESSORS
        root = max(features.position, session.prompt - 1)
        assert features.asked[0] == session.ids[root]
        torch.testing.assert_close(features.scores[0], logits[root].topk(SUCCESSORS).values, rtol=1e-3, atol=1e-4)
        assert features.successors[0].tolist() == logits[root].topk(SUCCESSORS).indices.tolist()
    return positions


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_drafters_see_what_transformers_says(family: str) -> None:
    model = build(family)
    curious = Curious(Wanted(LAYERS, SUCCESSORS))
    bench = Bench(model, {"curious": curious, "echo": echoes(0.7)}, max_prefill_tokens=3)
    for prompt in PROMPTS[:4]:
        said = bench.alone(prompt, max_tokens=12, speculation="off").ids
        bench.add(prompt, max_tokens=12, prediction=said, speculation={"adaptive": False})
    bench.run()
    sessions = [session for session in curious.sessions if session.seen]
    assert len(sessions) == 4
    for session in sessions:
        assert check(model, session) == set(range(len(session.ids) - 1)), "every row but the last token's is shown"
        assert any(len(features.asked) > len(features.hidden[0]) for features in session.seen), "trees had wrong nodes"


def test_a_request_without_the_drafter_shows_nothing() -> None:
    model = build("llama")
    curious = Curious(Wanted(LAYERS, SUCCESSORS))
    bench = Bench(model, {"curious": curious, "echo": echoes(0.7)})
    bench.alone(PROMPTS[0], max_tokens=8, speculation={"drafters": ("echo",)})
    assert not curious.sessions


def test_an_observer_that_raises_is_switched_off() -> None:
    class Broken(Curious):
        def open(self, prompt: Sequence[int], hints: DraftHints) -> DraftSession:
            session = super().open(prompt, hints)

            def observe(features: Features) -> None:
                raise ValueError("cannot look")

            session.observe = observe  # type: ignore[method-assign]
            return session

    model = build("llama")
    bench = Bench(model, {"curious": Broken(Wanted((1,), 2))})
    expected = bench.alone(PROMPTS[0], max_tokens=8, speculation="off")
    result = bench.alone(PROMPTS[0], max_tokens=8)
    assert result.ids == expected.ids
    assert "cannot look" in (result.stats.by_drafter["curious"].disabled or "")


@pytest.mark.skipif(why_not() is not None, reason=f"no CPU kernels: {why_not()}")
def test_a_compiled_forward_shows_the_same() -> None:
    model = build("llama")
    curious = Curious(Wanted(LAYERS, SUCCESSORS))
    bench = Bench(model, {"curious": curious, "echo": echoes(0.7)}, compile=True)
    assert bench.target.compiled
    said = bench.alone(PROMPTS[0], max_tokens=12, speculation="off").ids
    bench.alone(PROMPTS[0], max_tokens=12, prediction=said, speculation={"adaptive": False})
    [session] = [session for session in curious.sessions if session.seen]
    assert check(model, session) == set(range(len(session.ids) - 1))


@pytest.mark.parametrize("layers", [(-1,), (4,)])
def test_a_layer_that_there_is_not_is_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match="there are 0 to 3"):
        load_runner(build("llama"), kv_tokens=64, layers=layers)


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    model: Any = build("llama")
    model.config.num_hidden_layers = 2
    with pytest.raises(UnsupportedModel, match="has no list of 2 layers"):
        load_runner(model, kv_tokens=64, layers=(1,))
