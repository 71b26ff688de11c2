"""Tiny models of true architectures, made once per test run."""

from __future__ import annotations

import functools
import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any


def _script() -> ModuleType:
    path = Path(__file__).parent.parent / "scripts" / "make_checkpoint.py"
    spec = importlib.util.spec_from_file_location("swarm_scripts_make_checkpoint", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


_make = _script()
PRESETS: tuple[str, ...] = tuple(_make.PRESETS)
make_config = _make.make_config
large_config = _make.large_config
make_checkpoint = _make.make_checkpoint

# Kept for as long as the test process lives.
_ROOT = tempfile.TemporaryDirectory(prefix="swarm-test-models-")


@functools.cache
def tiny_model(like: str, *, dtype: str = "float32", sharded: bool = False, **options: Any) -> Path:
    """The directory of a tiny model, one of :data:`PRESETS`. Don't change what is in it: all tests share it.

    Args:
        sharded: about one shard per block, instead of one file.
        options: sizes as for ``make_config``, such as ``layers=2``, or fields of the config.
    """
    label = "-".join([like, dtype, *(["sharded"] if sharded else []), *(f"{k}_{v}" for k, v in options.items())])
    config = make_config(like, dtype=dtype, **options)
    path: Path = make_checkpoint(
        Path(_ROOT.name) / label.replace(".", "_"), config, max_shard_bytes=100_000 if sharded else 1 << 29
    )
    return path
