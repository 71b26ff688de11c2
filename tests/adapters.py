"""LoRA adapters as PEFT makes and computes them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

# Kept for as long as the test process lives.
_ROOT = tempfile.TemporaryDirectory(prefix="swarm-test-adapters-")


def make_adapter(model: Path, name: str, *, seed: int = 0, **options: Any) -> Path:
    """The directory of an adapter that PEFT has saved, with B matrices that are not zero.

    Args:
        options: of ``LoraConfig``.
    """
    torch.manual_seed(seed)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(**options))
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    path = Path(_ROOT.name) / model.name / name
    adapted.save_pretrained(str(path))
    return path


def whole_with(model: Path, adapters: dict[str, Path], **options: Any) -> PeftModel:
    """The whole model in PEFT, with these adapters."""
    base = AutoModelForCausalLM.from_pretrained(model, **options)
    (first, path), *others = adapters.items()
    whole = PeftModel.from_pretrained(base, str(path), adapter_name=first)
    for name, path in others:
        whole.load_adapter(str(path), adapter_name=name)
    return whole.eval()
