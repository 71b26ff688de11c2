"""When a family is checked, what comes of it, and how often."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from swarm.compat import versions
from swarm.compat.versions import Versions
from swarm.errors import ModelError
from swarm.model.family_check.check import check_family
from swarm.model.family_check.tiny import TinyModel, difference

TESTED = (Versions("5.24.0", "2.13.0"),)


@pytest.fixture(autouse=True)
def _untested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SWARM_UNTESTED", raising=False)
    monkeypatch.setattr("swarm.model.family_check.check._warned", set())
    monkeypatch.setattr(versions, "installed", lambda: Versions("5.22.2", "2.13.0"))
    monkeypatch.setattr(versions, "TESTED", TESTED)


class Checked:
    """A check that finds ``found``; both sides' own are in tests/node and tests/client."""

    def __init__(self, found: str | Exception = "") -> None:
        self.found, self.models, self.said = found, list[str](), list[str]()

    def __call__(self, tiny: TinyModel) -> str:
        self.models.append(tiny.case.label)
        if isinstance(self.found, Exception):
            raise self.found
        return self.found

    def run(self, model_type: str = "llama") -> None:
        check_family(model_type, "blocks", self, self.said.append)


def test_tested_combinations_are_not_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(versions, "TESTED", (*TESTED, versions.installed()))
    check = Checked("off")
    check.run()
    assert check.models == check.said == []
    assert list(tmp_path.iterdir()) == []


def test_all_models_of_the_type_are_checked_once() -> None:
    check = Checked()
    check.run()
    check.run()
    assert check.models == ["llama-2", "llama-3.1"]
    line = "transformers 5.22.2 with torch 2.13.0 isn't a tested combination: checking a tiny llama model…"
    assert check.said == [line]


def test_each_side_and_set_of_versions_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    Checked().run()
    ends = Checked()
    check_family("llama", "ends", ends, ends.said.append)
    assert ends.models
    monkeypatch.setattr(versions, "installed", lambda: Versions("5.22.3", "2.13.0"))
    other = Checked()
    other.run()
    assert other.models


@pytest.mark.parametrize("found", ["numbers are off by 0.3 (allowed: 2e-05)", TypeError("no argument\nof this name")])
def test_a_wrong_one_is_refused_by_name_every_time(found: str | Exception) -> None:
    check = Checked(found)
    for before in (False, True):
        with pytest.raises(ModelError) as caught:
            check.run()
        text = str(caught.value)
        assert ("checked.json" in text) == before
        assert "transformers 5.22.2 with torch 2.13.0 isn't a tested combination" in text
        assert "blocks of llama" in text
        assert ("TypeError: no argument" if isinstance(found, Exception) else found) in text
        assert "pip install transformers==5.24.0)" in text
        assert "\n" not in text
    assert check.models == ["llama-2"], "a verdict that is known is not computed again"


def test_a_full_disk_is_nobodys_verdict() -> None:
    check = Checked(OSError("no space left"))
    for _ in range(2):
        with pytest.raises(ModelError, match="no space left"):
            check.run()
    assert len(check.models) == 2


def test_who_says_so_goes_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("SWARM_UNTESTED", "1")
    Checked("off by 3").run()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "blocks of llama" in caplog.text
    assert "off by 3" in caplog.text


def test_of_a_type_that_is_in_no_list_is_warned_once(caplog: pytest.LogCaptureFixture) -> None:
    check = Checked("off")
    for _ in range(2):
        check.run("doge")
    assert check.models == []
    assert len(caplog.records) == 1
    assert "'doge'" in caplog.text


def test_a_difference_is_said_with_its_size() -> None:
    right = torch.tensor([[1.0, -4.0]])
    assert difference("numbers", right + 6e-5, right) == ""
    assert difference("numbers", right + 1e-4, right) == "numbers are off by 0.0001 (allowed: 8e-05)"
    assert "nan" in difference("numbers", right * float("nan"), right)
    assert difference("numbers", right[0], right) == "numbers are of shape [2], not [1, 2]"
