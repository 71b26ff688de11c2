"""Keys, invitations and lists of who is shut out, as people give them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.commands.hidden import without_invitation
from swarm.errors import UsageError
from swarm.network.lock.invitation import Invitation, read_invitation
from swarm.network.lock.key import SwarmKey, given_keys, read_keys
from swarm.network.lock.shut_out import ShutOut
from swarm.network.options import KeyOptions, PeerOptions

KEY = SwarmKey.new()
PEERS = ("/ip4/192.168.1.5/tcp/31330/p2p/QmX", "/ip6/::1/tcp/1/p2p/QmX")
QM = "QmaSYYoH6LgRr1jMvnn1Kp5tPgkkd19mKDoVXtEfuVQtFa"


@given(st.binary(min_size=32, max_size=32))
def test_a_key_comes_back_from_its_text_and_never_shows_itself(secret: bytes) -> None:
    key = SwarmKey(secret)
    assert SwarmKey.parse(key.text(), "here") == key
    options = PeerOptions(key=KeyOptions(swarm_key=(key, key.text()), join=Invitation(PEERS, key)))
    for shown in (repr(key), str(key), repr(options), str(options.key.join)):
        assert key.text() not in shown
        assert repr(secret) not in shown


@given(st.integers(0, len(KEY.text()) - 1), st.characters())
def test_a_damaged_key_is_refused_and_not_shown(at: int, letter: str) -> None:
    text = KEY.text()
    damaged = text[:at] + letter + text[at + 1 :]
    if damaged != text:
        with pytest.raises(UsageError) as refused:
            SwarmKey.parse(damaged, "here")
        assert damaged not in str(refused.value)


def test_files_and_keys(tmp_path: Path) -> None:
    file = tmp_path / "swarm.key"
    with pytest.raises(UsageError, match="can't read the swarm key"):
        read_keys([file])
    file.write_text("hello\n")
    with pytest.raises(UsageError, match="has no swarm key"):
        read_keys([file])
    file.write_text(KEY.text() + "\n")
    assert read_keys([file, KEY.text(), KEY, str(file)]) == (KEY,)
    with pytest.raises(UsageError, match="at most 4"):
        read_keys([SwarmKey.new() for _ in range(5)])


def test_a_key_is_not_taken_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert given_keys(["a,b c", "d"]) == ("a", "b c", "d")
    with pytest.raises(UsageError, match="doesn't belong on the command line") as refused:
        given_keys([KEY.text()])
    assert KEY.text() not in str(refused.value)
    monkeypatch.setenv("SWARM_KEY", f"file {KEY.text()}")
    assert given_keys(["file", KEY.text()]) == ("file", KEY.text())


@pytest.mark.parametrize("key", [KEY, None])
def test_invitations(key: SwarmKey | None, tmp_path: Path) -> None:
    invitation = Invitation(PEERS, key)
    line = invitation.line()
    assert len(line.split()) == 1
    assert read_invitation(line) == invitation
    file = tmp_path / "invitation"
    file.write_text(line + "\n")
    assert read_invitation(str(file)) == invitation
    options = PeerOptions(initial_peers=("/ip4/1.2.3.4/tcp/1/p2p/QmY",), key=KeyOptions(join=invitation))
    assert options.initial_peers == ("/ip4/1.2.3.4/tcp/1/p2p/QmY", *PEERS)
    assert options.key.keys() == (() if key is None else (KEY,))


@pytest.mark.parametrize("text", ["", "swarm:", "swarm:#", "swarm:hello", "swarm:#KEY", "nowhere/x", "a\0b"])
def test_what_is_no_invitation(text: str) -> None:
    text = text.replace("KEY", KEY.text())
    with pytest.raises(UsageError) as refused:
        read_invitation(text)
    assert KEY.text() not in str(refused.value)


def test_an_invitation_is_taken_off_the_command_line() -> None:
    line = Invitation(PEERS, KEY).line()
    assert without_invitation(["serve", "demo", "--join", line, "-x"]) == (["serve", "demo", "-x"], line)
    assert without_invitation(["serve", f"--join={line}"]) == (["serve"], line)
    for kept in (["serve", "--join", "file"], ["--join"], ["--prompt", line], []):
        assert without_invitation(kept) == (kept, None)


def test_who_is_shut_out_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out"
    with pytest.raises(UsageError, match="can't read"):
        ShutOut(file)
    file.write_text("hello world\n")
    with pytest.raises(UsageError, match="line 1"):
        ShutOut(file)
    file.write_text(f"# nobody yet\n\n{QM}  # Mallory\n")
    now = time.monotonic()
    monkeypatch.setattr("swarm.network.lock.shut_out.time.monotonic", lambda: now)
    shut_out = ShutOut(file)
    assert shut_out.has(QM)
    for text, out in (("", False), (QM, True), ("nonsense!", True)):
        file.write_text(text)
        os.utime(file, (now, now))
        now += 2
        assert shut_out.has(QM) is out
    assert shut_out.wrong is not None
    file.unlink()
    now += 2
    assert shut_out.has(QM)
    assert not ShutOut(None).has(QM)
