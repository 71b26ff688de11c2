"""The facade computes what transformers' whole model computes, over real engines; only the network is left out."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.cache_utils import DynamicCache

from swarm.client import SwarmModelForCausalLM
from swarm.errors import UsageError
from tests.client.model.conftest import OPTIONS, Pair, close, make_pair, padded, small_draft, tokens

# Every family


def test_is_the_familys_own_class(each: Pair) -> None:
    assert isinstance(each.mine, type(each.whole))
    assert isinstance(each.mine, SwarmModelForCausalLM)
    assert type(each.mine).__name__ == type(each.whole).__name__


def test_greedy(each: Pair) -> None:
    each.same(tokens(2, 6))
    assert each.connection.steps() == [[(2, 6), *[(2, 1)] * 6]]


def test_left_padded_batch(each: Pair) -> None:
    ids, mask = padded()
    each.same(ids, attention_mask=mask)


def test_beams_over_a_padded_batch(each: Pair) -> None:
    ids, mask = padded()
    each.same(ids, attention_mask=mask, num_beams=3, num_return_sequences=2, length_penalty=0.5, early_stopping=True)
    assert each.all_closed()


@torch.no_grad()
def test_logits_under_each_padding(each: Pair) -> None:
    ids, left = padded()
    right = left.flip(1)
    both = left & right
    for mask in (None, left, right, both):
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        mine, theirs = (model(ids, attention_mask=mask).logits[real] for model in (each.mine, each.whole))
        close(mine, theirs)


def test_loss_and_gradients_of_the_input(each: Pair) -> None:
    ids, mask = padded()
    # Nor is a row's first token asked for: what would predict it is a column of padding, which means nothing.
    labels = ids.masked_fill(mask.cumsum(1) < 2, -100)
    results = []
    for model in (each.mine, each.whole):
        embeds = each.whole.get_input_embeddings()(ids).detach().requires_grad_()
        out = model(inputs_embeds=embeds, attention_mask=mask, labels=labels)
        out.loss.backward()
        assert embeds.grad is not None
        results.append((out.loss.detach(), embeds.grad[mask.bool()]))
    close(results[0][0], results[1][0])
    close(results[0][1], results[1][1])


def test_session_goes_on_over_padded_rows(each: Pair) -> None:
    ids, mask = padded()
    with each.mine.session(max_length=60):
        first = each.same(ids, attention_mask=mask)
        longer = torch.cat([first, tokens(3, 4, seed=1)], dim=1)
        longer_mask = torch.cat([mask, torch.ones(3, longer.shape[1] - 9, dtype=torch.int64)], dim=1)
        each.connection.steps()
        each.same(longer, attention_mask=longer_mask)
        assert each.connection.steps()[-1][0] == (3, 5)  # the last token that was sampled, and the new ones
    assert each.all_closed()


# generate() and its options


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        {"do_sample": True, "top_k": 20, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 1},
        {"prefill_chunk_size": 2},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_options(pair: Pair, options: dict[str, Any]) -> None:
    pair.same(tokens(1 if "prompt_lookup_num_tokens" in options else 2, 5), **options)
    assert pair.all_closed()


def test_end_of_text_and_own_stopping_criteria(pair: Pair) -> None:
    ids = tokens(2, 5)
    free = pair.same(ids)
    stopped = pair.same(ids, eos_token_id=int(free[0, 7]))
    assert (stopped[0, 8:] == 0).all()
    criteria = StoppingCriteriaList([lambda so_far, scores, **_: torch.full((2,), so_far.shape[1] >= 8)])
    assert pair.same(ids, stopping_criteria=criteria).shape == (2, 8)


def test_scores_and_logits_of_a_returned_dict(pair: Pair) -> None:
    options = OPTIONS | {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    mine, theirs = (model.generate(tokens(2, 5), **options) for model in (pair.mine, pair.whole))
    close(torch.stack(mine.scores), torch.stack(theirs.scores))
    close(torch.stack(mine.logits), torch.stack(theirs.logits))
    assert mine.past_key_values is None
    assert pair.mine.last_route == [(0, 2), (2, 4)]


def test_assisted_takes_fewer_steps(pair: Pair) -> None:
    ids = tokens(1, 5)
    for draft in (small_draft(), pair.whole):
        mine = pair.mine.generate(ids, assistant_model=draft, **(OPTIONS | {"max_new_tokens": 20}))
        assert mine.tolist() == pair.whole.generate(ids, **(OPTIONS | {"max_new_tokens": 20})).tolist()
    assert len(pair.connection.steps()[-1]) < 15
    with pytest.raises(ValueError, match="on this machine"):
        pair.whole.generate(ids, assistant_model=pair.mine, **OPTIONS)


def test_embeddings_as_the_prompt(pair: Pair) -> None:
    embeds = pair.whole.get_input_embeddings()(tokens(2, 5)).detach()
    mine, theirs = (model.generate(inputs_embeds=embeds, **OPTIONS) for model in (pair.mine, pair.whole))
    assert mine.tolist() == theirs.tolist()


def test_logits_to_keep(pair: Pair) -> None:
    mine, theirs = (model(tokens(2, 5), logits_to_keep=2).logits for model in (pair.mine, pair.whole))
    close(mine, theirs)


# Sessions


def test_session_is_only_a_memory(pair: Pair) -> None:
    ids = tokens(1, 6)
    with pair.mine.session(max_length=40) as session:
        answer = pair.same(ids)
        assert session.position == answer.shape[1] - 1
        assert session.route == [(0, 2), (2, 4)]
        pair.connection.steps()
        pair.same(answer)
        assert pair.connection.steps()[-1][0] == (1, 1)
        edited = answer.clone()
        edited[0, 8] = 5
        pair.same(edited)  # goes back to where it differs
        assert pair.connection.steps()[-1][0] == (1, 5)
        pair.same(ids)  # everything was seen; the last column is computed again for its logits
        assert pair.connection.steps()[-1][0] == (1, 1)
        pair.same(tokens(1, 6, seed=9))
        pair.same(tokens(2, 6, seed=9), num_beams=2)
        pair.same(tokens(2, 6, seed=9), num_beams=2)
        pair.same(ids, max_new_tokens=20, assistant_model=small_draft())
        pair.same(torch.cat([ids, ids], dim=1), max_new_tokens=5, assistant_model=small_draft())
    assert pair.all_closed()
    with pytest.raises(ValueError, match="closed"):
        pair.mine.generate(ids, session=session, **OPTIONS)


def test_only_new_ids_where_the_mask_covers_all(pair: Pair) -> None:
    ids = tokens(1, 6)
    with pair.mine.session(max_length=40) as session:
        so_far = pair.mine.generate(ids, **OPTIONS)
        new = torch.cat([so_far[:, session.position :], tokens(1, 3, seed=2)], dim=1)
        mask = torch.ones(1, session.position + new.shape[1], dtype=torch.int64)
        mine = pair.mine.generate(new, attention_mask=mask, **OPTIONS)
        with pytest.raises(ValueError, match="pass all ids so far"):
            pair.mine.generate(new, attention_mask=torch.ones(1, 30, dtype=torch.int64), **OPTIONS)
    whole = pair.whole.generate(torch.cat([so_far, new[:, 1:]], dim=1), **OPTIONS)
    assert mine[0, -7:].tolist() == whole[0, -7:].tolist()


def test_session_without_room(pair: Pair) -> None:
    with pair.mine.session(max_length=10), pytest.raises(ValueError, match=r"12 positions.*room for 10"):
        pair.mine.generate(tokens(1, 6), **OPTIONS)
    with pair.mine.session(max_length=10) as session:
        session.step(torch.zeros(1, 8, pair.mine.config.hidden_size))
        with pytest.raises(ValueError, match="8 of 10 are taken"):
            session.step(torch.zeros(1, 3, pair.mine.config.hidden_size))


def test_loop_written_by_hand(pair: Pair) -> None:
    ids = tokens(2, 5)
    with pair.mine.session(max_length=20) as session, torch.no_grad():
        made, new = ids, ids
        for _ in range(7):
            new = pair.mine(new, past_key_values=session.cache).logits[:, -1:].argmax(-1)
            made = torch.cat([made, new], dim=1)
    assert made.tolist() == pair.whole.generate(ids, **OPTIONS).tolist()


def test_several_threads_each_with_its_session(pair: Pair) -> None:
    expected = [pair.whole.generate(tokens(1, 6, seed), **OPTIONS).tolist() for seed in range(4)]
    made: dict[int, Any] = {}

    def work(seed: int) -> None:
        with pair.mine.session(max_length=30):
            made[seed] = pair.mine.generate(tokens(1, 6, seed), **OPTIONS).tolist()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [made[seed] for seed in range(4)] == expected


# Ends and errors


def test_session_is_closed_when_generate_raises(pair: Pair) -> None:
    def fail(*_: Any, **__: Any) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pair.mine.generate(tokens(1, 5), stopping_criteria=StoppingCriteriaList([fail]), **OPTIONS)
    assert pair.connection.sessions
    assert pair.all_closed()


@pytest.mark.parametrize("row", [[1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]], ids=str)
def test_other_padding_is_refused(pair: Pair, row: list[int]) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], row])
    with pytest.raises(ValueError, match="pad on the left"):
        pair.mine.generate(tokens(2, 5), attention_mask=mask, **OPTIONS)
    assert not pair.connection.sessions


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"output_hidden_states": True}, "stays on the nodes"),
        ({"output_attentions": True}, "stays on the nodes"),
        ({"use_cache": True}, "model.session"),
        ({"position_ids": torch.tensor([[0, 1, 0, 1]])}, "count up by one"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "only padding can be masked"),
    ],
    ids=str,
)
def test_what_a_swarm_cannot_do_is_said(pair: Pair, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        pair.mine(tokens(1, 4), **options)


def test_other_caches_are_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match="DynamicCache"):
        pair.mine.generate(tokens(1, 4), past_key_values=DynamicCache(), **OPTIONS)
    with pytest.raises(ValueError, match="on the nodes"):
        pair.mine.generate(tokens(1, 4), cache_implementation="static", **OPTIONS)


def test_closing_is_once(tmp_path: Any) -> None:
    pair = make_pair("llama-gqa")
    pair.mine.save_pretrained(tmp_path)
    assert "LlamaForCausalLM" in (tmp_path / "config.json").read_text()
    assert 0 < pair.mine.num_parameters() < pair.whole.num_parameters()
    with pair.mine:
        pass
    pair.mine.close()
    assert pair.connection.times_closed == 1
    pair = make_pair("llama-gqa")
    connection, pair.mine = pair.connection, None
    import gc

    gc.collect()
    assert connection.times_closed == 1


def test_import_is_quick() -> None:
    code = "import sys, swarm.client; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Blocks


@torch.no_grad()
def test_blocks(pair: Pair) -> None:
    blocks = pair.mine.blocks
    assert len(blocks) == 4
    hidden = pair.whole(tokens(2, 6), output_hidden_states=True).hidden_states
    close(blocks[1:3](hidden[1]), hidden[3])
    close(blocks[1:][0](hidden[1]), hidden[2])
    close(blocks[-2:-1](hidden[2]), hidden[3])
    assert [block.first for block in blocks] == [0, 1, 2, 3]
    with pytest.raises(IndexError):
        blocks[4]
    with pytest.raises(UsageError):
        blocks[2:2]
    with pytest.raises(ValueError, match="hidden size"):
        blocks(hidden[0][0])


def test_blocks_are_differentiable(pair: Pair) -> None:
    given = torch.randn(2, 5, pair.mine.config.hidden_size)
    whole, pieces = given.clone().requires_grad_(), given.clone().requires_grad_()
    pair.mine.blocks(whole).square().sum().backward()
    pair.mine.blocks[3](pair.mine.blocks[:3](pieces)).square().sum().backward()
    assert whole.grad is not None
    assert pieces.grad is not None
    close(whole.grad, pieces.grad)
