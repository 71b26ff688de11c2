"""What checks have found is kept, and whatever is in the file, or happens to it, only costs another check."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.model.family_check.verdicts import SETS, keep_verdict, read_verdict, verdicts_file

JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["now", "x", "blocks"]), inner),
    max_leaves=8,
)


@given(content=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_file_may_hold_anything(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("verdicts") / "checked.json"
    file.write_bytes(content)
    assert isinstance(read_verdict(file, "now", "x"), str | None)
    keep_verdict(file, "now", "blocks", "")
    keep_verdict(file, "now", "ends", "off")
    assert (read_verdict(file, "now", "blocks"), read_verdict(file, "now", "ends")) == ("", "off")


@pytest.mark.parametrize("content", ["[" * 100_000, " " * (2 << 20) + "{}"])
def test_a_file_may_be_deep_or_large(content: str, tmp_path: Path) -> None:
    file = tmp_path / "checked.json"
    file.write_text(content)
    assert read_verdict(file, "now", "blocks") is None
    keep_verdict(file, "now", "blocks", "")
    assert read_verdict(file, "now", "blocks") == ""


def test_it_stays_small(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "checked.json"
    for number in range(SETS + 5):
        keep_verdict(file, f"set {number}", "blocks", "x" * 10_000)
        keep_verdict(file, "set 0", "ends", "")  # in use, so it stays
    known = json.loads(file.read_text())
    assert len(known) == SETS
    assert list(known)[-2:] == [f"set {SETS + 4}", "set 0"]
    assert file.stat().st_size < 1 << 16
    assert [path.name for path in file.parent.iterdir()] == ["checked.json"]


def test_where_nothing_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for file in (None, tmp_path / "file" / "checked.json", tmp_path):
        keep_verdict(file, "now", "blocks", "")
        assert read_verdict(file, "now", "blocks") is None


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert verdicts_file() == tmp_path / "swarm" / "checked.json"
    monkeypatch.setenv("HOME", str(tmp_path))
    for given_folder in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", given_folder)
        assert verdicts_file() == tmp_path / ".cache" / "swarm" / "checked.json"
