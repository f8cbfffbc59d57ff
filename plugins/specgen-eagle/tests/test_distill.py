"""`specgen distill`: a head from nothing, better than looking things up; cut off and taken up, it ends the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from specgen_eagle.corpus import read_corpus
from specgen_eagle.distill import distill
from specgen_eagle.muon import Muon
from specgen_eagle.pruned_student import prune
from specgen_eagle.recipe import SMOKE, HeadRecipe, PrunedRecipe, Recipe, read_recipe
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from specgen import Engine, InvalidRequest, Speculation

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
