"""The versions of transformers and torch that are installed, and those that this package is tested with."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from .. import __version__


@dataclass(frozen=True)
class Versions:
    """A combination, such as ``Versions("5.24.0", "2.13.0")``: without local suffixes such as ``+cpu``."""

    transformers: str
    torch: str

    def __str__(self) -> str:
        return f"transformers {self.transformers} with torch {self.torch}"


TESTED: tuple[Versions, ...] = (
    Versions("5.17.0", "2.6.0"),
    Versions("5.23.0", "2.13.0"),
    Versions("5.24.0", "2.14.1"),
    Versions("5.24.0", "2.15.0"),
)
"""Those that the tests pass with, the newest last: a node or client with another checks its model's family first."""


def installed() -> Versions:
    """What this process runs with."""
    import torch
    import transformers

    return Versions(*(str(module.__version__).partition("+")[0] for module in (transformers, torch)))


def set_name(versions: Versions) -> str:
    """All on which it depends whether a family is computed right: what a verdict is kept under."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"transformers {versions.transformers}, torch {versions.torch}, python {python}, swarm {__version__}"


def how_to_get_tested(versions: Versions) -> str:
    """What to install in place of ``versions``: the newest transformers that is tested with this torch, if there is
    one, or else the newest combination."""
    suiting = [each for each in TESTED if each.torch == versions.torch]
    best = (suiting or TESTED)[-1]
    return f"pip install transformers=={best.transformers}" + ("" if suiting else f" torch=={best.torch}")
