"""Draft models whose tokenizer is not the target's: small models that know one text by heart, each in its tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from specgen import Drafter, DrafterMismatch, DrafterSetup, DraftHints, Engine, InvalidRequest, TokenTree
from specgen.draft.budget import survivals
from specgen.draft.drafters.draft_model import DraftModel
from specgen.draft.drafters.spelling import Spelling
from specgen.draft.drafters.translation import TranslatedDraftModel, Translation, draft_model
from specgen.model.runner import load_runner
from specgen.testing import DrafterContract
from specgen.tree import chain, check
from tests.support.engines import watched
from tests.support.tokenizers import byte_level, sentence_piece

TEXT = (
    "The old harbour café opens at six. Nobody walks along the harbour before six, nobody but the baker’s dog.\n"
    "“Naïve,” says the baker, “naïve and 128 kilos heavy!” — 日本語の本 lies open beside the coffee 🙂, unread.\n\n"
    "    The dog reads the newspaper instead; the newspaper says: rain at 12:45, and rain tomorrow."
)
OTHER = "Windows, walls and a wandering cat. 12345 words were written in the water. Ça va? Être ou ne pas être."
EAGER = {"adaptive": False, "drafters": ["draft-model"]}

pytestmark = pytest.mark.usefixtures("one_thread")


def knowing(tokenizer: Any, text: str = TEXT, *, seed: int = 0) -> PreTrainedModel:
    """A small model that has learned one text, and its end, by heart."""
    ids = torch.tensor([tokenizer.encode(text) + [tokenizer.eos_token_id]])
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer), **sizes, max_position_embeddings=512, bos_token_id=None, eos_token_id=None
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(400):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        if loss < 0.01:
            break
        loss.backward()
        optimizer.step()
    assert loss < 0.01
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = 0
    return model.eval()


TOKENIZERS = {
    "fine bytes": byte_level(300, TEXT),
    "coarse bytes": byte_level(420, TEXT),
    "odd bytes": byte_level(330, OTHER),
    "pieces": sentence_piece(130, TEXT),
}
PAIRS = [
    ("fine bytes", "coarse bytes"),
    ("coarse bytes", "fine bytes"),
    ("coarse bytes", "odd bytes"),
    ("coarse bytes", "pieces"),
    ("pieces", "coarse bytes"),
    ("pieces", "odd bytes"),
]


@pytest.fixture(scope="module")
def learned() -> dict[str, PreTrainedModel]:
    return {name: knowing(tokenizer) for name, tokenizer in TOKENIZERS.items()}


@pytest.fixture(scope="module")
def folders(learned: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same models on disk, each beside its tokenizer."""
    root = tmp_path_factory.mktemp("models")
    for name, model in learned.items():
        model.save_pretrained(root / name)
        TOKENIZERS[name].save_pretrained(root / name)
    return {name: root / name for name in learned}


def translated(model: PreTrainedModel, target: Any, draft: Any, **options: int) -> TranslatedDraftModel:
    setup = DrafterSetup(
        len(target),
        target,
        {"model": model, **options},
        lambda source: (load_runner(source, kv_tokens=2048), draft),
    )
    drafter = draft_model(setup)
    assert isinstance(drafter, TranslatedDraftModel)
    return drafter


def greedy(model: PreTrainedModel, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """The new tokens of transformers' own greedy generate."""
    ids = torch.tensor([prompt])
    text = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens)
    return text[0, len(prompt) :].tolist()


# What the engine says, and how fast.


