"""API keys for the event loop, which all streams of tokens share: SQLite waits for a disk, and for other processes."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from concurrent.futures import ThreadPoolExecutor

from .keys import Key, KeyStore, Usage

logger = logging.getLogger(__name__)


class KeyDesk:
    """A :class:`KeyStore` whose work is done in threads: one looks keys up, the other counts.

    Every request is looked up, so that a key ends at once. What requests did while the counts of others are written is
    written together afterwards.
    """

    def __init__(self, store: KeyStore) -> None:
        self._store = store
        self._looking = ThreadPoolExecutor(1, thread_name_prefix="gateway-keys")
        self._counting = ThreadPoolExecutor(1, thread_name_prefix="gateway-usage")
        self._uncounted: dict[str, Usage] = {}
        self._writing: asyncio.Task[None] | None = None

    async def find(self, key: str) -> Key | None:
        """See :meth:`KeyStore.find`."""
        return await asyncio.get_running_loop().run_in_executor(self._looking, self._store.find, key)

    def count(self, name: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Notes a request that is done, soon."""
        self._add({name: Usage(1, prompt_tokens, completion_tokens)})
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write())

    async def close(self) -> None:
        """Returns when everything is written."""
        if self._writing is not None:
            await self._writing
        self._looking.shutdown(wait=False)
        self._counting.shutdown(wait=False)

    async def _write(self) -> None:
        while self._uncounted:
            batch, self._uncounted = self._uncounted, {}
            try:
                await asyncio.get_running_loop().run_in_executor(self._counting, self._store.count, batch)
            except sqlite3.Error as error:
                logger.warning("could not write what keys were used for, will try again: %s", error)
                self._add(batch)
                return  # with the next request

    def _add(self, more: dict[str, Usage]) -> None:
        for name, usage in more.items():
            self._uncounted[name] = self._uncounted.get(name, Usage()).plus(usage)
