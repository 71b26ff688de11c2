"""Of checkpoints with images the text part is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from swarm.client import SwarmModelForCausalLM
from swarm.model.family_check.table import CASES
from swarm.model.load_ends import load_ends
from swarm.model.source import resolve
from tests.client.in_process import InProcessConnection

_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "gemma3": {"vision_config": _VISION, "mm_tokens_per_image": 4},
    "gemma4": {
        "vision_config": _VISION | {"num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 16},
        "audio_config": None,
    },
    "llama4": {
        "vision_config": _VISION
        | dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32)
    },
}


@pytest.mark.parametrize("model_type", OPTIONS)
def test_text_part(model_type: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.model_type == f"{model_type}_text")
    text = case.config()
    config = AutoConfig.for_model(
        model_type, text_config=text.to_dict(), image_token_index=299, tie_word_embeddings=False, **OPTIONS[model_type]
    )
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    connection: Any = InProcessConnection(tmp_path, case.spans)
    ids = torch.randint(10, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    with SwarmModelForCausalLM.from_ends(load_ends(resolve(str(tmp_path))), connection) as mine, torch.no_grad():
        # Its text model, as transformers 5.24.0 can't run the whole of Llama 4 without an image
        theirs = whole.language_model if model_type == "llama4" else whole
        torch.testing.assert_close(mine(ids).logits, theirs(ids).logits, atol=5e-5, rtol=1e-4)
