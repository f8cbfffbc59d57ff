"""An EAGLE-3 head (Li et al. 2025): one decoder layer over the target's own hidden states, and a small vocabulary.

Entry t pairs what the target computed at position t with the token at position t + 1 and says what comes at t + 2.
Where the target has not been, the head's own output stands in for the target's states; a parallel head instead looks
ahead from the last entry that the target has computed.
"""

from __future__ import annotations

from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding, apply_rotary_pos_emb

from specgen import linears_together


class HeadConfig(msgspec.Struct, frozen=True, kw_only=True):
    """layers: the hidden states it reads, as transformers counts them. target_width: their width. vocabulary: how many
    tokens it can say. layer: its decoder layer, as a LlamaConfig's fields. norm_first: whether the residual path of the
    states begins behind their norm. parallel: how many tokens it says in one forward."""

    layers: tuple[int, ...]
    target_width: int
    vocabulary: int
    layer: dict[str, Any]
    norm_first: bool = False
    parallel: int = 1


class EagleHead(nn.Module):
    """Parameters under the names of the public EAGLE-3 checkpoints' layer, and in a parallel head `ahead` and
    `transition`; rows are packed, [rows, width]."""

    d2t: Tensor

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        layer: Any = LlamaConfig(**config.layer)
        width: int = layer.hidden_size
        self.head_dim: int = layer.head_dim
        self.heads: int = layer.num_attention_heads
        self.kv_heads: int = layer.num_key_value_heads
        norm = layer.rms_norm_eps
        self.fc = nn.Linear(len(config.layers) * config.target_width, width, bias=False)
        self.input_layernorm = nn.RMSNorm(width, norm)
        self.hidden_norm = nn.RMSNorm(width, norm)
        self.q_proj = nn.Linear(2 * width, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(2 * width, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(2 * width, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, width, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(width, norm)
        self.mlp = LlamaMLP(layer)
        self.norm = nn.RMSNorm(width, norm)
        self.lm_head = nn.Linear(width, config.vocabulary, bias=False)
        self.rotary = LlamaRotaryEmbedding(layer)
        if config.parallel > 1:
            self.ahead = nn.Linear(width, (config.parallel - 1) * width, bias=False)
            self.transition = Transition(width, norm)
        self.register_buffer("d2t", torch.zeros(config.vocabulary, dtype=torch.int64))

    @property
    def tokens(self) -> Tensor:
        """int64[vocabulary]: the target's ids of what the head can say."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def fuse(self, states: Tensor) -> Tensor:
        """[..., layers * target_width] of the target to [..., width] of the head."""
        fused: Tensor = self.fc(states)
        return fused

    def look_ahead(self, states: Tensor) -> Tensor:
        """[..., width] of entries to [..., parallel - 1, width]: what stands in for the states of those that follow."""
        further: Tensor = self.ahead(states).unflatten(-1, (self.config.parallel - 1, -1))
        return states[..., None, :] + further

    def project(self, embedded: Tensor, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query [..., heads, rows, head_dim], key and value [..., kv_heads, rows, head_dim], and the residual path.

        embedded, states: [..., rows, width]: the token's embedding, and the states before it. positions: [..., rows].
        """
        normed = self.hidden_norm(states)
        x = torch.cat([self.input_layernorm(embedded), normed], dim=-1)
        query, key, value = (
            rows.unflatten(-1, (-1, self.head_dim)).transpose(-2, -3)
            for rows in linears_together(x, (self.q_proj, self.k_proj, self.v_proj))
        )
        lead = positions if positions.ndim > 1 else positions[None]
        cos, sin = self.rotary(x, lead)
        if positions.ndim == 1:
            cos, sin = cos[0], sin[0]
        query, key = apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=-3)
        return query, key, value, normed if self.config.norm_first else states

    def finish(self, attended: Tensor, residual: Tensor) -> Tensor:
        """[..., heads, rows, head_dim] attended: [..., rows, width], which stands in for the target's states."""
        states = residual + self.o_proj(attended.transpose(-2, -3).flatten(-2))
        mlp = self.mlp
        gate, up = linears_together(self.post_attention_layernorm(states), (mlp.gate_proj, mlp.up_proj))
        fed: Tensor = states + mlp.down_proj(mlp.act_fn(gate) * up)
        return fed

    def logits(self, states: Tensor) -> Tensor:
        """[..., vocabulary]."""
        scores: Tensor = self.lm_head(self.norm(states))
        return scores


class Transition(nn.Module):
    """What a parallel head's states become once the two tokens before are known, as in Hydra (Ankner et al. 2024)."""

    def __init__(self, width: int, norm: float) -> None:
        super().__init__()
        inner = 2 * width // 3
        self.norm = nn.RMSNorm(width, norm)
        self.token_norm = nn.RMSNorm(width, norm)
        self.states_proj = nn.Linear(width, inner, bias=False)
        self.tokens_proj = nn.Linear(2 * width, inner, bias=False)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, states: Tensor, last: Tensor, before: Tensor) -> Tensor:
        """[..., width] all: states, embeddings of the token before, and of the one before that."""
        return self.behind(states, self.of_states(states), last, before)

    def of_states(self, states: Tensor) -> Tensor:
        """The share that needs no tokens, [..., inner]."""
        projected: Tensor = self.states_proj(self.norm(states))
        return projected

    def behind(self, states: Tensor, projected: Tensor, last: Tensor, before: Tensor) -> Tensor:
        """The states behind two tokens; `projected` is what `of_states` gave."""
        tokens = torch.cat([self.token_norm(last), self.token_norm(before)], dim=-1)
        changed: Tensor = self.out_proj(F.silu(projected + self.tokens_proj(tokens)))
        return states + changed
