"""What can't be served says so by name, before anything is loaded; nothing is served wrong."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from swarm.errors import ModelError
from swarm.model.family_check.table import SIZES
from swarm.model.loading import load_span
from swarm.model.source import resolve
from tests.models import make_checkpoint

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mpt": ({"d_model": 64, "n_layers": 5, "n_heads": 4}, "wants to be called in another way"),
    "gpt_neo": ({"num_layers": 5, "attention_types": [[["global", "local"], 2], [["global"], 1]], "num_heads": 4},
                "does not go through transformers' interface"),
    "doge": ({}, "an attention mask of its own"),
    "diffllama": ({}, "attends more than once"),
    "stablelm": ({}, "keywords don't reach its attention"),
    "gemma4_text": ({"head_dim": 16, "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "all"},
                    "attends to later tokens, too"),
    "zamba2": ({"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"], "num_mem_blocks": 1,
                "mamba_d_state": 8, "mamba_headdim": 16, "n_mamba_heads": 8, "mamba_ngroups": 1,
                "tie_word_embeddings": True},
               "blocks 1 and 3 share weights"),
    "jamba": ({"num_experts": 4, "mamba_dt_rank": 4}, "forgets its recurrent state"),
    "mamba": ({}, "forgets its recurrent state"),
}  # fmt: skip


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_by_name(model_type: str, tmp_path: Path) -> None:
    options, reason = REFUSED[model_type]
    sizes = {} if "d_model" in options or "num_heads" in options else SIZES
    basic = {"vocab_size": 300, "hidden_size": 64, "initializer_range": 0.1, "dtype": "float32", "pad_token_id": None}
    config = AutoConfig.for_model(model_type, **(basic | sizes | options))
    source = resolve(str(make_checkpoint(tmp_path, config)))
    with pytest.raises(ModelError, match=f"models of type '{model_type}' can't be served yet: .*{reason}.*docs/adding"):
        load_span(source, 0, source.num_blocks, dtype=torch.float32, device="cpu")


def test_the_page_of_models_is_what_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    script = importlib.import_module("make_models_doc")
    assert script.PAGE.read_text() == script.page(), "run scripts/make_models_doc.py"
