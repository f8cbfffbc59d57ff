"""OpenVINO GenAI on the CPU: bfloat16 weights and inference, everything else as it comes.

Weights go through optimum-intel, which keeps their type: a bfloat16 copy of the model makes a bfloat16 IR. Streams of
one run in `LLMPipeline`, batches in `ContinuousBatchingPipeline`; each with and without prompt lookup, since a pipeline
with it refuses to go without.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# optimum-intel 2.2 knows transformers up to 5.5.
PIP = (("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "transformers==5.5.4", "nncf==3.4.0"),)
DRAFTS = {"plain": 0, "lookup 10": 10, "lookup 5": 5}
ONE = MANY = tuple(DRAFTS)

_NGRAM = 3
_CACHE_GB = 2
_MOST_STREAMS = 256


def prepare(model: Path, home: Path) -> None:
    """Convert the model, once."""
    if (home / model.name / "openvino_model.bin").exists():
        return
    import torch
    from optimum.exporters.openvino import main_export
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with TemporaryDirectory(dir=home) as scratch:
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(scratch)
        AutoTokenizer.from_pretrained(model).save_pretrained(scratch)
        built = Path(scratch) / model.name
        main_export(scratch, output=built, task="text-generation-with-past", library_name="transformers")
        built.rename(home / model.name)


class Peer:
    """The pipelines, each made when it is first asked for."""

    def __init__(self, model: Path, home: Path, options: dict[str, Any]) -> None:
        import openvino_genai

        if options["dtype"] != "bfloat16":
            raise ValueError("only bfloat16 is prepared here")
        self.genai: Any = openvino_genai
        self.folder = home / model.name
        if not self.folder.exists():
            raise FileNotFoundError(f"{model.name} is not converted: run --install openvino_genai with this model")
        self.properties = {"INFERENCE_NUM_THREADS": options["threads"], "INFERENCE_PRECISION_HINT": "bf16"}
        config = json.loads((self.folder / "generation_config.json").read_text(encoding="utf-8"))
        eos = config["eos_token_id"]
        self.eos: list[int] = eos if isinstance(eos, list) else [eos]
        self._pipes: dict[tuple[bool, bool], Any] = {}

    def run(self, prompts: Sequence[Sequence[int]], tokens: int, setting: str, clock: Any) -> None:
        """Greedy, to the end token or the budget."""
        config = self._config(tokens, DRAFTS[setting])
        pipe = self._pipe(batch=len(prompts) > 1, lookup=DRAFTS[setting] > 0)
        inputs = [_tensor(ids) for ids in prompts]
        if len(inputs) == 1:
            pipe.generate(inputs[0], config, _streamer(self.genai, clock))
            return
        for row, result in enumerate(pipe.generate(inputs, [config] * len(inputs))):
            clock.note(row, list(result.m_generation_ids[0]))

    def _config(self, tokens: int, drafts: int) -> Any:
        config = self.genai.GenerationConfig()
        config.do_sample = False
        config.max_new_tokens = tokens
        # Said here since a pipeline with lookup forgets the model's own.
        config.eos_token_id = self.eos[0]
        config.stop_token_ids = set(self.eos)
        if drafts:
            config.num_assistant_tokens = drafts
            config.max_ngram_size = _NGRAM
        return config

    def _pipe(self, *, batch: bool, lookup: bool) -> Any:
        if (batch, lookup) not in self._pipes:
            self._pipes[batch, lookup] = self._open(batch, lookup)
        return self._pipes[batch, lookup]

    def _open(self, batch: bool, lookup: bool) -> Any:
        scheduler = self.genai.SchedulerConfig()
        scheduler.cache_size = _CACHE_GB
        scheduler.max_num_seqs = _MOST_STREAMS
        scheduler.enable_prefix_caching = False  # the same prompts come round after round
        extra: Mapping[str, Any] = {"prompt_lookup": True} if lookup else {}
        if batch:
            properties = {**self.properties, **extra}
            return self.genai.ContinuousBatchingPipeline(
                str(self.folder), scheduler_config=scheduler, device="CPU", properties=properties
            )
        if lookup:
            return self.genai.LLMPipeline(
                str(self.folder), "CPU", scheduler_config=scheduler, **extra, **self.properties
            )
        return self.genai.LLMPipeline(str(self.folder), "CPU", **self.properties)


def _tensor(ids: Sequence[int]) -> Any:
    import numpy
    import openvino

    return openvino.Tensor(numpy.array([ids], dtype=numpy.int64))


def _streamer(genai: Any, clock: Any) -> Any:
    class Streamer(genai.StreamerBase):  # type: ignore[misc]
        def write(self, token: int | Sequence[int]) -> Any:
            clock.note(0, [token] if isinstance(token, int) else list(token))
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    return Streamer()
