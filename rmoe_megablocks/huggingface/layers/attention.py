"""Grouped-query attention with rotary positions, through the library's attention interface."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..cache import takes_both_names
from ..configuration import RmoeConfig


class RmoeRotaryEmbedding(nn.Module):
    """cos and sin [B, S, D] for all layers; D is the rotated part of a head, ``partial_rotary_factor`` of it."""

    def __init__(self, config: RmoeConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        of_type = self.compute_default_rope_parameters
        if self.rope_type != "default":
            of_type = ROPE_INIT_FUNCTIONS[self.rope_type]
        frequencies, self.attention_scaling = of_type(config)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.register_buffer("original_inv_freq", frequencies.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: RmoeConfig, *args, **kwargs) -> tuple[Tensor, float]:
        """Frequencies [D / 2] and a factor of 1; the library calls it by this name to draw the buffers anew."""
        rope = config.rope_parameters
        rotated = int(config.head_dim * (rope.get("partial_rotary_factor") or 1.0))
        exponents = torch.arange(0, rotated, 2, dtype=torch.float) / rotated
        return rope["rope_theta"] ** -exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update  # types whose frequencies depend on the length
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids [B, S] -> cos, sin [B, S, D] in the dtype of ``x``, computed in fp32."""
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        return tuple((f(angles) * self.attention_scaling).to(x.dtype) for f in (torch.cos, torch.sin))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, S, head_dim] turned by its positions: the i-th number of a head goes with the i + D/2-th."""
    rotated, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """In torch's operations: query [B, heads, S, D], key and value [B, groups, L, D] -> [B, S, heads, D], weights."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class RmoeAttention(nn.Module):
    """One layer's attention; ``config._attn_implementation`` says by which function."""

    is_causal = True

    def __init__(self, config: RmoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        bias = config.attention_bias
        queries, groups = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, groups, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, groups, bias=bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None

    @takes_both_names
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, S, H] -> [B, S, H], and the attention's weights where its function has them."""
        shape = hidden_states.shape[:-1]
        query, key, value = (
            project(hidden_states).view(*shape, -1, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        query, key = (rotate(x, *position_embeddings) for x in (query, key))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*shape, -1)), weights
