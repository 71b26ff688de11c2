"""Which combinations of libraries are tested."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers  # noqa: F401

from swarm.compat import versions
from swarm.compat.versions import TESTED, Versions


def test_the_newest_is_last() -> None:
    assert sorted(TESTED, key=lambda each: [int(part) for part in each.transformers.split(".")]) == list(TESTED)


def test_local_suffixes_dont_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.23.0")
    assert versions.installed() == Versions("5.23.0", "2.13.0")
    assert versions.installed() in TESTED
    monkeypatch.setattr(torch, "__version__", "2.13.1+cu130")
    assert versions.installed() not in TESTED


def test_what_to_install_in_place_of_others() -> None:
    newest = {each.torch: each.transformers for each in TESTED}
    for torch_version, transformers_version in newest.items():
        advice = versions.how_to_get_tested(Versions("5.22.2", torch_version))
        assert advice == f"pip install transformers=={transformers_version}"
    last = TESTED[-1]
    advice = versions.how_to_get_tested(Versions("5.22.2", "2.9.1"))
    assert advice == f"pip install transformers=={last.transformers} torch=={last.torch}"


def test_sets_of_versions_have_names_of_their_own() -> None:
    names = {versions.set_name(each) for each in (*TESTED, Versions("5.22.2", "2.13.0"))}
    assert len(names) == len(TESTED) + 1
    assert all("python 3." in name and "swarm 0." in name for name in names)
