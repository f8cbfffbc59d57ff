"""The benchmarks run, write what they promise, and have prompts of every kind."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from benchmarks import decode, harness, invariance, kv, step

SPEC_BENCH = {
    "writing",
    "roleplay",
    "reasoning",
    "math",
    "coding",
    "extraction",
    "stem",
    "humanities",
    "translation",
    "summarization",
    "qa",
    "math_reasoning",
    "rag",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, smollm_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A random model of three layers that speaks SmolLM2's tokens."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    config = LlamaConfig(vocab_size=len(smollm_tokenizer), eos_token_id=smollm_tokenizer.eos_token_id, **sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)
    smollm_tokenizer.save_pretrained(folder)
    return folder


def test_decode_writes_bars_environment_and_plot(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "decode.json"
    decode.main(["--quick", "--model", str(tiny), "--limit", "2", "--tokens", "8", "--json", str(file)])
    written = json.loads(file.read_text(encoding="utf-8"))
    bars = written["bars"]
    assert all(type(value) in (int, float) for value in bars.values())
    wanted = {"identical", "identical_bfloat16", "off_vs_hf", "on_vs_off", "repeat_on_vs_off", "hf_assisted_vs_hf"}
    assert wanted | {"acceptance_length", "acceptance_length_repeat", "draft_model_vs_off"} <= set(bars)
    assert bars["identical"] == 1
    assert bars["acceptance_length"] >= 1
    assert {"cpu", "cores", "threads", "ram_gib", "torch", "transformers", "specgen", "commit", "date"} <= set(
        written["environment"]
    )
    assert written["settings"]["tokens"] == 8
    assert len(written["runs"]) == 2 * 6, "two prompts, six systems, one round"
    assert file.with_suffix(".png").stat().st_size > 1000


def _bars(file: Path) -> dict[str, float]:
    bars: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))["bars"]
    assert file.with_suffix(".png").stat().st_size > 1000
    return bars


def test_step_takes_a_step_apart(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    step.main(["--quick", "--model", str(tiny), "--tokens", "3", "--json", str(file)])
    bars = _bars(file)
    assert set(bars) == {"row1_vs_hf", "row32_vs_row1", "host_share", "floor_ratio"}
    assert all(value > 0 for value in bars.values())
    for one in json.loads(file.read_text(encoding="utf-8"))["steps"]:
        parts = one["milliseconds"]
        assert sum(v for name, v in parts.items() if name != "step") <= parts["step"] * 1.5
        assert parts["forward"] > 0


def test_kv_prints_every_format(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "kv.json"
    kv.main(["--quick", "--model", str(tiny), "--limit", "1", "--tokens", "4", "--json", str(file)])
    bars = _bars(file)
    for name in ("int8", "k8v4", "int4", "fp8"):
        assert 0 < bars[f"{name}_bytes_ratio"] < 1
        assert 0.5 < bars[f"{name}_ppl_ratio"] < 2
        assert 0 <= bars[f"{name}_top1"] <= 1
    assert bars["ttft_warm_ratio_1000"] > 0


def test_invariance_compares_every_way(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "invariance.json"
    invariance.main(["--quick", "--model", str(tiny), "--tokens", "6", "--json", str(file)])
    assert _bars(file)["invariant_identical"] == 1
    texts = json.loads(file.read_text(encoding="utf-8"))["texts"]
    ours = [one for one in texts if one["system"] != invariance.TORCH]
    assert len(ours) == 2 * 4
    assert all(one["same"] == [True] * 3 for one in ours)


def test_a_margin_is_taken_where_two_texts_part(tiny: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny).eval()
    prompt = [5, 6, 7]
    logits = model(input_ids=torch.tensor([[*prompt, 9]])).logits[0, -1]
    best, second = logits.topk(2).values.tolist()
    assert invariance.margin(model, prompt, (9, 1, 2), (9, 3, 4)) == pytest.approx(best - second, abs=1e-5)


def test_the_commands_sizes_win_over_those_of_quick() -> None:
    args = harness.parse(
        harness.parser("x", None),
        ["--quick", "--tokens", "5"],
        full=harness.Sizes(64, 3),
        quick=harness.Sizes(24, 1, 4),
    )
    assert (args.tokens, args.rounds, args.limit) == (5, 1, 4)


def test_every_category_has_prompts_and_none_comes_twice() -> None:
    prompts = [json.loads(line) for line in harness.PROMPTS.read_text(encoding="utf-8").splitlines()]
    counts = Counter(prompt["category"] for prompt in prompts)
    assert set(counts) == SPEC_BENCH | {"code_edit"}
    assert min(counts.values()) >= 2
    assert set(harness.REPEAT) <= set(counts)
    assert len({prompt["id"] for prompt in prompts}) == len(prompts)
    assert len({text for prompt in prompts for text in prompt["turns"]}) == len(prompts)


def test_a_spread_takes_from_both_groups_and_repeats_no_category_early() -> None:
    prompts = [
        harness.Prompt(f"{category}-{number}", category, (1,))
        for category in ("writing", "qa", "extraction", "code_edit")
        for number in range(2)
    ]
    assert [p.id for p in harness.spread(prompts, 5)] == [
        "extraction-0",
        "writing-0",
        "code_edit-0",
        "qa-0",
        "extraction-1",
    ]


def test_every_system_meets_every_prompt_and_each_begins_in_turn() -> None:
    prompts = [harness.Prompt(str(number), "qa", (number,)) for number in range(3)]
    samples = harness.interleave(
        {"a": lambda p: p.ids, "b": lambda p: None if p.id == "2" else p.ids}, prompts, rounds=2
    )
    order = [(s.round, s.prompt.id, s.system) for s in samples]
    assert order[:5] == [(0, "0", "a"), (0, "0", "b"), (0, "1", "b"), (0, "1", "a"), (0, "2", "a")]
    assert len(order) == 2 * (3 + 2), "b sits prompt 2 out"


def test_results_compare_within_a_round_before_any_median() -> None:
    prompt = harness.Prompt("p", "qa", (1,))

    def sample(number: int, system: str, seconds: float, last: int) -> harness.Sample[decode.Run]:
        run = decode.Run((1, 2, last), first=1.0, seconds=1.0 + seconds, early=1, steps=2, forwards=3)
        return harness.Sample(number, system, prompt, run)

    results = decode.Results(
        [
            sample(0, decode.OFF, 2.0, 3),
            sample(0, decode.ON, 1.0, 3),
            sample(1, decode.OFF, 8.0, 3),
            sample(1, decode.ON, 1.0, 4),
        ]
    )
    assert results.value(decode.OFF, decode.rate) == (2 / 2 + 2 / 8) / 2
    assert results.ratio(decode.ON, decode.OFF, decode.rate) == (2 + 8) / 2
    assert results.ratio(decode.ON, decode.HF, decode.rate) is None
    assert results.same((decode.ON,), decode.OFF) == 0, "one round differs"
    assert results.per(decode.ON, decode.size, lambda run: run.steps) == 1.5
