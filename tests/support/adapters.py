"""Random adapters for tiny models, and what peft says under them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

ATTENTION = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "phi3": ["qkv_proj", "gate_up_proj", "o_proj"],
    "gemma2": ["q_proj", "k_proj", "o_proj", "up_proj"],
    "qwen3_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "opt": ["q_proj", "v_proj", "fc1", "fc2"],
}
"""Of families with linear layers, Conv1D, fused layers, experts and biases: modules to adapt."""


def save_adapter(model: PreTrainedModel, folder: Path, *, seed: int = 0, scale: float = 0.4, **config: Any) -> Path:
    """Save an adapter of noise that decides; `config` is LoraConfig's. The model stays as it is."""
    chosen = {"target_modules": ATTENTION.get(model.config.model_type), "r": 4, "lora_alpha": 8, **config}
    torch.manual_seed(seed)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **chosen))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                weight.normal_(std=scale)
            elif "magnitude" in name:
                weight *= 1 + 0.3 * torch.rand_like(weight)
    adapted.save_pretrained(folder)
    return folder


def by_peft(
    model: PreTrainedModel, folder: Path | None, prompt: Sequence[int], tokens: int, *, merged: bool = False
) -> tuple[int, ...]:
    """What transformers' own greedy generate says under the adapter, or the model that it is merged into."""
    told = copy.deepcopy(model)
    if folder is not None:
        told = PeftModel.from_pretrained(told, folder).eval()
        told = told.merge_and_unload() if merged else told
    ids = torch.tensor([list(prompt)])
    found = told.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
    )
    return tuple(found[0, len(prompt) :].tolist())
