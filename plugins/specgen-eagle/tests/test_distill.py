"""`specgen distill`: a head from nothing, better than looking things up; cut off and taken up, it ends the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from specgen_eagle import corpus as corpora
from specgen_eagle.corpus import Conversation, read_corpus, write_corpus
from specgen_eagle.distill import distill
from specgen_eagle.head_student import HeadStudent
from specgen_eagle.muon import Muon
from specgen_eagle.pruned_student import PrunedStudent, prune
from specgen_eagle.readout import logit_factor
from specgen_eagle.recipe import SMOKE, CorpusRecipe, HeadRecipe, PrunedRecipe, Recipe, TrainingRecipe, read_recipe
from specgen_eagle.states import open_states
from specgen_eagle.training import Trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from specgen import Engine, InvalidRequest, Speculation, model_digest

TEMPLATE = "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}"
VOCABULARY = 64


def speaker() -> Engine:
    """A tiny target that is sure of what it says, with a tokenizer of words."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=3,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w3")
    tokenizer.chat_template = TEMPLATE
    return Engine(model, tokenizer, kv_tokens=8192)


class Cut(Exception):
    """The power is gone."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Path]]:
    folder = tmp_path_factory.mktemp("distilled")
    with speaker() as engine:
        distill(engine, folder / "head", folder / "work", SMOKE, lambda *_: None)
        yield engine, folder


def accepted(engine: Engine, drafters: dict[str, dict[str, object]], prompts: list[list[int]]) -> float:
    """Tokens per step at 16 nodes."""
    speculation = Speculation(adaptive=False, max_nodes=16)
    with Engine(engine.model, drafters=drafters, kv_tokens=4096) as other:
        results = other.generate(prompts, max_tokens=40, temperature=1.0, seed=1, speculation=speculation)
    return sum(len(r.ids) for r in results) / sum(r.stats.num_spec_steps for r in results)


def test_it_beats_prompt_lookup_on_text_held_out(trained: tuple[Engine, Path]) -> None:
    engine, folder = trained
    corpus = read_corpus(folder / "work" / "corpus.jsonl")
    assert len(corpus) == SMOKE.corpus.conversations
    held_out = [c.ids[: c.answer] for c in corpus[: round(len(corpus) * SMOKE.corpus.held_out)]]
    head = accepted(engine, {"eagle": {"path": folder / "head"}}, held_out)
    assert head > 1.05 * accepted(engine, {"prompt-lookup": {}}, held_out)


def test_the_curve_rises_and_the_manifest_says_it(trained: tuple[Engine, Path]) -> None:
    engine, folder = trained
    # A run that has ended is not trained any further.
    curve = distill(engine, folder / "head", folder / "work", SMOKE, lambda *_: None)
    assert [point.step for point in curve] == [40, 80, 120]
    assert curve[-1].loss < curve[0].loss
    assert curve[-1].survival[0] > curve[0].survival[0]
    manifest = json.loads((folder / "head" / "manifest.json").read_text())
    assert manifest["held_out"]["updates"] == 120
    assert manifest["held_out"]["survival"][0] == pytest.approx(curve[-1].survival[0], abs=1e-4)


@pytest.mark.parametrize(("at", "done"), [("conversations", 16), ("updates", 80)])
def test_cut_off_and_taken_up_it_ends_the_same(
    trained: tuple[Engine, Path], at: str, done: int, tmp_path: Path
) -> None:
    engine, folder = trained

    def told(what: str, count: int, of: int) -> None:
        if (what, count) == (at, done):
            raise Cut

    with pytest.raises(Cut):
        distill(engine, tmp_path / "head", tmp_path / "work", SMOKE, told)
    with (tmp_path / "work" / "corpus.jsonl").open("ab") as file:
        file.write(b'{"ids":[1,2')  # a line that was being written
    distill(engine, tmp_path / "head", tmp_path / "work", SMOKE, lambda *_: None)
    again, before = (load_file(path / "head" / "model.safetensors") for path in (tmp_path, folder))
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_a_folder_of_another_recipe_is_refused(trained: tuple[Engine, Path]) -> None:
    engine, folder = trained
    with pytest.raises(InvalidRequest, match="another recipe"):
        distill(engine, folder / "head", folder / "work", Recipe(), lambda *_: None)


def test_a_folder_of_another_target_is_refused(trained: tuple[Engine, Path], tmp_path: Path) -> None:
    """The same model with other weights; and a folder that does not say for which target it was begun."""
    engine, folder = trained
    (tmp_path / "recipe.json").write_bytes((folder / "work" / "recipe.json").read_bytes())
    with pytest.raises(InvalidRequest, match="does not say for which target it was begun") as caught:
        distill(engine, tmp_path / "head", tmp_path, SMOKE, lambda *_: None)
    assert caught.value.param == "work"
    head = (folder / "head" / "model.safetensors").read_bytes()
    with speaker() as tuned:
        assert model_digest(tuned.model) == model_digest(engine.model)
        with torch.no_grad():
            tuned.model.model.layers[1].mlp.up_proj.weight[3, 5].add_(1)
        with pytest.raises(InvalidRequest, match="was begun for another target") as caught:
            distill(tuned, folder / "head", folder / "work", SMOKE, lambda *_: None)
    assert caught.value.param == "work"
    assert (folder / "head" / "model.safetensors").read_bytes() == head


def test_states_of_another_text_are_computed_again(trained: tuple[Engine, Path], tmp_path: Path) -> None:
    engine, _ = trained
    told: list[int] = []
    for ids, computed in (([5, 6, 7], 3), ([5, 6, 7], 0), ([5, 6, 8], 3)):
        told.clear()
        states = open_states(engine.model, [Conversation(ids, 1)], (1,), tmp_path / "states.bin", told.append)
        assert sum(told) == computed
    fresh = open_states(engine.model, [Conversation(ids, 1)], (1,), tmp_path / "fresh.bin", told.append)
    assert torch.equal(states.states, fresh.states)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (CorpusRecipe(conversations=1), "held_out is 0.03: of 1 conversations 1 are held out"),
        (CorpusRecipe(conversations=8, held_out=0.96), "held_out is 0.96: of 8 conversations 8 are held out"),
    ],
)
def test_a_recipe_that_leaves_nothing_to_train_on_is_refused(
    trained: tuple[Engine, Path], corpus: CorpusRecipe, message: str, tmp_path: Path
) -> None:
    recipe = msgspec.structs.replace(SMOKE, corpus=corpus)
    with pytest.raises(InvalidRequest, match=message) as caught:
        distill(trained[0], tmp_path / "head", tmp_path / "work", recipe, lambda *_: None)
    assert caught.value.param == "held_out"
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(("lengths", "what"), [([9, 2, 2], "2 to train on"), ([2, 9, 9], "1 to judge by")])
def test_conversations_too_short_to_learn_from_are_refused(
    trained: tuple[Engine, Path], lengths: list[int], what: str, tmp_path: Path
) -> None:
    model = trained[0].model
    corpus = [Conversation(list(range(length)), 1) for length in lengths]
    student = HeadStudent(model, SMOKE, corpus)
    states = open_states(model, corpus, student.layers, tmp_path / "states.bin", lambda _: None)
    message = f"of 3 conversations 1 are held out; of the {what} none has more than 2 tokens"
    with pytest.raises(InvalidRequest, match=message) as caught:
        next(Trainer(student, model, states, 1, TrainingRecipe(steps=1), tmp_path).run())
    assert caught.value.param == "held_out"


@pytest.mark.parametrize(
    "changes",
    [
        {"head": HeadRecipe(layers=(1, 9, 2))},
        {"head": HeadRecipe(layers=(-1,))},
        {"pruned": PrunedRecipe(layers=(0, 4))},
    ],
)
def test_layers_out_of_range_are_refused_before_anything_is_written(
    trained: tuple[Engine, Path], changes: dict[str, object], tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match="choose some of 0 to") as caught:
        distill(trained[0], tmp_path / "head", tmp_path / "work", msgspec.structs.replace(SMOKE, **changes), print)
    assert caught.value.param == f"{next(iter(changes))}.layers"
    assert not (tmp_path / "work").exists()


def tiny(kind: str, **fields: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        **fields,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_() if weight.ndim > 1 or name.endswith("lm_head.bias") else None
    return model


@pytest.mark.parametrize(
    ("kind", "fields"), [("granite", {"logits_scaling": 8.0}), ("cohere", {"logit_scale": 0.125})], ids=str
)
def test_a_target_that_scales_its_logits_is_distilled_as_it_is(kind: str, fields: dict[str, float]) -> None:
    model = tiny(kind, **fields)
    assert logit_factor(model) == pytest.approx(0.125, rel=1e-4)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        answer = model(ids, output_hidden_states=True)
    states = torch.stack([*answer.hidden_states[1:4], answer.hidden_states[-1]], dim=2)
    student = HeadStudent(model, SMOKE, [Conversation(list(range(64)), 1)])
    batch = student._batch((ids, states, torch.tensor([20])))
    torch.testing.assert_close(batch.wanted, answer.logits[:, 1:-1].log_softmax(-1), atol=1e-3, rtol=1e-3)
    pruned = PrunedStudent(model, SMOKE, (0, 3))
    torch.testing.assert_close(pruned._read((ids, states, torch.tensor([20])))[1], answer.logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("kind", "fields"), [("gemma2", {"final_logit_softcapping": 2.0}), ("phi", {})], ids=["a soft cap", "a bias"]
)
def test_a_target_whose_logits_are_no_plain_products_is_refused(kind: str, fields: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match=f"{kind}: its logits are .* bias or a soft cap") as caught:
        HeadStudent(tiny(kind, **fields), SMOKE, [])
    assert caught.value.param == "model"


def test_a_plain_target_has_no_factor(trained: tuple[Engine, Path]) -> None:
    assert logit_factor(trained[0].model) == 1.0


@pytest.mark.parametrize("known_to", ["the model", "the tokenizer"])
def test_the_end_of_a_user_turn_is_not_kept_inside(known_to: str, tmp_path: Path) -> None:
    recipe = CorpusRecipe(conversations=2, batch=2, turn_tokens=8, answer_tokens=2, openers=("w3",))
    with speaker() as engine:
        if known_to == "the tokenizer":
            engine.model.generation_config.eos_token_id = None
        assert corpora._end_ids(engine) == [3]
        engine.tokenizer.eos_token = None
        assert corpora._end_ids(engine) == ([3] if known_to == "the model" else [])
        engine.model.generation_config.eos_token_id = [3, 4]
        assert corpora._end_ids(engine) == [3, 4]
        list(write_corpus(engine, tmp_path / "corpus.jsonl", recipe))
    assert len(read_corpus(tmp_path / "corpus.jsonl")) == 2


def test_a_corpus_that_is_whole_is_not_written_again(
    trained: tuple[Engine, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that is cut loses nothing whole where writing fails."""
    engine, folder = trained
    path = tmp_path / "corpus.jsonl"
    whole = (folder / "work" / "corpus.jsonl").read_bytes()
    path.write_bytes(whole)
    before = path.stat()
    assert list(write_corpus(engine, path, SMOKE.corpus)) == []
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    def cut(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:7])
        raise Cut

    monkeypatch.setattr(Path, "write_bytes", cut)
    with path.open("ab") as file:
        file.write(b'{"ids":[1,2')
    with pytest.raises(Cut):
        list(write_corpus(engine, path, SMOKE.corpus))
    assert path.read_bytes().startswith(whole)


