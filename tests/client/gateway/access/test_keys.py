"""Keys for the event loop: nothing waits in it, and nothing is lost."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from pathlib import Path

from swarm.client.gateway.access.key_desk import KeyDesk
from swarm.client.gateway.access.keys import Key, KeyStore, Usage


def test_a_file_that_others_write_holds_up_nobody(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys")
    secret = store.add("alice")
    other = sqlite3.connect(tmp_path / "keys", isolation_level=None)

    async def work() -> None:
        desk = KeyDesk(store)
        other.execute("BEGIN IMMEDIATE")  # nobody else can write now
        for _ in range(50):
            desk.count("alice", 2, 1)
            assert await desk.find(secret) == Key("alice", None, None)
        assert other.execute("SELECT COUNT(*) FROM usage").fetchone() == (0,)
        other.execute("COMMIT")
        await desk.close()

    asyncio.run(work())
    (used,) = store.list()
    assert (used.requests, used.prompt_tokens, used.completion_tokens) == (50, 100, 50)


class Watched(KeyStore):
    """Knows in which threads it was used."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        self.threads: set[int] = set()
        self.failures = 1

    def find(self, key: str) -> Key | None:
        self.threads.add(threading.get_ident())
        return super().find(key)

    def count(self, used: dict[str, Usage]) -> None:  # type: ignore[override]
        self.threads.add(threading.get_ident())
        if self.failures:
            self.failures -= 1
            raise sqlite3.OperationalError("database is locked")
        super().count(used)


def test_the_loop_itself_reads_and_writes_nothing_and_what_failed_is_written_later(tmp_path: Path) -> None:
    store = Watched(tmp_path / "keys")
    secret = store.add("alice")

    async def work() -> None:
        desk = KeyDesk(store)
        assert await desk.find(secret) is not None
        assert await desk.find("other") is None
        desk.count("alice", 1, 1)
        while store.failures or desk._writing is None or not desk._writing.done():
            await asyncio.sleep(0.01)
        desk.count("alice", 1, 1)
        await desk.close()

    asyncio.run(work())
    assert threading.get_ident() not in store.threads
    assert store.list()[0].requests == 2
