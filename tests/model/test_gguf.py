"""GGUF files: a tiny one with weights and tokenizer, through every door, against transformers' own reading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from specgen import Engine, InvalidRequest
from specgen.cli.app import app
from specgen.model import loading
from specgen.model.loading import load_model, load_tokenizer

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

NAME = "tiny.gguf"
LETTERS = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
WORDS = [*LETTERS, "th", "he", "Ġt", "<|start|>", "<|end|>"]
MERGES = ["t h", "h e", "Ġ t"]
WIDTH, HEADS, LAYERS, INNER = 32, 2, 2, 64
PROMPT = "the cat and the hat"


def write_gguf(file: Path) -> None:
    """A random Llama of two layers and a byte-level vocabulary."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([1] * (len(WORDS) - 2) + [3, 3])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(len(WORDS) - 2)
    writer.add_eos_token_id(len(WORDS) - 1)
    writer.add_chat_template("{% for m in messages %}{{ m.content }} {% endfor %}")
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(WORDS), WIDTH), "output": (len(WORDS), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        block = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (WIDTH, WIDTH))
        block |= {"ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}
        block |= {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("gguf") / NAME
    write_gguf(place)
    return place


@pytest.fixture(scope="module")
def expected(file: Path) -> list[int]:
    """What transformers says by its own load and its own generate."""
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=NAME)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=NAME)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    assert 3 < ids.shape[1] < len(PROMPT), "merges are read"
    text: list[int] = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :].tolist()
    return text


@pytest.mark.parametrize(
    "source",
    [
        lambda file: ((file,), {}),
        lambda file: ((str(file),), {}),
        lambda file: ((file.parent,), {"gguf_file": NAME}),
        lambda file: ((str(file.parent),), {"model_options": {"gguf_file": NAME}}),
        lambda file: ((file,), {"draft_model": str(file)}),
    ],
)
def test_a_gguf_file_brings_its_tokenizer(
    file: Path, expected: list[int], source: Callable[[Path], tuple[tuple[Any, ...], dict[str, Any]]]
) -> None:
    place, options = source(file)
    with Engine.from_pretrained(*place, kv_tokens=256, **options) as engine:
        result = engine.generate(PROMPT, max_tokens=12, temperature=0)
        assert list(result.ids) == expected
        assert result.text == engine.tokenizer.decode(expected, skip_special_tokens=True)
        assert Path(engine.model.name_or_path).name == NAME, "a server calls it by its file"


def test_a_model_from_a_gguf_file_leads_to_its_tokenizer(file: Path) -> None:
    model = load_model(file, dtype="float32", device="cpu")
    assert load_tokenizer(model).get_vocab() == AutoTokenizer.from_pretrained(file.parent, gguf_file=NAME).get_vocab()


def test_the_command_line_takes_gguf_files(file: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECGEN_PLUGINS", "")
    asked = ("generate", PROMPT, "--raw", "--max-tokens", "12", "--temperature", "0", "--json")
    for place in (("-m", str(file)), ("-m", str(file.parent), "--gguf-file", NAME)):
        result = CliRunner().invoke(app, [*asked, *place, "--kv-tokens", "256", "--max-context", "64"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["ids"] == expected


def test_what_is_missing_is_named(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(file, tmp_path / "other.gguf")
    for call, message in (
        (lambda: Engine.from_pretrained(tmp_path), r"holds GGUF files: other\.gguf; give the path of one"),
        (lambda: Engine.from_pretrained(tmp_path / "no.gguf"), r"no\.gguf': there is no such file"),
        (lambda: Engine.from_pretrained(file, gguf_file="other.gguf"), "name the file once"),
        (lambda: Engine.from_pretrained(file.parent, gguf_file="other.gguf"), r"has no file 'other\.gguf'"),
    ):
        with pytest.raises(InvalidRequest, match=message) as caught:
            call()
        assert caught.value.param == "model"
    for package in ("gguf", "accelerate"):
        with monkeypatch.context() as patch:
            patch.setattr(loading, "find_spec", lambda name, package=package: None if name == package else object())
            with pytest.raises(InvalidRequest, match=rf"needs {package}: pip install 'specgen-llm\[gguf\]'"):
                Engine.from_pretrained(file)


def test_a_file_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF of something else")
    with pytest.raises(InvalidRequest, match="cannot be loaded"):
        Engine.from_pretrained(tmp_path / "bad.gguf")


def test_hub_options_are_the_tokenizers_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another revision's tokenizer would read other ids."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda place, **options: seen.update(options))
    load_tokenizer(tmp_path, revision="v2", subfolder="inner", token="t", dtype=torch.float32, use_safetensors=True)
    assert seen == {"revision": "v2", "subfolder": "inner", "token": "t", "trust_remote_code": False}