def test_a_recipe_with_a_field_that_there_is_not_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("[head]\nlayers = [1]\ndepth = 3\n")
    with pytest.raises(InvalidRequest, match="depth"):
        read_recipe(tmp_path / "recipe.toml")


def test_a_draft_model_of_some_layers_learns_to_say_what_the_target_says(
    trained: tuple[Engine, Path], tmp_path: Path
) -> None:
    engine, folder = trained
    (tmp_path / "work").mkdir()
    recipe = msgspec.structs.replace(SMOKE, pruned=PrunedRecipe(layers=(0, 3)))
    (tmp_path / "work" / "corpus.jsonl").write_bytes((folder / "work" / "corpus.jsonl").read_bytes())
    curve = distill(engine, tmp_path / "student", tmp_path / "work", recipe, lambda *_: None)
    assert json.loads((tmp_path / "student" / "manifest.json").read_text())["kind"] == "draft-model"
    assert curve[-1].loss < curve[0].loss
    prompts = [c.ids[: c.answer] for c in read_corpus(folder / "work" / "corpus.jsonl")[:6]]
    pruned = prune(engine.model, (0, 3)).eval()
    trained_one = accepted(engine, {"draft-model": {"model": str(tmp_path / "student")}}, prompts)
    assert trained_one > accepted(engine, {"draft-model": {"model": pruned}}, prompts)


