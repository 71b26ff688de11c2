"""from_pretrained takes what transformers' takes, and says what else there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from swarm.client.model.arguments import device_of, dtype_of, peers_of, settings_of
from swarm.errors import UsageError


def test_peers() -> None:
    assert peers_of("/ip4/1.2.3.4") == ("/ip4/1.2.3.4",)
    assert peers_of(iter(["/a", "/b"])) == ("/a", "/b")


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtype(name: Any) -> None:
    assert dtype_of(name, None) == dtype_of(None, name) == dtype_of(name, name) == torch.bfloat16


def test_no_dtype_is_the_checkpoints() -> None:
    assert dtype_of(None, None) == dtype_of("auto", None) == dtype_of(None, "auto") == "checkpoint"


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("int8", None), ("nonsense", None), ("float16", "float32")])
def test_dtypes_that_cannot_be(dtype: str, torch_dtype: str | None) -> None:
    with pytest.raises(UsageError):
        dtype_of(dtype, torch_dtype)


@pytest.mark.parametrize("given", [None, "cpu", torch.device("cpu"), {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_device(given: Any) -> None:
    assert device_of(given) == torch.device("cpu")


def test_auto_is_a_device() -> None:
    assert device_of("auto") == device_of({"": "auto"})
    assert device_of("meta") == torch.device("meta")


@pytest.mark.parametrize("given", ["nowhere", {"a": "cpu", "b": "meta"}, {}, 1.5], ids=str)
def test_no_device(given: Any) -> None:
    with pytest.raises(UsageError, match="one device for the two ends"):
        device_of(given)


def test_settings() -> None:
    assert settings_of({"wait_timeout": 3.0}).wait_timeout == 3.0
    with pytest.raises(TypeError, match=r"low_cpu_mem_usage.*up to the nodes.*wait_timeout"):
        settings_of({"low_cpu_mem_usage": True, "wait_timeout": 3.0})
