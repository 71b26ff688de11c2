"""Pages are neither lost nor owned twice, and sequences lie in one piece while there is room."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import OutOfCacheError
from swarm.model.probe import KVGeometry
from swarm.node.engine.cache.kv_cache import KVCache, Row
from swarm.node.engine.cache.pages import OutOfPages, PageAllocator


def make_cache(pages: int, page_size: int) -> KVCache:
    return KVCache(
        start=0,
        tokens=pages * page_size,
        page_size=page_size,
        kv=[KVGeometry(1, 1, 1)],
        dtype=torch.int64,
        device=torch.device("cpu"),
    )


def write(cache: KVCache, row: Row, values: list[int]) -> None:
    slots = row.slots(row.length, row.length + len(values), cache.page_size)
    cache.keys[0][0, 0, slots, 0] = torch.tensor(values, dtype=torch.int64)
    row.length += len(values)


def read(cache: KVCache, row: Row) -> list[int]:
    found: list[int] = cache.keys[0][0, 0, row.slots(0, row.length, cache.page_size), 0].tolist()
    return found


def names_of(values: list[int], page_size: int) -> list[tuple[int, ...]]:
    """What says truly what is in a page: all tokens up to its end."""
    return [tuple(values[:end]) for end in range(page_size, len(values) + 1, page_size)]


def check_owners(cache: KVCache, sessions: list[list[Row]]) -> None:
    owners = [0] * cache.pages.count
    for rows in sessions:
        for row in rows:
            assert len(row.pages) == -(-row.length // cache.page_size)
            assert row.contiguous == all(b == a + 1 for a, b in zip(row.pages, row.pages[1:], strict=False))
            for page in row.pages:
                owners[page] += 1
    assert owners == [cache.pages.owners(page) for page in range(cache.pages.count)]
    blank = sum(state == 0 for state in cache.pages._state)
    kept = [page for page in range(cache.pages.count) if cache.pages.named(page) and not owners[page]]
    assert blank + len(kept) == cache.pages.free
    assert cache.pages.free == owners.count(0)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_steps_keep_every_rows_tokens_and_every_page(data: st.DataObject) -> None:
    cache = make_cache(data.draw(st.integers(1, 24)), data.draw(st.integers(1, 4)))
    sessions: list[list[Row]] = []
    contents: list[list[list[int]]] = []
    token = 0
    seen: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        actions = ["open", "step", "step", "step", "name", "adopt", "hypo", "crop", "close"]
        action = data.draw(st.sampled_from(actions))
        if action == "open":
            count = data.draw(st.integers(1, 3))
            sessions.append([Row() for _ in range(count)])
            contents.append([[] for _ in range(count)])
        elif action == "adopt" and seen:
            prompts = [data.draw(st.sampled_from(seen)) for _ in range(data.draw(st.integers(1, 2)))]
            found = [cache.find(names_of(prompt, cache.page_size)) for prompt in prompts]
            shortest = min(len(pages) for pages in found) * cache.page_size
            lengths = [data.draw(st.integers(0, shortest)) for _ in prompts]
            tables = [pages[: -(-n // cache.page_size)] for pages, n in zip(found, lengths, strict=True)]
            rows = [Row() for _ in prompts]
            cache.adopt(rows, tables, lengths, blocks=range(1), may_copy=data.draw(st.booleans()))
            sessions.append(rows)
            contents.append([prompt[:n] for prompt, n in zip(prompts, lengths, strict=True)])
        elif sessions:
            at = data.draw(st.integers(0, len(sessions) - 1))
            rows, content = sessions[at], contents[at]
            if action == "name":
                for row, values in zip(rows, content, strict=True):
                    cache.name_pages(row, 0, names_of(values, cache.page_size))
                    seen.append(list(values))
            elif action == "close":
                cache.release(rows)
                del sessions[at], contents[at]
            elif action == "crop":
                for row, values in zip(rows, content, strict=True):
                    length = data.draw(st.integers(0, row.length))
                    cache.truncate(row, length)
                    del values[length:]
            else:
                sources = None
                if action == "hypo":
                    sources = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
                picked = content if sources is None else [content[source] for source in sources]
                keep = [data.draw(st.integers(max(0, len(values) - 3), len(values))) for values in picked]
                grow = [data.draw(st.integers(0, 9)) for _ in picked]
                free = cache.pages.free
                try:
                    rows = cache.arrange(rows, sources=sources, keep=keep, grow=grow, blocks=range(1))
                except OutOfCacheError:
                    assert cache.pages.free == free
                else:
                    sessions[at] = rows
                    contents[at] = [values[:kept] for values, kept in zip(picked, keep, strict=True)]
                    for row, values, more in zip(rows, contents[at], grow, strict=True):
                        new = list(range(token, token + more))
                        token += more
                        write(cache, row, new)
                        values += new
        check_owners(cache, sessions)
        assert [[read(cache, row) for row in rows] for rows in sessions] == contents
    for rows in sessions:
        cache.release(rows)
    assert cache.pages.free == cache.pages.count


def test_named_pages_stay_until_room_is_needed_and_the_least_recently_used_go_first() -> None:
    cache = make_cache(16, 1)
    prompts = [[10 * number + at for at in range(4)] for number in range(3)]
    for prompt in prompts:
        [row] = cache.arrange([Row()], sources=None, keep=[0], grow=[4], blocks=range(1))
        write(cache, row, prompt)
        cache.name_pages(row, 0, names_of(prompt, 1))
        cache.release([row])
    assert cache.pages.free == 16
    again = Row()
    cache.adopt([again], [cache.find(names_of(prompts[0], 1))], [4], blocks=range(1), may_copy=False)
    assert read(cache, again) == prompts[0]
    assert cache.pages.free == 12
    cache.release([again])
    cache.pages.take(7)  # four are blank, and the second prompt is the one that was not used for longest
    assert [len(cache.find(names_of(prompt, 1))) for prompt in prompts] == [4, 1, 4]
    cache.pages.take(9)
    assert [len(cache.find(names_of(prompt, 1))) for prompt in prompts] == [0, 0, 0]
    assert cache.pages.free == 0


def test_what_others_may_find_is_not_written_to() -> None:
    cache = make_cache(16, 4)
    [row] = cache.arrange([Row()], sources=None, keep=[0], grow=[8], blocks=range(1))
    write(cache, row, list(range(8)))
    names = names_of(list(range(8)), 4)
    cache.name_pages(row, 0, names)
    other = Row()
    cache.adopt([other], [cache.find(names)], [8], blocks=range(1), may_copy=False)
    [row] = cache.arrange([row], sources=None, keep=[6], grow=[1], blocks=range(1))  # the other has it: copied
    row.length = 6
    write(cache, row, [99])
    assert read(cache, other) == list(range(8))
    [other] = cache.arrange([other], sources=None, keep=[6], grow=[1], blocks=range(1))  # nobody has it: forgotten
    other.length = 6
    write(cache, other, [77])
    assert cache.find(names) == other.pages[:1]


def test_taking_too_many_pages_takes_none() -> None:
    pages = PageAllocator(4)
    pages.take(3)
    with pytest.raises(OutOfPages):
        pages.take(2)
    assert pages.free == 1


def test_releasing_a_free_page_is_refused() -> None:
    with pytest.raises(ValueError, match="more often"):
        PageAllocator(2).release([1])


def test_sequences_that_grow_in_turn_stay_in_one_piece() -> None:
    cache = make_cache(256, 4)
    rows = [Row() for _ in range(8)]
    for _ in range(100):
        for at, row in enumerate(rows):
            [rows[at]] = cache.arrange([row], sources=None, keep=[row.length], grow=[1], blocks=range(1))
            write(cache, rows[at], [at])
    assert all(row.contiguous for row in rows)
    assert all(read(cache, row) == [at] * 100 for at, row in enumerate(rows))


def test_a_fork_shares_full_pages_and_copies_only_the_last() -> None:
    cache = make_cache(16, 4)
    [row] = cache.arrange([Row()], sources=None, keep=[0], grow=[10], blocks=range(1))
    write(cache, row, list(range(10)))
    forks = cache.arrange([row], sources=[0, 0, 0], keep=[10] * 3, grow=[1] * 3, blocks=range(1))
    assert cache.pages.count - cache.pages.free == 2 + 3
    for at, fork in enumerate(forks):
        write(cache, fork, [100 + at])
    assert [read(cache, fork) for fork in forks] == [[*range(10), 100 + at] for at in range(3)]
