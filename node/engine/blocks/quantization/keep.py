"""Blocks of a quantized checkpoint with the weights as they are there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import nn

from swarm.compute.memory import trim
from swarm.weights.dequantize import Parts
from swarm.weights.packed import PackedRows, PackedWeight
from swarm.wire.codec import dtype_name

from .blocks import QuantizedLinear, find_places, quantized_bytes
from .experts import QuantizedExperts
from .kernels import Kernel, find_kernel, to_device
from .matrices.matrix import QuantizedMatrix
from .matrices.stored import JoinedMatrix, StoredMatrix

Read = Callable[[PackedRows], Parts]


class Use(Enum):
    """What can be done with packed weights of a kind on this machine."""

    KERNEL = "multiply with them"
    SLOW = "dequantize them each time"
    NONE = "dequantize them once"


@dataclass(frozen=True)
class Keep:
    """Keeps linear layers and experts packed for which there is a kernel: a :class:`swarm.weights.packed.Keeper`.

    Attributes:
        dtype: of the span.
        slow: also those that are dequantized each time they are used.
    """

    dtype: torch.dtype
    slow: bool

    def choose(self, block: nn.Module, packed: Mapping[str, PackedWeight], device: torch.device) -> Collection[str]:
        """Those whose module can hold them. Of experts both projections, or none."""
        return {name for names in self._chosen(block, packed, device) for name in names}

    def size(self, block: nn.Module, packed: Mapping[str, PackedWeight], device: torch.device) -> int:
        """Memory that the weights of ``block``, which is on the meta device, take like this."""
        total = quantized_bytes(block, None)
        for names in self._chosen(block, packed, device):
            for name, (out, inputs) in names.items():
                weight = block.get_parameter(name)
                total -= weight.numel() * weight.element_size()
                for matrix in packed[name].matrices:
                    for rows, height in zip(matrix, _heights(matrix, out), strict=True):
                        kernel = self._kernel(rows, height, inputs, device)
                        layout = rows.format.layout(rows.headers, height, inputs)
                        known = kernel is not None and layout is not None
                        total += kernel.size(layout, height, inputs, self.dtype) if known else rows.stored_bytes  # type: ignore[union-attr, arg-type]
        return total

    def uses(self, block: nn.Module, packed: Mapping[str, PackedWeight], device: torch.device) -> dict[str, Use]:
        """What can be done with the kinds of packed weights in ``block``, by what they are called."""
        fast = replace(self, slow=False).choose(block, packed, device)
        slow = set(replace(self, slow=True).choose(block, packed, device)) - set(fast)
        found: dict[str, Use] = {}
        for name, weight in packed.items():
            *_, out, inputs = block.get_parameter(name).shape
            for matrix in weight.matrices[:1]:
                use = Use.KERNEL if name in fast else Use.SLOW if name in slow else Use.NONE
                found[_label(matrix[0], out // len(matrix), inputs)] = use
        return found

    def fill(self, block: nn.Module, packed: Mapping[str, PackedWeight], device: torch.device, read: Read) -> None:
        """Puts matrices of the chosen weights in the place of the modules that had them."""
        with torch.no_grad():
            for place in list(find_places(block)):
                names = {name: f"{place.path}.{name}" for name in place.shapes}
                if any(name not in packed for name in names.values()):
                    continue
                made = {
                    short: [self._matrix(matrix, place.shapes[short], device, read) for matrix in packed[name].matrices]
                    for short, name in names.items()
                }
                if isinstance(place.module, nn.Linear):
                    ((matrix,),) = made.values()
                    setattr(place.parent, place.name, QuantizedLinear(matrix, place.module.bias))
                else:
                    setattr(place.parent, place.name, QuantizedExperts(place.module, made))

    def _chosen(
        self, block: nn.Module, packed: Mapping[str, PackedWeight], device: torch.device
    ) -> list[dict[str, tuple[int, int]]]:
        """For each module that is kept, ``(out, in)`` by name of the parameter."""
        chosen = []
        for place in find_places(block):
            names = {f"{place.path}.{short}": shape for short, shape in place.shapes.items()}
            if all(
                name in packed
                and len(packed[name].matrices) == count
                and all(self._can(matrix, out, inputs, device) for matrix in packed[name].matrices)
                for name, (count, out, inputs) in names.items()
            ):
                chosen.append({name: shape[1:] for name, shape in names.items()})
        return chosen

    def _can(self, matrix: tuple[PackedRows, ...], out: int, inputs: int, device: torch.device) -> bool:
        if out % len(matrix):
            return False
        return all(
            self._kernel(rows, height, inputs, device) is not None or (self.slow and bool(rows.format.rows))
            for rows, height in zip(matrix, _heights(matrix, out), strict=True)
        )

    def _kernel(self, rows: PackedRows, out: int, inputs: int, device: torch.device) -> Kernel | None:
        layout = rows.format.layout(rows.headers, out, inputs)
        return None if layout is None else find_kernel(layout, out, inputs, device, self.dtype)

    def _matrix(
        self, matrix: tuple[PackedRows, ...], shape: tuple[int, int, int], device: torch.device, read: Read
    ) -> QuantizedMatrix:
        _, out, inputs = shape
        made = [
            self._rows(rows, height, inputs, device, read)
            for rows, height in zip(matrix, _heights(matrix, out), strict=True)
        ]
        return made[0] if len(made) == 1 else JoinedMatrix(made)

    def _rows(self, rows: PackedRows, out: int, inputs: int, device: torch.device, read: Read) -> QuantizedMatrix:
        kernel, layout = self._kernel(rows, out, inputs, device), rows.format.layout(rows.headers, out, inputs)
        parts = read(rows)
        if kernel is None or layout is None or rows.format.read is None:
            moved = {suffix: part.to(device) for suffix, part in parts.items()}
            return StoredMatrix(moved, rows.format, (out, inputs), self.dtype)
        found = rows.format.read(parts)
        del parts
        trim()  # or what each matrix takes for a while adds up
        result = kernel.make(to_device(found, device), layout, self.dtype)
        if (result.out_features, result.in_features) != (out, inputs):
            shape = [result.out_features, result.in_features]
            raise ValueError(f"{rows.key} is {shape}, but the config asks for {[out, inputs]}")
        return result


def describe(uses: Mapping[str, Use], keep: Keep | None, dtype: str) -> str:
    """What becomes of a quantized checkpoint's weights, in words. ``keep``: ``None`` dequantizes all of them."""
    if keep is None and Use.KERNEL in uses.values():
        return f"dequantized to {dtype}, as asked"
    by_use = {use: ", ".join(sorted(name for name, its in uses.items() if its == use)) for use in Use}
    said = []
    if keep is not None and (names := by_use[Use.KERNEL]):
        said.append(f"served packed ({names})")
    if keep is not None and keep.slow and (names := by_use[Use.SLOW]):
        said.append(
            f"{names} served packed but dequantized at each use, which is slow: there is no kernel for them here "
            "(--quantization none takes more memory and is faster)"
        )
    missing = [by_use[Use.NONE], *([] if keep is not None and keep.slow else [by_use[Use.SLOW]])]
    if names := ", ".join(filter(None, missing)):
        said.append(f"dequantized to {dtype}: no kernel here for {names}")
    return "; ".join(said) if said else f"dequantized to {dtype}"


def _label(rows: PackedRows, out: int, inputs: int) -> str:
    layout = rows.format.layout(rows.headers, out, inputs)
    if layout is None:
        return f"{dtype_name(rows.headers[rows.format.main].dtype)} weights"
    return layout.kind if layout.kind == "int8" else f"{layout.kind}, group {min(layout.group, inputs)}"


def _heights(matrix: tuple[PackedRows, ...], out: int) -> list[int]:
    """How many rows each piece has: all the same."""
    return [out // len(matrix)] * len(matrix)
