"""API keys: who may use the gateway, how much, and how much they did. In a SQLite file.

Keys are 256 random bits, of which only the SHA-256 is stored. Slow, salted hashes are for passwords, which can be
guessed; there is nothing to guess here, and a fast hash can be looked up by every request.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from swarm.errors import UsageError

PREFIX = "sk-swarm-"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    name TEXT PRIMARY KEY, hash TEXT NOT NULL UNIQUE, created REAL NOT NULL,
    requests_per_minute INTEGER, tokens_per_minute INTEGER
);
CREATE TABLE IF NOT EXISTS usage (
    name TEXT NOT NULL, day TEXT NOT NULL, requests INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, PRIMARY KEY (name, day)
);
"""


@dataclass(frozen=True)
class Key:
    """A key as it is stored. Limits are None where there are none."""

    name: str
    requests_per_minute: int | None
    tokens_per_minute: int | None


@dataclass(frozen=True)
class KeyUsage:
    """A key, and what it was used for in all."""

    key: Key
    created: float
    requests: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Usage:
    """What requests amount to."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def plus(self, other: Usage) -> Usage:
        """Both together."""
        return Usage(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )


class KeyStore:
    """Opened by the gateway and by ``swarm gateway keys`` at the same time. Safe to use from several threads."""

    def __init__(self, file: Path) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
            self._db = sqlite3.connect(file, check_same_thread=False, timeout=10)
            self._reader = sqlite3.connect(file, check_same_thread=False, timeout=10)  # waits for no writer
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise UsageError(f"can't use {file} for API keys ({error}): choose another with --keys-file") from error
        self._lock, self._reader_lock = threading.Lock(), threading.Lock()

    def close(self) -> None:
        """Closes the file."""
        self._reader.close()
        self._db.close()

    def add(self, name: str, *, requests_per_minute: int | None = None, tokens_per_minute: int | None = None) -> str:
        """Makes a key. It is returned this once, and can't be found out later.

        Raises:
            UsageError: there is one of this name.
        """
        key = PREFIX + secrets.token_hex(32)
        row = (name, _hash(key), time.time(), requests_per_minute, tokens_per_minute)
        try:
            with self._lock, self._db:
                self._db.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?)", row)
        except sqlite3.IntegrityError:
            raise UsageError(f"there is a key {name!r} already: remove it first, or choose another name") from None
        return key

    def remove(self, name: str) -> None:
        """Ends a key. What it was used for stays counted.

        Raises:
            UsageError: there is none of this name.
        """
        with self._lock, self._db:
            if self._db.execute("DELETE FROM keys WHERE name = ?", (name,)).rowcount == 0:
                raise UsageError(f"there is no key {name!r}: swarm gateway keys list shows them")

    def find(self, key: str) -> Key | None:
        """The key that is this string."""
        with self._reader_lock:
            row = self._reader.execute(
                "SELECT name, requests_per_minute, tokens_per_minute FROM keys WHERE hash = ?", (_hash(key),)
            ).fetchone()
        return None if row is None else Key(*row)

    def list(self) -> list[KeyUsage]:
        """All keys by name."""
        with self._lock:
            rows = self._db.execute(
                "SELECT k.name, k.requests_per_minute, k.tokens_per_minute, k.created, COALESCE(SUM(u.requests), 0), "
                "COALESCE(SUM(u.prompt_tokens), 0), COALESCE(SUM(u.completion_tokens), 0) "
                "FROM keys k LEFT JOIN usage u ON u.name = k.name GROUP BY k.name ORDER BY k.name"
            ).fetchall()
        return [KeyUsage(Key(*row[:3]), *row[3:]) for row in rows]

    def count(self, used: Mapping[str, Usage]) -> None:
        """Notes what keys were used for, by their names."""
        rows = [(name, each.requests, each.prompt_tokens, each.completion_tokens) for name, each in used.items()]
        with self._lock, self._db:
            self._db.executemany(
                "INSERT INTO usage VALUES (?, date('now'), ?, ?, ?) ON CONFLICT DO UPDATE SET "
                "requests = requests + excluded.requests, prompt_tokens = prompt_tokens + excluded.prompt_tokens, "
                "completion_tokens = completion_tokens + excluded.completion_tokens",
                rows,
            )


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
