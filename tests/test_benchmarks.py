"""The benchmarks run, write what they promise, and have prompts of every kind."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from benchmarks import decode, drafting, harness, invariance, kv, lora, serving, step
from benchmarks.peers import __main__ as peers
from benchmarks.peers import assembly, foreign, results

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


def test_lora_compares_mixed_batches_and_times_swaps(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "lora.json"
    lora.main(["--quick", "--model", str(tiny), "--tokens", "4", "--dtype", "float32", "--json", str(file)])
    bars = _bars(file)
    assert {"mixed_vs_base", "mixed_vs_peft", "swap_ms_resident", "swap_ms_cold"} <= set(bars)
    assert bars["identical"] == 1
    assert bars["mixed_vs_peft"] > 0


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


def test_drafting_compares_drafters_and_budgets(tiny: Path, tmp_path: Path) -> None:
    """Lookup alone and with a draft model; lines as Spec-Bench writes them."""
    lines = [
        {"question_id": n, "category": category, "turns": [f"{n} one two three one two three one two", "and then?"]}
        for n, category in enumerate(("qa", "qa", "rag"))
    ]
    prompts, file = tmp_path / "prompts.jsonl", tmp_path / "drafting.json"
    prompts.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    asked = ["--drafters", "prompt-lookup", "prompt-lookup+draft-model", "--draft-model", str(tiny)]
    sizes = ["--tokens", "8", "--batches", "1", "16", "--prompts", str(prompts)]
    drafting.main(["--quick", "--model", str(tiny), "--json", str(file), *asked, *sizes])
    wanted = {"al_merged", "on_vs_off_b1", "on_vs_off_b16", "worst_category", "useless_drafter_cost"}
    assert set(_bars(file)) == wanted, "there is no head"
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"]
    systems = {"off", "prompt-lookup", "prompt-lookup+draft-model", "prompt-lookup+draft-model+echo"}
    fixed = {"prompt-lookup, 32 nodes", "prompt-lookup+draft-model, 32 nodes"}
    assert {run["system"] for run in runs if run["batch"] == 1} == systems | fixed
    assert {run["system"] for run in runs if run["batch"] == 16} == systems
    assert {run["prompt"] for run in runs if run["batch"] == 1} == {"0", "2"}, "one of each category"
    for run in runs:
        texts = 1 if run["batch"] == 1 else 16
        assert texts <= run["tokens"] <= 8 * texts
        assert 0 < run["steps"] <= run["tokens"]
        assert run["verified"] <= 32 * run["steps"] or not run["system"].endswith("nodes")
        assert set(run["offered"]) == ({*run["system"].partition(",")[0].split("+")} - {"off"})
        assert run["verifying_milliseconds"] > 0
    draft = [run for run in runs if run["system"] == "prompt-lookup+draft-model, 32 nodes" and run["mode"] == "greedy"]
    assert all(run["accepted"]["draft-model"] > 0 for run in draft), "the model drafts for itself"


def test_a_sample_is_the_first_of_each_category_in_turns() -> None:
    prompts = [harness.Prompt(f"{c}{n}", c, (1,)) for c in ("qa", "rag") for n in range(3)]
    assert [p.id for p in drafting.sample(prompts, 2, None)] == ["qa0", "rag0", "qa1", "rag1"]
    assert [p.id for p in drafting.sample(prompts, 2, 3)] == ["qa0", "rag0", "qa1"]
    groups = drafting.batches(prompts[:3], 2)
    assert [[p.id for p in group] for group in groups.values()] == [["qa0", "qa1"], ["qa2", "qa0"]]


def test_combinations_are_each_drafter_and_all_unless_they_are_named() -> None:
    offered = ["prediction", "a", "b", "echo"]
    assert drafting.combinations(None, offered) == [("a",), ("b",), ("a", "b")]
    assert drafting.combinations(["a+echo", "b"], offered) == [("a", "echo"), ("b",)]
    with pytest.raises(SystemExit, match="'c'; there are: prediction, a, b, echo"):
        drafting.combinations(["a+c"], offered)


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


ECHO = """
PIP = ()
ONE = MANY = ("plain", "lookup 10", "broken")

class Peer:
    def __init__(self, model, home, options):
        print("a library talks")
        if options["dtype"] != "bfloat16":
            raise ValueError("only\\nbfloat16")

    def run(self, prompts, tokens, setting, clock):
        if setting == "broken":
            raise RuntimeError("no such thing")
        for row, ids in enumerate(prompts):
            clock.note(row, [])
            for token in ids[:tokens]:
                clock.note(row, [token])
"""


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A peers folder in which `echo`, which repeats its prompt, is installed and `absent` is not."""
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "echo.py").write_text(ECHO, encoding="utf-8")
    (adapters / "absent.py").write_text(ECHO, encoding="utf-8")
    monkeypatch.setattr(foreign, "ADAPTERS", adapters)
    (tmp_path / "echo" / "bin").mkdir(parents=True)
    (tmp_path / "echo" / "bin" / "python").symlink_to(sys.executable)
    return tmp_path


