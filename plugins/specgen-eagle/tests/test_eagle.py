"""The head as a drafter: exact, contract, checkpoints. The training: from nothing, resumed, better than looking up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from specgen_eagle import parallel
from specgen_eagle.checkpoint import load_head, save_head
from specgen_eagle.context_vocab import Borrowed, TargetRows, lender
from specgen_eagle.corpus import Conversation
from specgen_eagle.drafter import Eagle, Halves
from specgen_eagle.factory import eagle
from specgen_eagle.head import EagleHead
from specgen_eagle.head_student import new_head
from specgen_eagle.parallel_drafter import ParallelEagle, ParallelHalves, _tree
from specgen_eagle.recipe import HeadRecipe, Recipe
from specgen_eagle.unrolled import make_batch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from specgen import (
    DrafterMismatch,
    DrafterSetup,
    DraftHints,
    DraftSession,
    Engine,
    Features,
    InvalidRequest,
    Speculation,
    TokenTree,
)
from specgen.kernels.cpu_backend import why_not
from specgen.model.forward.compiled import compile_rows
from specgen.testing import DrafterContract
from specgen.tree import check, depths, path

VOCABULARY = 64
LAYERS = (1, 2, 3)
AHEAD = 4
ALWAYS = Speculation(adaptive=False, max_nodes=24)


def tiny(seed: int = 0, **fields: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    config = AutoConfig.for_model("llama", **{**sizes, **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
    return model


def untrained(model: PreTrainedModel, ahead: int = 1, vocabulary: int = 48) -> EagleHead:
    """The target's last layer. What a parallel one begins as nothing is something."""
    corpus = [Conversation([i % vocabulary for i in range(200)], 1)]
    head = new_head(model, Recipe(head=HeadRecipe(layers=LAYERS, vocabulary=vocabulary, parallel=ahead)), corpus)
    if ahead > 1:
        torch.nn.init.normal_(head.ahead.weight, std=0.1)
        torch.nn.init.normal_(head.transition.out_proj.weight, std=0.2)
    return head


def head_of(model: PreTrainedModel, folder: Path, ahead: int = 1) -> Path:
    save_head(untrained(model, ahead), folder, model, "tiny")
    return folder


def drafting(head: EagleHead, model: PreTrainedModel, width: int = 3) -> Eagle:
    embeddings, lending = model.get_input_embeddings().weight, lender(head, model.lm_head)
    if head.config.parallel > 1:
        return ParallelEagle(ParallelHalves(head, embeddings, width, AHEAD, lending))
    return Eagle(Halves(head, embeddings, width, lending), AHEAD)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny()


@pytest.fixture(scope="module", params=[1, AHEAD], ids=["eagle3", "parallel"])
def folder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return head_of(model, tmp_path_factory.mktemp("head"), request.param)


PROMPTS = [[3, 17, 42, 9], list(range(40)), [5, 6, 5, 6, 5, 6], [60] * 20]
SETTINGS = [{"temperature": 0}, {"temperature": 1.0, "seed": 7}]


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_text_is_the_targets(model: PreTrainedModel, folder: Path, compile: bool) -> None:
    """Alone, in a batch, behind a cached prefix, beside prompt lookup."""
    drafters = {"eagle": {"path": folder}, "prompt-lookup": {}}
    with Engine(model, drafters=drafters, kv_tokens=2048, compile=compile) as engine:
        for options in SETTINGS:
            plain = [engine.generate(p, max_tokens=40, speculation="off", **options).ids for p in PROMPTS]
            for names in (("eagle",), ("eagle", "prompt-lookup")):
                speculation = Speculation(adaptive=False, max_nodes=24, drafters=names)
                alone = [engine.generate(p, max_tokens=40, speculation=speculation, **options) for p in PROMPTS]
                assert [result.ids for result in alone] == plain
                assert sum(result.stats.by_drafter["eagle"].offered for result in alone) > 100
                assert [r.stats.by_drafter["eagle"].disabled for r in alone] == [None] * len(PROMPTS)
                batch = engine.generate(PROMPTS, max_tokens=40, speculation=speculation, **options)
                assert [result.ids for result in batch] == plain
        engine.check()


