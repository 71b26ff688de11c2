"""A GGUF file (llama.cpp's) as a checkpoint. Needs the package ``gguf``, an extra of this one.

The file is memory-mapped, and only the tensors that are asked for are dequantized. Its config is read by transformers.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from ..errors import ModelError
from .checkpoint import Checkpoint, TensorInfo

# Architectures in the format's words whose tensors are the model's own under other names; llama's queries and keys are
# permuted besides.
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_ENDS = ("model.embed_tokens", "model.norm", "lm_head")
_BLOCK = (
    "input_layernorm",
    "post_attention_layernorm",
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
)


def read_gguf_config(file: Path) -> tuple[PreTrainedConfig, torch.dtype, str | None]:
    """The config that a file's metadata stand for, the dtype to read its tensors in, and how most are quantized.

    Raises:
        ModelError: not a GGUF file, or a model that can't be read from one.
    """
    reader = _open(file)
    architecture = _architecture(reader)
    if architecture not in _ARCHITECTURES:
        raise ModelError(
            f"{file} is of architecture {architecture!r}, which can't be read from GGUF files here (what can: "
            f"{', '.join(_ARCHITECTURES)}): use the original weights"
        )
    names = {tensor.name for tensor in reader.tensors}
    scaling = reader.fields.get(f"{architecture}.rope.scaling.type")
    if any("_exps." in name for name in names) or (scaling is not None and scaling.contents() != "none"):
        raise ModelError(f"{file} has experts or scaled rotary embeddings, which can't be read here: use the original")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as error:  # transformers' own complaints
        raise ModelError(f"can't use {file}: {str(error).strip().splitlines()[0]}") from error
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    dtype = {"F32": torch.float32, "F16": torch.float16}.get(kinds.get("token_embd.weight", ""), torch.bfloat16)
    config.dtype = dtype
    if "rope_freqs.weight" in names:
        factors = next(tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
        _set_llama3_scaling(config, torch.from_numpy(factors.copy()).flatten(), file)
    quantized = Counter(kind for kind in kinds.values() if kind not in ("F32", "F16", "BF16"))
    return config, dtype, quantized.most_common(1)[0][0] if quantized else None


class GgufCheckpoint(Checkpoint):
    """The tensors of a GGUF file under transformers' names, in ``dtype``."""

    def __init__(self, file: Path, config: PreTrainedConfig, dtype: torch.dtype) -> None:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        reader = _open(file)
        self._config, self._own_dtype = config, dtype
        self._permuted = _architecture(reader) == "llama"
        kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == _architecture(reader))
        blocks = config.num_hidden_layers
        table = get_tensor_name_map(kind, blocks)
        stored = {tensor.name: tensor for tensor in reader.tensors}
        modules = [*_ENDS, *(f"model.layers.{block}.{name}" for block in range(blocks) for name in _BLOCK)]
        self._tensors: dict[str, Any] = {}
        for module in modules:
            for suffix in (".weight", ".bias"):
                if (tensor := stored.get(f"{table.get_name(module)}{suffix}")) is not None:
                    self._tensors[module + suffix] = tensor
        super().__init__(file.parent, None, dict.fromkeys(self._tensors, file.name), file)

    def info(self, name: str) -> TensorInfo:
        # The format counts dimensions from the innermost.
        return TensorInfo(
            self.listing, tuple(int(size) for size in reversed(self._tensors[name].shape)), self._own_dtype
        )

    def read(self, name: str, *, mapped: bool = False) -> torch.Tensor:
        """The tensor, dequantized.

        Raises:
            ModelError: it is of a kind that the package can't dequantize.
        """
        from gguf import dequantize

        tensor = self._tensors[name]
        try:
            values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        except (NotImplementedError, ValueError) as error:
            raise ModelError(f"can't read tensor {name} from {self.listing}: {error}") from error
        if self._permuted and name.endswith(("q_proj.weight", "k_proj.weight")):
            config = self._config
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            # The format keeps the two halves of a rotated pair next to each other; transformers half a head apart.
            values = values.view(heads, -1, 2, values.shape[-1]).transpose(1, 2).reshape(values.shape)
        return values.to(self._own_dtype)


def _open(file: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(f"reading {file.name} needs the package gguf: pip install 'swarm-llm[gguf]'") from error
    try:
        return GGUFReader(file)
    except Exception as error:  # it checks little, so that a broken file fails in many ways
        raise ModelError(f"can't read {file}: {type(error).__name__} {error}".splitlines()[0]) from error


def _architecture(reader: Any) -> str:
    field = reader.fields.get("general.architecture")
    return str(field.contents()) if field is not None else ""


def _set_llama3_scaling(config: PreTrainedConfig, factors: torch.Tensor, file: Path) -> None:
    """Llama 3.1's rotary scaling, of which the file has only the result: a divisor for each frequency.

    The parameters behind it are the same in all its versions but for the factor. Raises ModelError if they aren't.
    """
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    theta = config.rope_parameters["rope_theta"]
    wavelengths = 2 * math.pi * theta ** (torch.arange(len(factors)) / len(factors))
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not torch.allclose(expected, factors.float(), rtol=1e-3):
        raise ModelError(f"{file} has rotary frequencies that can't be read here: use the original weights")
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
