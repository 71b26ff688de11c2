"""What can be asked of ``generate()``, and what comes of it over a swarm: each field of transformers' GenerationConfig,
and each argument of ``generate()``.

The test of this table fails by name where an installed transformers has one that isn't here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    PreTrainedModel,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    TextStreamer,
    WatermarkingConfig,
)

from swarm.compat.keywords import given_cache

EXACT = ""


@dataclass(frozen=True)
class Row:
    """One way to call ``generate()``.

    Attributes:
        names: the fields and arguments that it tries.
        options: what is passed; with :attr:`make` what that makes of the whole model and its tokenizer is added.
        outcome: :data:`EXACT`, that is as transformers on the whole model, or a part of the sentence that refuses it.
        rows: of the prompt; guesses are made for one.
    """

    names: str
    options: dict[str, Any]
    outcome: str = EXACT
    make: Callable[[PreTrainedModel, Any], dict[str, Any]] = lambda whole, tokenizer: {}
    rows: int = 2


def _with_tokenizer(whole: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    return {"tokenizer": tokenizer}


def _assistant(**settings: Any) -> Callable[[PreTrainedModel, Any], dict[str, Any]]:
    """A small model with the same tokens that is often wrong."""

    def make(whole: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
        draft = copy.deepcopy(whole)
        draft.model.layers = draft.model.layers[:7]  # type: ignore[union-attr, index]
        draft.config.num_hidden_layers = 7
        draft.generation_config.update(**settings)
        return {"assistant_model": draft}

    return make


def _other_tokenizer(whole: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.add_tokens(["one more"])
    config = LlamaConfig(
        **{**whole.config.to_dict(), "vocab_size": len(other), "num_hidden_layers": 1, "tie_word_embeddings": False}
    )
    torch.manual_seed(3)
    return {
        "assistant_model": LlamaForCausalLM(config).eval(),
        "tokenizer": tokenizer,
        "assistant_tokenizer": other,
    }


def _negative(whole: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    return {
        "negative_prompt_ids": torch.tensor([[2, 2, 9, 30], [40, 41, 42, 43]]),
        "negative_prompt_attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
    }


def _own_loop(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """A decoding method as somebody may write it: every second token is the second best."""
    kwargs.pop("logits_processor")
    kwargs.pop("stopping_criteria")
    config = kwargs.pop("generation_config")
    while input_ids.shape[1] < config.max_length:
        done = given_cache(kwargs).get_seq_length()
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=input_ids.shape[1] - done, is_first_iteration=not done, **kwargs
        )
        outputs = model(**inputs, return_dict=True)
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        best = outputs.logits[:, -1].topk(2).indices
        input_ids = torch.cat([input_ids, best[:, input_ids.shape[1] % 2, None]], dim=1)
    return input_ids


def _criterion(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
    return torch.full((len(ids),), ids.shape[1] >= 7)


ON_NODES = "stays on the nodes"
FROM_THE_HUB = "trust_remote_code"  # moved out of transformers, which says so
SAMPLE: dict[str, Any] = {"do_sample": True}
BEAMS: dict[str, Any] = {"num_beams": 3}

TABLE = [
    # how long
    Row("max_new_tokens", {"max_new_tokens": 9}),
    Row("max_length", {"max_length": 11, "max_new_tokens": None}),
    Row("min_length", {"min_length": 9, "eos_token_id": list(range(0, 2048, 3))}),
    Row("min_new_tokens", {"min_new_tokens": 4, "eos_token_id": list(range(0, 2048, 3))}),
    Row("max_time", {"max_time": 1e-9}),
    Row("stop_strings tokenizer", {"stop_strings": ["e", "t"]}, make=_with_tokenizer),
    # how
    Row("do_sample temperature", {**SAMPLE, "temperature": 0.7}),
    Row("top_k", {**SAMPLE, "top_k": 5}),
    Row("top_p", {**SAMPLE, "top_p": 0.8}),
    Row("min_p", {**SAMPLE, "min_p": 0.1}),
    Row("top_h", {**SAMPLE, "top_h": 0.4}),
    Row("typical_p", {**SAMPLE, "typical_p": 0.6}),
    Row("epsilon_cutoff", {**SAMPLE, "epsilon_cutoff": 0.02}),
    Row("eta_cutoff", {**SAMPLE, "eta_cutoff": 0.02}),
    Row("renormalize_logits", {**SAMPLE, "renormalize_logits": True, "top_p": 0.7}),
    Row("num_return_sequences", {**SAMPLE, "num_return_sequences": 3}),
    Row("num_beams", BEAMS),
    Row("num_beams num_return_sequences", {**BEAMS, "num_return_sequences": 2}),
    Row("num_beams do_sample", {**BEAMS, **SAMPLE}),
    Row("early_stopping length_penalty", {**BEAMS, "early_stopping": True, "length_penalty": 0.3}),
    Row("repetition_penalty", {"repetition_penalty": 1.5}),
    Row("encoder_repetition_penalty", {"encoder_repetition_penalty": 1.5}),
    Row("no_repeat_ngram_size", {"no_repeat_ngram_size": 2}),
    Row("encoder_no_repeat_ngram_size", {"encoder_no_repeat_ngram_size": 2}),
    Row("bad_words_ids", {"bad_words_ids": [[431], [504, 71]]}),
    Row("sequence_bias", {"sequence_bias": [[[431], -5.0], [[12], 9.0]]}),
    Row("suppress_tokens begin_suppress_tokens", {"suppress_tokens": [431], "begin_suppress_tokens": [504]}),
    Row("forced_bos_token_id forced_eos_token_id", {"forced_bos_token_id": 5, "forced_eos_token_id": 6}),
    Row("exponential_decay_length_penalty", {"exponential_decay_length_penalty": (2, 1.6), "eos_token_id": 16}),
    Row("remove_invalid_values", {"remove_invalid_values": True}),
    Row("watermarking_config", {"watermarking_config": WatermarkingConfig(bias=4.0)}),
    Row(
        "watermarking_config",
        {**SAMPLE, "watermarking_config": SynthIDTextWatermarkingConfig(keys=[3, 5, 7], ngram_len=3)},
    ),
    Row("token_healing", {"token_healing": True, "pad_token_id": 2, "eos_token_id": 1}, make=_with_tokenizer),
    Row("guidance_scale", {"guidance_scale": 1.5}),
    Row("guidance_scale", {"guidance_scale": 1.5, "max_new_tokens": 1}),
    Row("guidance_scale num_beams", {"guidance_scale": 1.5, **BEAMS}),
    Row("guidance_scale use_cache", {"guidance_scale": 1.5, "use_cache": False}),
    Row(
        "guidance_scale negative_prompt_ids negative_prompt_attention_mask",
        {"guidance_scale": 2.0, **SAMPLE},
        make=_negative,
    ),
    Row(
        "guidance_scale",
        {"guidance_scale": 2.0, "prompt_lookup_num_tokens": 2},
        "guesses that were not accepted",
        rows=1,
    ),
    Row("pad_token_id bos_token_id eos_token_id", {"pad_token_id": 7, "bos_token_id": 0, "eos_token_id": 431}),
    Row("prefill_chunk_size", {"prefill_chunk_size": 2}),
    Row("use_mtp", {"use_mtp": True}, "stay on the nodes", rows=1),
    # moved to the Hub
    Row("penalty_alpha", {"penalty_alpha": 0.6, "top_k": 4}, FROM_THE_HUB),
    Row("dola_layers", {"dola_layers": "low"}, FROM_THE_HUB),
    Row(
        "num_beam_groups diversity_penalty",
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        FROM_THE_HUB,
    ),
    Row("constraints", {"constraints": ["any"], **BEAMS}, FROM_THE_HUB),
    Row("force_words_ids", {"force_words_ids": [[5]], **BEAMS}, FROM_THE_HUB),
    # what comes back
    Row(
        "return_dict_in_generate output_scores output_logits",
        {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    ),
    Row(
        "return_dict_in_generate output_scores",
        {"return_dict_in_generate": True, "output_scores": True, **BEAMS},
    ),
    Row("output_attentions", {"output_attentions": True, "return_dict_in_generate": True}, ON_NODES),
    Row("output_hidden_states", {"output_hidden_states": True, "return_dict_in_generate": True}, ON_NODES),
    # the cache, and speed: of no effect on what comes out
    Row("use_cache", {"use_cache": False}),
    Row("cache_implementation", {"cache_implementation": "static"}, "on the nodes of the swarm"),
    Row("cache_implementation", {"cache_implementation": "dynamic"}, "on the nodes of the swarm"),
    Row("cache_implementation", {"cache_implementation": "paged"}, "continuous batching is the nodes' work"),
    Row("cache_config max_cache_len", {"cache_config": {"nbits": 4}, "max_cache_len": 64}),
    Row("compile_config", {"compile_config": CompileConfig()}),
    Row("disable_compile", {"disable_compile": True}),
    Row("continuous_batching_config", {"continuous_batching_config": ContinuousBatchingConfig()}),
    Row("low_memory", {"low_memory": True}),
    Row("decoder_start_token_id", {"decoder_start_token_id": 3}),  # of models with an encoder
    Row("synced_gpus", {"synced_gpus": True}, "torch.distributed"),
    # guesses
    Row("prompt_lookup_num_tokens", {"prompt_lookup_num_tokens": 3}, rows=1),
    Row("prompt_lookup_num_tokens do_sample", {"prompt_lookup_num_tokens": 3, **SAMPLE}, rows=1),
    Row("max_matching_ngram_size", {"prompt_lookup_num_tokens": 9, "max_matching_ngram_size": 1}, rows=1),
    Row("assistant_model", {}, make=_assistant(), rows=1),
    Row("assistant_model do_sample", SAMPLE, make=_assistant(), rows=1),
    Row(
        "num_assistant_tokens num_assistant_tokens_schedule",
        {},
        make=_assistant(num_assistant_tokens=3, num_assistant_tokens_schedule="heuristic"),
        rows=1,
    ),
    Row("assistant_confidence_threshold", {}, make=_assistant(assistant_confidence_threshold=0.3), rows=1),
    Row("assistant_ensemble_weight", {"assistant_ensemble_weight": 0.5}, make=_assistant(), rows=1),
    Row(
        "assistant_tokenizer tokenizer assistant_lookbehind target_lookbehind",
        {"assistant_lookbehind": 4, "target_lookbehind": 4},
        make=_other_tokenizer,
        rows=1,
    ),
    Row("speculation_type", {"speculation_type": "dflash"}),  # without an assistant it says nothing
    Row("assistant_early_exit", {"assistant_early_exit": 4}, "a route goes through all of them", rows=1),
    Row("is_assistant", {"is_assistant": True}, "a model on this machine", rows=1),
    # other arguments
    Row("generation_config", {"generation_config": GenerationConfig(max_new_tokens=5, repetition_penalty=1.3)}),
    Row("logits_processor", {"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(30, list(range(99)))])}),
    Row("stopping_criteria", {"stopping_criteria": StoppingCriteriaList([_criterion])}),  # type: ignore[list-item]
    Row("prefix_allowed_tokens_fn", {"prefix_allowed_tokens_fn": lambda row, ids: [8 + row, 20 + len(ids)], **BEAMS}),
    Row("streamer", {}, make=lambda whole, tokenizer: {"streamer": TextStreamer(tokenizer)}, rows=1),
    Row("custom_generate", {"custom_generate": _own_loop}),
]

FIELDS = set(vars(GenerationConfig()))
"""Of the transformers that is installed."""

NO_GENERATION = {"transformers_version"}
"""Of these, what says nothing about generating; neither do those that begin with an underscore."""

HANDLED_ELSEWHERE = {"self", "inputs", "kwargs"}
"""Arguments of ``generate()`` that every row has."""


def arguments() -> set[str]:
    """Those of ``generate()``."""
    import inspect

    return set(inspect.signature(GenerationMixin.generate).parameters)
