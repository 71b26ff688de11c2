"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): the cache holds each token's latent, not its heads.

All heads' keys and values are linear in one latent of a token. So a query can be taken to the latent's space instead,
and the result from there to the head: what attention sees is one KV head, the latent and beside it the key's rotary
part (which all heads share). The same tensor is key and value; of the result the rotary part is left out.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ...compat.attention import attention_of, choose_attention, register_attention
from .base import Family

_LATENT = "swarm_latent"


class _Expansion(nn.Linear):
    """Of a latent to all heads' keys and values. Used by its weights alone, so its class says not to repack them."""


def _keep_latents(latent: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[1, 1, N, rank]`` and ``[1, 1, N, rotary_dim]`` as one, which is key and value."""
    both = torch.cat([latent, rotary], dim=-1)
    return both, both


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """``query`` ``[1, heads, N, nope + rotary_dim]``, ``key`` and ``value`` ``[1, 1, N, rank + rotary_dim]``; returns
    ``[1, N, heads, v]``."""
    config: Any = module.config
    weight: Any = module.kv_b_proj.weight  # type: ignore[union-attr]
    to_key, to_value = weight.unflatten(0, (query.shape[1], -1)).split([config.qk_nope_head_dim, config.v_head_dim], 1)
    plain, rotary = query.split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
    query = torch.cat([plain @ to_key, rotary], dim=-1)
    output, _ = attention_of(module.model_config)(module, query, key, value, attention_mask, **options)
    latents = output[..., : config.kv_lora_rank].transpose(1, 2)  # [1, heads, N, rank]
    return (latents @ to_value.transpose(1, 2)).transpose(1, 2), None


register_attention(_LATENT, _attend)


class LatentFamily(Family):
    """DeepSeek-V2 and V3, and those built like them."""

    def adapt(self, block: nn.Module, config: PreTrainedConfig) -> None:
        attention: Any = block.self_attn
        if not hasattr(attention, "expand_kv"):  # in older versions of transformers; the cache holds the heads then
            return
        # in place: everything but the name of its class stays
        attention.kv_b_proj.__class__ = _Expansion
        attention.expand_kv = _keep_latents
        attention.model_config = config
        attention.config = copy.copy(config)
        choose_attention(attention.config, _LATENT)