def test_a_parallel_head_goes_on_from_an_unrolled_one(trained: tuple[Engine, Path], tmp_path: Path) -> None:
    """It keeps what that can say, learns to say more at once, and ends the same when it is cut off."""
    engine, folder = trained
    recipe = msgspec.structs.replace(SMOKE, head=HeadRecipe(parallel=3, start=str(folder / "head")))
    corpus = (folder / "work" / "corpus.jsonl").read_bytes()
    prompts = [c.ids[: c.answer] for c in read_corpus(folder / "work" / "corpus.jsonl")[:12]]

    def told(what: str, count: int, of: int) -> None:
        if (what, count) == ("updates", 80):
            raise Cut

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "corpus.jsonl").write_bytes(corpus)
    curve = distill(engine, tmp_path / "head", tmp_path / "whole", recipe, lambda *_: None)
    with pytest.raises(Cut):
        distill(engine, tmp_path / "again", tmp_path / "cut", recipe, told)
    distill(engine, tmp_path / "again", tmp_path / "cut", recipe, lambda *_: None)
    folders = tmp_path / "head", tmp_path / "again", folder / "head"
    once, twice, begun = (load_file(path / "model.safetensors") for path in folders)
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert torch.equal(once["d2t"], begun["d2t"])
    assert json.loads((tmp_path / "head" / "manifest.json").read_text())["kind"] == "parallel"
    assert curve[-1].survival[1] > curve[0].survival[1]
    assert accepted(engine, {"eagle": {"path": tmp_path / "head"}}, prompts) > 1.05 * accepted(
        engine, {"prompt-lookup": {}}, prompts
    )