class TestContract(DrafterContract):
    vocab_size = VOCABULARY
    ahead = 1

    @pytest.fixture(autouse=True)
    def heads(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        # In float32 a batch rounds otherwise than its parts, and the last digit of a confidence shows it.
        self.model = tiny().double()
        self.folder = head_of(self.model, tmp_path_factory.mktemp("head"), self.ahead)

    def drafter(self) -> Eagle:
        head = load_head(self.folder, self.model)
        head.lm_head.weight.mul_(8)  # so that it is sure enough to draft on
        return fed(drafting(head, self.model))

    def test_it_drafts(self) -> None:
        with self.session((1, 2, 3)) as session:
            assert len(self.ask(session)) > 3


class TestParallelContract(TestContract):
    ahead = AHEAD


def fed(drafter: Eagle) -> Eagle:
    """Its sessions are shown made-up states of their own history, as a target would."""
    plain = type(drafter.open((1,), DraftHints()))
    drafter.open_sessions = 0

    class Fed(plain):  # type: ignore[misc, valid-type]
        def __init__(self, prompt: Sequence[int]) -> None:
            super().__init__(drafter, prompt)
            self._show(0, prompt)
            super().commit([prompt[-1] % VOCABULARY])
            self._at = len(prompt)

        def commit(self, tokens: Sequence[int]) -> None:
            self._show(self._at, [0] * len(tokens))
            self._at += len(tokens)
            super().commit(tokens)

        def _show(self, position: int, rows: Sequence[int]) -> None:
            generator = torch.Generator().manual_seed(position)
            shape = (len(rows), 32)
            states = {layer: torch.randn(shape, generator=generator, dtype=torch.float64) for layer in LAYERS}
            self.observe(Features(position, states))

    class FedDrafter(type(drafter)):  # type: ignore[misc]
        def open(self, prompt: Sequence[int], hints: object) -> Fed:
            self.open_sessions += 1
            return Fed(prompt)

    drafter.__class__ = FedDrafter
    return drafter


@pytest.mark.skipif(why_not() is not None, reason=f"no CPU kernels: {why_not()}")
@pytest.mark.parametrize("ahead", [pytest.param(1, marks=pytest.mark.slow), AHEAD])
def test_compiled_the_head_says_the_same(model: PreTrainedModel, ahead: int) -> None:
    head = untrained(model, ahead).requires_grad_(False)
    plain, quick = (drafting(head, model).halves for _ in range(2))
    quick.compile(compile_rows)
    assert quick.before is not plain.before
    assert quick.behind is not plain.behind
    words = torch.tensor([[-1, -1, 60, 61], [-1, -1, 62, -1]])
    for rows in (1, 2, 5, 17):
        numbers = torch.arange(rows)
        before = numbers * 3 % VOCABULARY, numbers + 9, torch.randn(rows, 32)
        asked = (numbers[-2:, None].expand(-1, 3).contiguous(),)
        if ahead > 1:
            lasts, order = numbers[-2:], torch.arange(rows + 2 * (ahead - 1)).flip(0)[-rows:].contiguous()
            before = *before[:2], torch.randn(rows, 3 * 32), lasts, order
            asked = before[0], numbers[-2:, None].expand(-1, ahead).contiguous()
        behind = torch.randn(4, rows, 8), torch.randn(rows, 32), *asked, words[: min(rows, 2)]
        with torch.inference_mode():
            for one, other in zip(quick.before(*before), plain.before(*before), strict=True):
                torch.testing.assert_close(one, other)
            for one, other in zip(quick.behind(*behind), plain.behind(*behind), strict=True):
                torch.testing.assert_close(one, other)


@pytest.mark.parametrize("ahead", [1, AHEAD])
def test_words_of_a_text_are_said_that_the_head_cannot_say(model: PreTrainedModel, ahead: int) -> None:
    """As by a head that can say them and no other ones; each text its own, in a batch too."""
    strange = [range(48, 64), range(48, 56), range(0)]
    texts = [[7, 8, *words, 9] for words in strange]
    random = torch.Generator().manual_seed(0)
    states = [torch.randn(len(text), 3 * 32, generator=random) for text in texts]

    def trees(numbers: Sequence[int], vocabulary: Sequence[int], lent: bool) -> list[TokenTree]:
        corpus = [Conversation([word for word in vocabulary for _ in range(2)], 1)]
        recipe = Recipe(head=HeadRecipe(layers=LAYERS, vocabulary=len(vocabulary), parallel=ahead))
        head = new_head(model, recipe, corpus).eval()
        assert head.tokens.tolist() == list(vocabulary)
        drafter = drafting(head.requires_grad_(False), model, width=8)
        if not lent:
            drafter.halves.lender = TargetRows(head, None)
        sessions = [drafter.open(texts[number], DraftHints()) for number in numbers]
        for number, session in zip(numbers, sessions, strict=True):
            layers = zip(LAYERS, states[number].split(32, dim=-1), strict=True)
            session.observe(Features(0, dict(layers)))
            session.commit([9])
        return drafter.propose(sessions, [60] * len(sessions))

    found = trees(range(3), range(48), lent=True)
    said = [{token for token in tree.tokens if token >= 48} for tree in found]
    assert said[0] & set(range(56, 64))
    assert said[1]
    assert said[1] <= set(strange[1])
    assert not said[2]
    for number, words in enumerate(strange):
        (alone,) = trees([number], [*range(48), *words], lent=False)
        assert (found[number].tokens, found[number].parents) == (alone.tokens, alone.parents)
        assert found[number].confidence == pytest.approx(alone.confidence, rel=1e-4)


def test_the_latest_tokens_of_a_text_are_borrowed() -> None:
    """One that is seen again is among the latest again."""

    class Anything(TargetRows):
        def __init__(self) -> None:
            self.device = torch.device("cpu")

        def lends(self, token: int) -> bool:
            return token > 0

    borrowed = Borrowed(Anything(), range(1, 257))
    words = borrowed.words
    borrowed.add([0, 1, 2])
    assert borrowed.words is words, "there is nothing new"
    borrowed.add([300, 301])
    assert borrowed.words.tolist() == [-1, -1, *range(5, 257), 1, 2, 300, 301]


def test_a_head_with_rows_of_its_own_borrows_nothing(model: PreTrainedModel) -> None:
    head = untrained(model).requires_grad_(False)
    assert lender(head, model.lm_head).lends(60)
    assert not lender(head, model.lm_head).lends(47)
    head.lm_head.weight.mul_(1.1)
    assert not lender(head, model.lm_head).lends(60)
    assert not lender(head, None).lends(60)


def test_an_output_layer_that_is_no_plain_one_lends_nothing(model: PreTrainedModel) -> None:
    head = untrained(model).requires_grad_(False)
    for weight in (model.lm_head.weight.to("meta"), model.lm_head.weight[:, :16], model.lm_head.weight.to(torch.int8)):
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
        assert not lender(head, layer).lends(60)


def test_a_parallel_tree_has_the_chances_that_training_gives(model: PreTrainedModel) -> None:
    """Node by node, along every path: the same entries, depths and tokens in between, in training and in drafting."""
    head = untrained(model, AHEAD, VOCABULARY).eval().requires_grad_(False)
    head.lm_head.weight.mul_(6)  # so that it is sure enough to draft on
    embeddings = model.get_input_embeddings().weight.detach()
    ids, root = [7, 3, 9, 30, 12, 5], 11
    states = torch.randn(len(ids), len(LAYERS) + 1, 32)
    session = drafting(head, model).open(ids, DraftHints())
    session.observe(Features(0, {layer: states[:, place] for place, layer in enumerate(LAYERS)}))
    session.commit([root])
    tree = session.propose(60)
    assert len(tree) > 10
    assert {len(path(tree, node)) for node in range(len(tree))} == set(range(1, AHEAD + 1))
    for node in range(len(tree)):
        drafted = [tree.tokens[on_path] for on_path in path(tree, node)]
        text = torch.tensor([[*ids, root, *drafted, 0]])
        seen = torch.zeros(1, text.shape[1], *states.shape[1:])
        seen[0, : len(ids)] = states
        batch = make_batch(embeddings, torch.zeros(VOCABULARY, 32), (text, seen, torch.tensor([text.shape[1]])))
        last = torch.tensor([len(ids) - 1])
        anchors = [torch.arange(batch.valid.shape[1]), *[last] * (len(drafted) - 1)]
        deepest = parallel.forward(head, batch, anchors)[-1]
        row = deepest.seeing[0, last if len(drafted) == 1 else 0]
        chance = head.logits(row).softmax(-1).flatten()[drafted[-1]]
        assert tree.confidence[node] == pytest.approx(float(chance), abs=1e-3)


LONG = [(7 * place) % VOCABULARY for place in range(160)]


def shown(drafter: Eagle, states: torch.Tensor, pieces: Sequence[int], ids: Sequence[int] = LONG) -> DraftSession:
    """A session that is shown `states` [rows, layers, width] of `ids` piece by piece, and then has a root."""
    session = drafter.open(ids, DraftHints())
    for start, stop in pairwise([0, *pieces, len(ids)]):
        session.observe(Features(start, {layer: states[start:stop, n] for n, layer in enumerate(LAYERS)}))
    session.commit([3])
    return session


@pytest.mark.parametrize("ahead", [1, AHEAD])
def test_of_a_long_text_the_last_entries_are_read(model: PreTrainedModel, ahead: int) -> None:
    """As if it began there, and no matter in what pieces it came."""
    head = untrained(model, ahead).requires_grad_(False)
    head.lm_head.weight.mul_(6)
    states = torch.randn(len(LONG), len(LAYERS), 32)
    drafter = drafting(head, model)
    drafter.window = 64
    whole = shown(drafter, states, [])
    tree = whole.propose(24)
    assert len(tree) > 5
    assert whole.reading.start == len(LONG) - 64
    for pieces in ([40, 80, 120], [150], [1, 2, 130]):
        again = shown(drafter, states, pieces).propose(24)
        assert (again.tokens, again.parents) == (tree.tokens, tree.parents)
        assert again.confidence == pytest.approx(tree.confidence, abs=1e-4)
    drafter.window = 256
    assert shown(drafter, states, []).propose(24).confidence != pytest.approx(tree.confidence, abs=1e-4)


def test_a_session_that_was_not_asked_for_long_begins_anew(model: PreTrainedModel) -> None:
    """It holds no more than two windows meanwhile, and goes on where it was asked in time."""
    drafter = drafting(untrained(model, AHEAD).requires_grad_(False), model)
    drafter.window = 64
    session = shown(drafter, torch.randn(len(LONG), len(LAYERS), 32), [])
    session.propose(4)
    place = len(LONG)
    for count in (60, 1, 100, 40):
        before = session.reading.start
        rows = torch.randn(count, 32)
        session.observe(Features(place, dict.fromkeys(LAYERS, rows)))
        session.commit([5] * count)
        place += count
        if count == 60:
            session.propose(4)
            assert session.reading.start == before
    assert session.reading.unread <= 2 * 64
    assert len(session.propose(4)) <= 4
    assert session.reading.start == place - 64
    assert session.reading.unread == 0


@pytest.mark.parametrize(("width", "depth", "vocabulary"), [(1, 1, 48), (1, 9, 100), (16, 2, 100), (7, 3, 20)])
def test_parallel_trees_of_any_shape_are_trees(width: int, depth: int, vocabulary: int) -> None:
    model = tiny(vocab_size=100)
    head = untrained(model, AHEAD, vocabulary).requires_grad_(False)
    head.lm_head.weight.mul_(12)
    drafter = ParallelEagle(ParallelHalves(head, model.get_input_embeddings().weight, width, depth))
    ids = [3, 9, 27, 14]
    tree = shown(drafter, torch.randn(4, len(LAYERS), 32), [2], ids).propose(63)
    check(tree, 100)
    assert len(tree) >= min(width, 2)
    assert max(depths(tree)) == min(depth, AHEAD)
    assert set(tree.tokens) <= set(head.tokens.tolist())
    few = shown(drafter, torch.randn(4, len(LAYERS), 32), [], ids).propose(2)
    check(few, 100, 2)


def test_chances_that_round_above_one_put_no_child_before_its_parent(model: PreTrainedModel) -> None:
    """The chances of all tokens may sum to a little more than 1, and one beam be sure of its next token."""
    head = untrained(model, AHEAD, VOCABULARY).requires_grad_(False)
    head.lm_head.weight.mul_(1000)
    halves = ParallelHalves(head, model.get_input_embeddings().weight, 2, AHEAD)
    rows, words = torch.arange(AHEAD), torch.full((1, 2), -1)
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        logits = 6 * torch.rand(1, AHEAD, VOCABULARY + 2, generator=random)
        logits[..., 5] = 20 + 4 * torch.rand(1, generator=random)
        logits[..., VOCABULARY:] = -torch.inf
        halves._scores = lambda states, words, logits=logits: logits
        states = torch.randn(AHEAD, 32, generator=random)
        columns = halves.behind(torch.zeros(4, AHEAD, 8), states, rows, rows[None], words)
        check(_tree(*(column[0].tolist() for column in columns)), VOCABULARY)


@pytest.mark.parametrize("lengths", [[3], [3, 5], [4, 2], [7, 3, 3]])
def test_short_texts_are_learned_from_as_far_as_they_go(model: PreTrainedModel, lengths: list[int]) -> None:
    head = untrained(model, AHEAD)
    shape = len(lengths), max(lengths)
    padded = torch.ones(shape, dtype=torch.int64), torch.randn(*shape, 4, 32), torch.tensor(lengths)
    batch = make_batch(model.get_input_embeddings().weight.detach(), torch.randn(48, 32), padded)
    value = parallel.loss(head, batch, 0.8)
    value.backward()
    assert torch.isfinite(value)
    assert all(torch.isfinite(p.grad).all() for p in head.parameters() if p.grad is not None)
    right, asked = parallel.hits(head, batch)
    assert asked == [sum(max(0, length - 2 - d) for length in lengths) for d in range(AHEAD)]
    assert all(hit <= of for hit, of in zip(right, asked, strict=True))


def test_a_head_goes_on_from_its_like(model: PreTrainedModel, tmp_path: Path) -> None:
    """A parallel one keeps all that it learned; one that says another number at once is refused."""
    saved = untrained(model, AHEAD)
    save_head(saved, tmp_path, model, "tiny")
    start = HeadRecipe(parallel=AHEAD, start=str(tmp_path))
    again = new_head(model, Recipe(head=start), [])
    for name, weight in saved.state_dict().items():
        kept = weight if name == "lm_head.weight" else weight.bfloat16().to(weight.dtype)
        torch.testing.assert_close(again.state_dict()[name], kept)
    with pytest.raises(InvalidRequest, match="parallel is 2; a head that says 4 at once goes on as one"):
        new_head(model, Recipe(head=HeadRecipe(parallel=2, start=str(tmp_path))), [])


def test_both_layouts_are_read(model: PreTrainedModel, tmp_path: Path) -> None:
    """`speculators`' names, and those of the public EAGLE-3 checkpoints."""
    folder = head_of(model, tmp_path / "ours")
    raw = json.loads((folder / "config.json").read_text())
    public = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": raw["draft_vocab_size"]}
    public |= raw["transformer_layer_config"] | {"eagle_config": {"eagle_aux_hidden_state_layer_ids": list(LAYERS)}}
    (tmp_path / "config.json").write_text(json.dumps(public))
    weights = {n.replace("layers.0.", "midlayer."): t for n, t in load_file(folder / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors")
    ours, theirs = (load_head(path, model).state_dict() for path in (folder, tmp_path))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


BROKEN = [
    ({"speculators_model_type": "mlp"}, "must be 'eagle3'"),
    ({"speculators_model_type": None, "architectures": ["LlamaForCausalLM"]}, "an EAGLE-3 head's says so"),
    ({"target_hidden_size": 64}, "64 wide, the target's are 32"),
    ({"draft_vocab_size": 50}, "d2t is"),
    ({"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}, "the target has 4"),
    ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, "fc.weight is"),
    ({"speculators_model_type": "specgen_parallel", "parallel_tokens": 1}, "parallel_tokens is 1; it must be from 2"),
    ({"speculators_model_type": "specgen_parallel", "parallel_tokens": 9}, "ahead.weight"),
]


@pytest.mark.parametrize(("change", "words"), BROKEN)
def test_what_does_not_fit_is_refused_by_name(
    change: dict[str, object], words: str, model: PreTrainedModel, folder: Path, tmp_path: Path
) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises((InvalidRequest, DrafterMismatch), match=words):
        load_head(tmp_path, model)


def test_files_that_are_no_head_are_refused(model: PreTrainedModel, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="needs the option path"):
        eagle(DrafterSetup(VOCABULARY, target=model))
    with pytest.raises(InvalidRequest, match="holds no head"):
        load_head(tmp_path, model)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"code")
    with pytest.raises(InvalidRequest, match="no model.safetensors"):
        load_head(tmp_path, model)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(InvalidRequest, match="cannot be read"):
        load_head(tmp_path, model)
    with pytest.raises(DrafterMismatch, match="64 wide|names tokens"):
        load_head(folder, tiny(vocab_size=20))
