"""The families that are known to work, and a tiny model of each.

Tests run over them and docs/models.md lists them; with versions of other libraries that aren't tested a node or client
checks itself with those of its model's type (:mod:`swarm.model.family_check.check`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..layout import inner_boundaries

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LOCALS = ("sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention")


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        family: its name, for people.
        model_type: as in ``config.json``.
        options: fields of the config, beside or instead of :data:`SIZES`.
        quirks: what it has beyond a plain Llama.
        without: fields of :data:`SIZES` that its config doesn't have.
        name: of the test, if the model type alone doesn't tell it from others.
        seed: of the weights, such that greedy text varies.
    """

    family: str
    model_type: str
    quirks: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    name: str = ""
    seed: int = 3

    @property
    def label(self) -> str:
        return self.name or self.model_type

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Uneven spans, as far as blocks may be on different nodes."""
        inner = inner_boundaries(self.config())
        return tuple(itertools.pairwise(boundary for boundary in (0, 1, 4, 5) if boundary not in inner))

    def config(self) -> PreTrainedConfig:
        """A tiny one, float32."""
        values = {name: value for name, value in SIZES.items() if name not in self.without}
        return AutoConfig.for_model(self.model_type, **(values | {"dtype": "float32"} | self.options))


_GPTJ = {"n_embd": 64, "n_layer": 5, "n_head": 4, "rotary_dim": 8, "n_positions": 128}
_GPTJ_NAMES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
)
_DELTANET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "layer_types": [
        "linear_attention",
        "linear_attention",
        "linear_attention",
        "full_attention",
        "linear_attention",
    ],
}
_FALCON = {"hidden_dropout": 0.0, "bias": False}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "first_k_dense_replace": 2,
}
_GEMMA = {
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": list(LOCALS),
    "vocab_size_per_layer_input": 300,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CASES: tuple[Case, ...] = (
    Case("Llama 1, Llama 2, CodeLlama", "llama", "", {"num_key_value_heads": 4}, name="llama-2"),
    Case("Llama 3, 3.1, 3.2, 3.3", "llama", "grouped queries, scaled rotary frequencies",
         {"rope_parameters": _LLAMA3_ROPE}, name="llama-3.1"),
    Case("Llama 4 (text)", "llama4_text", "layers that see chunks of positions, between layers without rotary that see "
         "all and scale queries by position; experts",
         {"num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 96, "head_dim": 16,
          "attention_chunk_size": 8, "no_rope_layer_interval": 2, "floor_scale": 6, "attn_scale": 0.5}),
    Case("Mistral", "mistral", "sliding window", {"sliding_window": 8}),
    Case("Mixtral", "mixtral", "experts", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    Case("Qwen 2, 2.5", "qwen2", "biases in attention"),
    Case("Qwen 3", "qwen3", "normalized queries and keys", {"head_dim": 24}),
    Case("Qwen 3 MoE", "qwen3_moe", "experts", {**EXPERTS, "head_dim": 24, "norm_topk_prob": True}),
    Case("Qwen 3-Next", "qwen3_next", "gated DeltaNet layers with a state, between layers of attention; experts",
         {**EXPERTS, "head_dim": 16, "shared_expert_intermediate_size": 32, **_DELTANET}),
    Case("Gemma 2", "gemma2", "caps on logits, local layers between global ones, scaled embeddings",
         {"sliding_window": 8, "head_dim": 24, "query_pre_attn_scalar": 20, "pad_token_id": 0}),
    Case("Gemma 3 (text)", "gemma3_text", "local and global layers with rotary frequencies of their own, normalized "
         "queries and keys", {"sliding_window": 8, "head_dim": 24, "query_pre_attn_scalar": 20, "layer_types":
         list(LOCALS), "pad_token_id": 0}),
    Case("Gemma 3n (text)", "gemma3n_text", "blocks that use the keys and values of others, an input for each block, "
         "hidden states side by side, sparse activations", {**_GEMMA, "num_kv_shared_layers": 2, "laurel_rank": 8,
         "hidden_size_per_layer_input": 8, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0]}),
    Case("Gemma 4 E2B (text)", "gemma4_text", "blocks that use the keys and values of others, an input for each block, "
         "global layers with larger heads", {**_GEMMA, "num_kv_shared_layers": 2, "global_head_dim": 24,
         "hidden_size_per_layer_input": 8, "use_double_wide_mlp": True}, name="gemma4-e2b"),
    Case("Gemma 4 26B-A4B (text)", "gemma4_text", "global layers with larger and fewer heads, keys as values; "
         "experts", {**_GEMMA, "global_head_dim": 24, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
         "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
         "moe_intermediate_size": 32}, name="gemma4-26b"),
    Case("Gemma 4 unified (text)", "gemma4_unified_text", "global layers with larger and fewer heads",
         {**_GEMMA, "global_head_dim": 24, "num_global_key_value_heads": 1, "attention_k_eq_v": True}),
    Case("Phi 1, 1.5, 2", "phi", "rotary on a part of each head, attention and MLP in parallel",
         {"num_key_value_heads": 4}),
    Case("Phi 3, 3.5, 4", "phi3", "fused projections, sliding window", {"sliding_window": 8}),
    Case("gpt-oss", "gpt_oss", "sinks, local layers between global ones, experts",
         {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8}),
    Case("DeepSeek-V2", "deepseek_v2", "latent attention, shared experts",
         {**_MLA, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"}),
    Case("DeepSeek-V3, R1", "deepseek_v3", "latent attention, groups of experts, shared experts",
         {**_MLA, "n_group": 2, "topk_group": 1}),
    Case("GLM-4.7 Flash", "glm4_moe_lite", "latent attention, experts, shared experts",
         {**_MLA, "n_group": 1, "topk_group": 1}),
    Case("GLM-4", "glm4", "norms on both sides of each part", {"head_dim": 16, "pad_token_id": 0}, seed=6),
    Case("GLM-4.5, 4.6", "glm4_moe", "experts, shared experts, dense first blocks",
         {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "first_k_dense_replace": 2,
          "use_qk_norm": True, "head_dim": 16}),
    Case("Falcon 7B", "falcon", "one KV head, attention and MLP in parallel",
         {**_FALCON, "multi_query": True, "parallel_attn": True}, name="falcon-7b"),
    Case("Falcon 40B, 180B", "falcon", "grouped queries in one projection",
         {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, name="falcon-180b"),
    Case("Falcon RW", "falcon", "ALiBi",
         {"hidden_dropout": 0.0, "bias": True, "alibi": True, "multi_query": False, "parallel_attn": False},
         name="falcon-rw"),
    Case("Falcon-H1", "falcon_h1", "attention and Mamba side by side, multipliers",
         {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16,
          "ssm_multipliers": [0.9, 0.8, 1.1, 1.2, 0.7], "key_multiplier": 0.9, "ssm_in_multiplier": 1.5}),
    Case("BLOOM, BLOOMZ", "bloom", "ALiBi, normalized embeddings"),
    Case("GPT-NeoX, Pythia", "gpt_neox", "rotary on a part of each head, attention and MLP in parallel"),
    Case("GPT-J", "gptj", "rotary on pairs of neighbours in a part of each head", _GPTJ, _GPTJ_NAMES),
    Case("OPT", "opt", "learned positions", {"ffn_dim": 96, "dropout": 0.0, "pad_token_id": 0, "init_std": 0.15}),
    Case("OLMo 2", "olmo2", "norms behind each part"),
    Case("Command R7B, Command A", "cohere2", "local layers with rotary, global ones without",
         {"sliding_window": 8, "layer_types": list(LOCALS), "pad_token_id": 0, "logit_scale": 0.5}),
    Case("Granite", "granite", "multipliers", {"residual_multiplier": 0.7, "attention_multiplier": 0.2,
         "embedding_multiplier": 2.0, "logits_scaling": 2.0}),
    Case("StarCoder 2", "starcoder2", "biases, sliding window", {"sliding_window": 8}),
    Case("Gemma 1", "gemma", "scaled embeddings", {"head_dim": 16, "pad_token_id": 0}),
    Case("GLM-4 9B", "glm", "rotary on pairs of neighbours in a part of each head",
         {"head_dim": 16, "pad_token_id": 0}),
    Case("Command R, R+", "cohere", "attention and MLP in parallel", {"pad_token_id": 0, "logit_scale": 0.5}),
    Case("Qwen 1.5 MoE, 2 MoE", "qwen2_moe", "experts, a shared expert",
         {**EXPERTS, "shared_expert_intermediate_size": 32}),
    Case("Qwen 3.5 (text)", "qwen3_5_text", "gated DeltaNet layers with a state, between layers of attention",
         {"head_dim": 16, **_DELTANET}),
    Case("Granite MoE", "granitemoe", "experts, multipliers", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Case("Granite 4 hybrid", "granitemoehybrid", "Mamba 2 layers with a state, between layers of attention; experts",
         {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16, "num_local_experts": 4,
          "num_experts_per_tok": 2, "layer_types": ["mamba", "mamba", "attention", "mamba", "attention"]}),
    Case("OLMo 1", "olmo", "norms without weights"),
    Case("OLMo 3", "olmo3", "local layers between global ones, norms behind each part", {"sliding_window": 8}),
    Case("OLMoE", "olmoe", "experts", EXPERTS),
    Case("OLMo hybrid", "olmo_hybrid", "gated DeltaNet layers with a state, between layers of attention"),
    Case("GPT-2", "gpt2", "learned positions",
         {"n_embd": 64, "n_layer": 5, "n_head": 4, "n_positions": 128}, _GPTJ_NAMES),
    Case("SantaCoder, StarCoder 1", "gpt_bigcode", "one KV head, learned positions",
         {"n_embd": 64, "n_layer": 5, "n_head": 4, "n_positions": 128}, _GPTJ_NAMES),
    Case("SmolLM 3", "smollm3", "layers without rotary"),
    Case("Seed-OSS", "seed_oss", "", {"head_dim": 16}),
    Case("Ernie 4.5", "ernie4_5", "rotary on pairs of neighbours", seed=1),
    Case("EXAONE 4", "exaone4", "local layers with rotary, global ones without", {"sliding_window": 8}),
    Case("Phi 3.5 MoE", "phimoe", "experts", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Case("Ministral 3", "ministral3", "queries scaled by position", {"head_dim": 16}),
    Case("Apertus", "apertus", "an activation of its own"),
)  # fmt: skip