def test_a_pruned_model_that_keeps_all_layers_is_the_target(trained: tuple[Engine, Path]) -> None:
    engine, _ = trained
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(prune(engine.model, range(4))(ids).logits, engine.model(ids).logits)


def test_a_pruned_model_keeps_what_its_config_says_of_each_layer() -> None:
    """Which layers turn their keys by position, here; as many end tokens as layers stay."""
    model = tiny("smollm3", no_rope_layer_interval=2, eos_token_id=[3, 4, 5, 6])
    model.config.eos_token_id = [3, 4, 5, 6]
    pruned = prune(model, (1, 2))
    assert pruned.config.no_rope_layers == [model.config.no_rope_layers[layer] for layer in (1, 2)]
    assert pruned.config.eos_token_id == [3, 4, 5, 6]
    ids = torch.arange(20)[None]
    model.model.layers = torch.nn.ModuleList(list(model.model.layers)[1:3])
    model.config.num_hidden_layers = 2
    with torch.no_grad():
        torch.testing.assert_close(pruned(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_layers_that_cannot_be_taken_alone_are_refused() -> None:
    """The first layer has no experts."""
    experts = {"n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "num_experts": 4}
    model = tiny("glm4_moe", first_k_dense_replace=1, num_experts_per_tok=2, **experts)
    with pytest.raises(InvalidRequest, match="glm4_moe builds layers by their places") as caught:
        prune(model, (1, 2))
    assert caught.value.param == "pruned.layers"


@pytest.mark.parametrize("layers", [(), (0, 4), (1, 0), (2, 2), (-1,)])
def test_layers_that_the_target_does_not_have_are_refused(
    trained: tuple[Engine, Path], layers: tuple[int, ...]
) -> None:
    with pytest.raises(InvalidRequest, match="choose some of 0 to 3"):
        prune(trained[0].model, layers)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_muon_is_torchs_own_in_any_dtype(shape: tuple[int, int]) -> None:
    start, gradients = torch.randn(shape), torch.randn(3, *shape)
    found = {}
    for dtype in (None, torch.bfloat16, torch.float32):
        weight = torch.nn.Parameter(start.clone())
        optimizer: torch.optim.Optimizer
        if dtype is None:
            optimizer = torch.optim.Muon([weight], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        else:
            optimizer = Muon([weight], 0.1, dtype=dtype, weight_decay=0.01)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        found[dtype] = weight.detach()
    assert torch.equal(found[torch.bfloat16], found[None])
    moved = (found[None] - start).norm()
    assert (found[torch.float32] - found[None]).norm() < 0.05 * moved