def test_a_peer_answers_with_ids_and_times_of_its_own_process(echo: Path) -> None:
    (peer,) = (adapter for adapter in foreign.peers(echo) if adapter.name == "echo")
    process = foreign.Process(peer, Path("model"), {"threads": 1, "dtype": "bfloat16"})
    prompts = [harness.Prompt("a", "qa", (5, 6, 7)), harness.Prompt("b", "qa", (8,))]
    run = process.one(2, "plain", prompts[0])
    assert (run.ids, run.early) == ((5, 6), 1)
    assert 0 <= run.first <= run.seconds
    assert process.many(2, "plain", prompts).ids == (5, 6, 8)
    with pytest.raises(foreign.PeerFailed, match="RuntimeError: no such thing"):
        process.one(2, "broken", prompts[0])
    assert process.one(2, "lookup 10", prompts[1]).ids == (8,), "it goes on after an error"
    process.close()
    with pytest.raises(foreign.PeerFailed, match="^ValueError: only bfloat16$"):
        foreign.Process(peer, Path("model"), {"threads": 1, "dtype": "float32"})


def test_peers_that_are_absent_or_fail_are_named_and_the_rest_has_bars(
    echo: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = echo / "peers.json"
    systems = ["--systems", "echo", "absent", "specgen eager", "transformers generate"]
    sizes = ["--limit", "2", "--tokens", "8", "--batches", "2"]
    peers.main(["--quick", "--model", str(tiny), "--peers", str(echo), "--json", str(file), *systems, *sizes])
    written = json.loads(file.read_text(encoding="utf-8"))
    wanted = {"vs_hf_generate", "vs_best_hf", "off_vs_hf_generate", "on_vs_off_chat", "vs_echo", "off_vs_echo"}
    wanted |= {"vs_echo_chat", "batch2_vs_hf", "batch2_vs_echo", "batch2_on_vs_off"}
    assert wanted <= set(written["bars"])
    assert not any("absent" in bar for bar in written["bars"])
    skipped = written["settings"]["skipped"]
    assert set(skipped) == {"absent plain", "absent lookup 10", "absent broken", "echo broken"}
    assert skipped["absent plain"] == "not installed: python -m benchmarks.peers --install absent"
    assert len(written["runs"]) == (2 + 1) * 5, "two prompts and a batch, five systems that run"
    assert "RuntimeError: no such thing" in capsys.readouterr().out
    assert file.with_suffix(".png").stat().st_size > 1000


def test_bars_of_peers_take_the_best_rival_of_each_category() -> None:
    def sample(system: str, category: str, rate: int) -> harness.Sample[decode.Run]:
        run = decode.Run((1,) * (rate + 1), first=1.0, seconds=2.0, early=1, steps=0, forwards=0)
        return harness.Sample(0, system, harness.Prompt(category, category, (1,)), run)

    rates = {results.EAGER_ON: (6, 12), results.EAGER_OFF: (6, 6), "x plain": (3, 3), "x lookup": (2, 4)}
    samples = [sample(name, c, n) for name, each in rates.items() for c, n in zip(("chat", "qa"), each, strict=True)]
    bars = results.headline(decode.Results(samples, list(rates)), decode.Results([]), ["x", "y"])
    assert (bars["vs_x_chat"], bars["vs_x_qa"], bars["vs_x"]) == (2, 3, 2.5)
    assert (bars["off_vs_x"], bars["on_vs_off_chat"], bars["vs_y"]) == (2, 1, None)


def test_a_system_is_meant_by_the_first_words_of_its_name() -> None:
    assert assembly.means("specgen", "specgen eager off")
    assert assembly.means("specgen eager off", "specgen eager off")
    assert not assembly.means("specgen e", "specgen eager off")


def test_serving_compares_two_servers_with_one_client(tiny: Path, tmp_path: Path) -> None:
    """The peer is our own server without drafting."""
    file = tmp_path / "serving.json"
    peer = "{python} -m specgen serve {model} --port {port} --dtype {dtype} --speculation off"
    options = ["--peer", peer, "--clients", "1", "3", "--requests", "4", "--engine", '{"kv_tokens": 4096}']
    serving.main(["--quick", "--model", str(tiny), "--dtype", "float32", "--json", str(file), *options])
    bars = _bars(file)
    assert set(bars) == {"ours_vs_tf_c1", "ours_vs_tf_c3", "errors"}
    assert bars["errors"] == 0
    assert bars["ours_vs_tf_c3"] > 0
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"]
    assert [(run["system"], run["clients"], run["errors"]) for run in runs] == [
        (name, clients, 0) for clients in (1, 3) for name in (serving.OURS, serving.PEER)
    ]


def test_no_server_is_asked_the_same_twice() -> None:
    deck = serving._deck(["a", "b"])
    assert [next(deck) for _ in range(5)] == ["a", "b", "2. a", "2. b", "3. a"]