@pytest.mark.parametrize(("target", "draft"), PAIRS, ids=lambda name: name)
def test_what_the_draft_model_says_is_taken(
    learned: dict[str, PreTrainedModel], folders: dict[str, Path], target: str, draft: str
) -> None:
    """Both know the text, its odd characters and its end: a step is worth several tokens, and changes none."""
    model, tokenizer = learned[target], TOKENIZERS[target]
    prompt = tokenizer.encode(TEXT)[:12]
    drafters = {"draft-model": {"model": folders[draft], "depth": 8, "width": 2}}
    with watched(Engine(model, tokenizer, kv_tokens=2048, drafters=drafters)) as engine:
        result = engine.generate(prompt, max_tokens=200, speculation=EAGER)
        assert list(result.ids) == greedy(model, prompt, 200)
        # A character that the prompt breaks off is the output's, which completes it.
        said = tokenizer.decode(prompt, skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")
        assert result.text == TEXT[len(said) :]
        assert result.stats.by_drafter["draft-model"].disabled is None
        assert result.stats.mean_acceptance_length > (2.5 if draft == "odd bytes" else 3.2)


@pytest.mark.parametrize(
    ("target", "draft", "setting"),
    [
        ("coarse bytes", "pieces", {}),
        ("coarse bytes", "pieces", {"temperature": 1.5, "seed": 3}),
        ("pieces", "fine bytes", {"temperature": 1.1, "top_p": 0.95, "seed": 4}),
    ],
    ids=["greedy", "sampled", "sampled from pieces"],
)
def test_a_text_is_the_same_whoever_drafts_alone_and_in_a_batch(
    learned: dict[str, PreTrainedModel], folders: dict[str, Path], target: str, draft: str, setting: dict[str, Any]
) -> None:
    """Prompts that repeat, that begin alike, that end inside a word or a character, with special tokens in them."""
    tokenizer = TOKENIZERS[target]
    known = tokenizer.encode(TEXT)
    turn = tokenizer.encode("Nobody walks" + tokenizer.eos_token + TEXT[:60])
    prompts = [known[:30], known[:31], known[20:50], turn, [200], [3, 250, 17] * 8]
    options = {"kv_tokens": 4096, "drafters": {"prompt-lookup": {}, "draft-model": {"model": folders[draft]}}}
    both = {"adaptive": False, "drafters": ["prompt-lookup", "draft-model"], "max_nodes": 24}
    with watched(Engine(learned[target], tokenizer, **options)) as engine:
        plain = [engine.generate(prompt, max_tokens=24, speculation="off", **setting).ids for prompt in prompts]
        for speculation in (EAGER, both, "auto"):
            alone = [engine.generate(prompt, max_tokens=24, speculation=speculation, **setting) for prompt in prompts]
            batch = engine.generate(prompts, max_tokens=24, speculation=speculation, **setting)
            assert [result.ids for result in alone] == plain
            assert [result.ids for result in batch] == plain
            stats = [result.stats.by_drafter["draft-model"] for result in (*alone, *batch)]
            assert all(each.disabled is None for each in stats)
            assert speculation == "auto" or sum(each.accepted for each in stats) > 0


class TestTranslatedDraftModel(DrafterContract):
    vocab_size = len(TOKENIZERS["coarse bytes"])
    prompts = (
        (7,),
        tuple(TOKENIZERS["coarse bytes"].encode(TEXT)[:40]),
        tuple(TOKENIZERS["coarse bytes"].encode("日本語")[:4]),
        tuple(range(40)),
    )

    @pytest.fixture(autouse=True)
    def draft_with(self, learned: dict[str, PreTrainedModel]) -> None:
        # In float32 a batch rounds otherwise than its parts, and the last digit of a confidence shows it.
        self.model = deepcopy(learned["pieces"]).double()

    def drafter(self) -> Drafter:
        return translated(self.model, TOKENIZERS["coarse bytes"], TOKENIZERS["pieces"], depth=4)


# What is read.


@pytest.mark.parametrize(("target", "draft"), PAIRS, ids=lambda name: name)
def test_what_is_read_piece_by_piece_is_what_is_read_at_once(target: str, draft: str) -> None:
    """The end of what was read is spelt again as the text goes on; nothing else is."""
    ours, theirs = TOKENIZERS[target], TOKENIZERS[draft]
    translation = Translation(ours, theirs, len(ours))
    spelling = Spelling(ours)
    ids = ours.encode(TEXT + OTHER)
    rng = random.Random(0)
    read, said, taken_back = 0, [], 0
    for stop in sorted(rng.sample(range(1, len(ids)), 60)) + [len(ids)]:
        readable = spelling.readable(ids[:stop])
        assert stop - 3 <= readable <= stop
        kept, new = translation.revision(ids[:readable], read, said)
        taken_back += (len(said) - kept) * (read > 0)
        said = said[:kept] + new
        read = readable
    assert said == theirs.encode(ours.decode(ids, skip_special_tokens=True))
    assert taken_back < 60 * 2


def test_special_tokens_of_one_name_are_one_and_the_others_are_text() -> None:
    """A begin of text that the draft model does not know is left out; its own comes first, once."""
    pieces, plain = TOKENIZERS["pieces"], TOKENIZERS["fine bytes"]
    chat = byte_level(350, OTHER)
    chat.add_special_tokens({"bos_token": "<|user|>"})
    ids = chat.encode("<|user|>The dog<|end|>")
    assert ids[0] == chat.bos_token_id
    assert ids[-1] == chat.eos_token_id
    _, said = Translation(chat, plain, 999).revision(ids, 0, [])
    assert plain.convert_ids_to_tokens(said)[0] == "<|user|>"
    assert said[-1] == plain.eos_token_id
    _, said = Translation(chat, pieces, 999).revision(ids, 0, [])
    assert said == pieces.encode("The dog<|end|>")
    assert said[0] == pieces.bos_token_id
    _, said = Translation(pieces, plain, 999).revision(pieces.encode("The dog"), 0, [])
    assert plain.decode(said) == "The dog"


# What is offered.


def offered(
    target: str, draft: str, before: Sequence[int], text: str, *, end: bool = False
) -> tuple[list[int], TokenTree]:
    """The tree for one path of draft tokens that say `text`, with confidence 0.9 each; and its tokens."""
    ours, theirs = TOKENIZERS[target], TOKENIZERS[draft]
    translation = Translation(ours, theirs, len(ours))
    drafted = Spelling(theirs).ids("a" + text)[len(Spelling(theirs).ids("a")) :] + [theirs.eos_token_id] * end
    read = translation.target.readable(before)
    tree = translation.tree(before, read, chain(drafted, 0.9))
    return list(tree.tokens), tree


def test_a_path_goes_on_behind_what_is_committed() -> None:
    ours = TOKENIZERS["coarse bytes"]
    before = ours.encode("The old harbour")
    for draft in ("fine bytes", "odd bytes", "pieces"):
        for text in (" café opens at six.", "\nNobody", " 日本語の本", " naïve 🙂,"):
            tokens, tree = offered("coarse bytes", draft, before, text)
            assert before + tokens == ours.encode("The old harbour" + text)
            chances = survivals(tree)
            assert chances == sorted(chances, reverse=True)
            assert 0 < chances[-1] <= 0.9


def test_a_character_of_which_half_is_committed_is_completed() -> None:
    ours = TOKENIZERS["odd bytes"]
    text = ours.encode("The 本 lies")
    half = len(ours.encode("The ")) + 1
    assert ours.decode(text[:half]).endswith("�")
    tokens, _ = offered("odd bytes", "pieces", text[:half], "本 lies")
    assert tokens == text[half:]
    tokens, _ = offered("odd bytes", "pieces", text[:half], "🙂 lies")
    assert tokens == []


def test_a_path_that_would_have_been_spelt_otherwise_is_left_out() -> None:
    """Whoever writes " harbour" as one token was not about to write it behind " har"."""
    ours = TOKENIZERS["coarse bytes"]
    assert len(ours.encode(" harbour")) == 1
    assert offered("coarse bytes", "fine bytes", ours.encode("The har"), "bour before")[0] == []


def test_white_space_that_is_spelt_otherwise_at_the_end_of_a_text_is_no_obstacle() -> None:
    """As GPT-2 does: two line ends are one token alone, and two before a word."""
    ours = TOKENIZERS["coarse bytes"]
    whole = ours.encode("The dog\n\nreads")
    assert len(ours.encode("\n\n")) == 1
    before = [*ours.encode("The dog"), *ours.encode("\n") * 2]
    assert whole[: len(before)] == before
    tokens, _ = offered("coarse bytes", "pieces", before, "reads")
    assert before + tokens == whole


def test_the_draft_models_end_of_text_is_the_targets() -> None:
    ours, pieces = TOKENIZERS["coarse bytes"], TOKENIZERS["pieces"]
    tokens, _ = offered("coarse bytes", "pieces", ours.encode("The dog"), " reads", end=True)
    assert tokens == [*ours.encode(" reads"), ours.eos_token_id]
    translation = Translation(ours, pieces, len(ours))
    unknown = chain([pieces.unk_token_id, *pieces.encode("dog")])
    assert len(translation.tree(ours.encode("The dog"), 2, unknown)) == 0


def test_a_tree_stays_a_tree() -> None:
    """Two paths that begin with the same text begin with the same nodes, however the draft model spells them."""
    ours, theirs = TOKENIZERS["coarse bytes"], TOKENIZERS["fine bytes"]
    space, t, a, he, space_t = (theirs.convert_tokens_to_ids(token) for token in ("Ġ", "t", "a", "he", "Ġt"))
    tree = TokenTree((space_t, he, space, t, he, a), (-1, 0, -1, 2, 3, -1), (0.5, 0.9, 0.2, 0.5, 0.5, 0.1))
    before = ours.encode("The old")
    found = Translation(ours, theirs, len(ours)).tree(before, len(before), tree)
    check(found, len(ours))
    assert found.tokens == (*ours.encode(" the"), *ours.encode("a"))
    assert found.confidence == pytest.approx((0.45, 0.1))


# The draft model underneath.


def test_only_what_changed_is_read_again(learned: dict[str, PreTrainedModel]) -> None:
    ours, theirs = TOKENIZERS["coarse bytes"], TOKENIZERS["pieces"]
    drafter = translated(learned["pieces"], ours, theirs, depth=3, width=1)
    ids = ours.encode(TEXT)
    session = drafter.open(ids[:19], DraftHints())
    model = drafter.drafter.model
    assert not len(session.propose(3)), "the first token does not wait for the draft model to read the prompt"
    assert model.rows == 0
    session.commit(ids[19:20])
    for start in range(20, 40, 2):
        assert len(session.propose(8))
        session.commit(ids[start : start + 2])
        rows = model.rows
        session.propose(8)
        assert model.rows - rows <= 12
    session.close()
    drafter.check()


def test_the_draft_model_is_told_what_a_token_is_worth(learned: dict[str, PreTrainedModel]) -> None:
    """Else it would grow every tree to its full depth, whatever that costs."""
    target, draft = TOKENIZERS["fine bytes"], TOKENIZERS["pieces"]
    drafter = translated(learned["pieces"], target, draft)
    session = drafter.open(target.encode(TEXT), DraftHints())
    session.commit(target.encode(OTHER)[:2])
    for worth in (1e-3, 0.0, 2e-9):
        drafter.token_seconds = worth
        drafter.propose([session], [8])
        assert drafter.drafter.token_seconds == worth
    session.close()


def test_ids_that_are_taken_back_leave_what_others_read_alone(learned: dict[str, PreTrainedModel]) -> None:
    """Two sessions share pages; one goes back into them and says something else there, the other goes on as before."""
    ids = TOKENIZERS["pieces"].encode(TEXT)[:40]
    drafter = DraftModel(load_runner(learned["pieces"], kv_tokens=1024), len(TOKENIZERS["pieces"]))
    first = drafter.open((), DraftHints())
    first.commit(ids)
    expected = first.propose(20)
    first.close()
    second, third = (drafter.open((), DraftHints()) for _ in range(2))
    second.commit(ids)
    third.commit(ids)
    assert second.propose(20).tokens == third.propose(20).tokens == expected.tokens
    third.revise(10, [5] * 30)
    fresh = drafter.open((), DraftHints(cache_salt="other"))
    fresh.commit([*ids[:10], *[5] * 30])
    assert third.propose(20).tokens == fresh.propose(20).tokens
    second.commit([7])
    second.revise(40, [])
    assert second.propose(20).tokens == expected.tokens
    for session in (second, third, fresh):
        session.close()
        drafter.check()
    assert not drafter.model.pool.open_tables


# Which way is taken.


def test_the_same_tokenizer_needs_no_translation(
    learned: dict[str, PreTrainedModel], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Nor where one model's vocabulary is padded to another size."""
    tokenizer = TOKENIZERS["fine bytes"]
    padded = deepcopy(learned["fine bytes"])
    padded.resize_token_embeddings(len(tokenizer) + 20)
    padded.lm_head.weight.data[len(tokenizer) :] = padded.lm_head.weight.data[5]
    padded.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompt = [*tokenizer.encode(TEXT)[:12], len(tokenizer) + 3]
    for target, draft in ((learned["fine bytes"], tmp_path), (padded, folders["fine bytes"])):
        with watched(Engine(target, tokenizer, kv_tokens=1024, draft_model=draft)) as engine:
            assert isinstance(engine._core.drafting.drafters["draft-model"], DraftModel)
            known = prompt[:12] if target is not padded else prompt
            result = engine.generate(known, max_tokens=40, speculation=EAGER)
            assert list(result.ids) == greedy(target, known, len(result.ids))
            assert result.stats.by_drafter["draft-model"].disabled is None


def test_a_loaded_model_brings_the_tokenizer_of_its_folder(folders: dict[str, Path]) -> None:
    loaded = LlamaForCausalLM.from_pretrained(folders["pieces"]).eval()
    with Engine.from_pretrained(folders["fine bytes"], kv_tokens=1024, draft_model=loaded) as engine:
        assert isinstance(engine._core.drafting.drafters["draft-model"], TranslatedDraftModel)


def test_without_a_tokenizer_another_vocabulary_is_refused(
    learned: dict[str, PreTrainedModel], folders: dict[str, Path]
) -> None:
    model, tokenizer = learned["coarse bytes"], TOKENIZERS["coarse bytes"]
    sizes = f"vocabulary of {len(TOKENIZERS['pieces'])}, the target of {len(tokenizer)}"
    with pytest.raises(DrafterMismatch, match=f"{sizes}; choose .* through text: there is none beside the draft model"):
        Engine(model, tokenizer, kv_tokens=512, draft_model=learned["pieces"])
    with pytest.raises(DrafterMismatch, match=f"{sizes}; choose .* through text: the engine has none"):
        Engine(model, kv_tokens=512, draft_model=folders["pieces"])
    with pytest.raises(InvalidRequest, match="needs the option model"):
        draft_model(DrafterSetup(10))
