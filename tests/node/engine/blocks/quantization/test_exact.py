"""The engine computes what transformers' whole model computes, however the work is cut, packed or reordered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from swarm.node.engine.engine import Engine

FAMILIES = ["llama-mha", "llama-gqa", "mistral-window", "mixtral", "bloom", "falcon-180b", "falcon-7b", "falcon-rw"]
Get = Callable[[str], Any]
Start = Callable[..., Engine]


def tokens(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 300, (rows, columns), generator=torch.Generator().manual_seed(seed))


def close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    # Of the largest value, which residual streams have few of: transformers' own eager and SDPA differ by as much
    torch.testing.assert_close(mine, theirs, atol=1e-5 * max(1.0, float(theirs.detach().abs().max())), rtol=0)


@pytest.mark.parametrize("like", FAMILIES)
def test_prefill_in_pieces_then_decode(like: str, reference: Get, start_engine: Start) -> None:
    whole = reference(like)
    states = whole.blocks(tokens(2, 30))
    engine = start_engine(whole.span, max_batch_tokens=10)
    session = engine.open(rows=2, first=0, last=4)
    parts = [engine.step(session, states[0][:, :23], start=0).result()]
    parts += [engine.step(session, states[0][:, at : at + 1], start=at).result() for at in range(23, 28)]
    parts.append(engine.step(session, states[0][:, 28:], start=28).result())
    close(torch.cat(parts, dim=1), states[4])


@pytest.mark.parametrize("like", FAMILIES)
def test_forward_without_cache(like: str, reference: Get, start_engine: Start) -> None:
    whole = reference(like)
    states = whole.blocks(tokens(5, 20))
    engine = start_engine(whole.span, max_batch_tokens=50)
    close(engine.forward(states[0], first=0, last=4).result(), states[4])


@pytest.mark.parametrize("blocks", [(0, 1), (1, 3), (3, 4)])
def test_some_of_the_blocks(blocks: tuple[int, int], reference: Get, start_engine: Start) -> None:
    whole = reference("llama-gqa")
    first, last = blocks
    states = whole.blocks(tokens(1, 12))
    engine = start_engine(whole.span)
    session = engine.open(rows=1, first=first, last=last)
    parts = [engine.step(session, part, start=at).result() for at, part in ((0, states[first][:, :9]),)]
    parts += [engine.step(session, states[first][:, at : at + 1], start=at).result() for at in range(9, 12)]
    close(torch.cat(parts, dim=1), states[last])
    close(engine.forward(states[first], first=first, last=last).result(), states[last])


@pytest.mark.parametrize("like", ["llama-gqa", "mistral-window", "bloom"])
def test_sixteen_sessions_of_different_lengths_in_one_batch(like: str, reference: Get, start_engine: Start) -> None:
    whole = reference(like)
    ids = [tokens(1, 5 + 3 * number, seed=number) for number in range(16)]
    states = [whole.blocks(one) for one in ids]
    engine = start_engine(whole.span, running=False)
    sessions = []
    futures: list[list[Any]] = []
    engine._running = True  # work that is queued before the thread starts is packed together for certain
    for one in states:
        session = engine.open(rows=1, first=0, last=4)
        sessions.append(session)
        prompt = one[0].shape[1] - 3
        steps = [engine.step(session, one[0][:, :prompt], start=0)]
        steps += [engine.step(session, one[0][:, at : at + 1], start=at) for at in range(prompt, prompt + 3)]
        futures.append(steps)
    engine.start()
    for steps, one in zip(futures, states, strict=True):
        close(torch.cat([step.result() for step in steps], dim=1), one[4])
    assert engine.stats().batches < 40


@pytest.mark.parametrize("like", ["llama-gqa", "bloom"])
def test_left_padding(like: str, reference: Get, start_engine: Start) -> None:
    whole = reference(like)
    padding = [0, 5, 11]
    states = [whole.blocks(tokens(1, 14 - pad, seed=pad)) for pad in padding]
    size = whole.span.hidden_size
    inputs, expected = (
        torch.cat(
            [torch.cat([torch.zeros(1, pad, size), one[at]], 1) for pad, one in zip(padding, states, strict=True)]
        )
        for at in (0, 4)
    )
    inputs[1, :5] = torch.nan  # what is padded is not looked at
    engine = start_engine(whole.span, max_batch_tokens=12)
    session = engine.open(rows=3, first=0, last=4, left_padding=padding)
    parts = [engine.step(session, inputs[:, :10], start=0).result()]
    parts += [engine.step(session, inputs[:, at : at + 1], start=at).result() for at in range(10, 14)]
    close(torch.cat(parts, dim=1), expected)


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_hypotheses_are_reordered_grow_and_shrink(page_size: int, reference: Get, start_engine: Start) -> None:
    whole = reference("llama-gqa")
    engine = start_engine(whole.span, page_size=page_size)
    ids = tokens(2, 7)
    session = engine.open(rows=2, first=0, last=4)
    engine.step(session, whole.inputs(ids), start=0).result()
    for step, order in enumerate([[1, 0], [0, 0, 1, 1], [3, 1, 0, 2], [2, 2, 2, 0], [1, 3], [0], [0, 0, 0], [2, 1]]):
        ids = torch.cat([ids[order], tokens(len(order), 1, seed=step)], dim=1)
        states = whole.blocks(ids)
        output = engine.step(session, states[0][:, -1:], start=ids.shape[1] - 1, hypo_ids=torch.tensor(order)).result()
        close(output, states[4][:, -1:])
    engine.close(session)


def test_crop_and_go_on(reference: Get, start_engine: Start) -> None:
    whole = reference("llama-gqa")
    engine = start_engine(whole.span)
    session = engine.open(rows=1, first=0, last=4)
    ids = tokens(1, 20)
    engine.step(session, whole.inputs(ids), start=0).result()
    for start, length in ((13, 4), (5, 9), (0, 3)):
        ids = torch.cat([ids[:, :start], tokens(1, length, seed=start)], dim=1)
        states = whole.blocks(ids)
        close(engine.step(session, states[0][:, start:], start=start).result(), states[4][:, start:])
    empty = engine.step(session, torch.zeros(1, 0, whole.span.hidden_size), start=1).result()
    assert empty.shape == (1, 0, whole.span.hidden_size)
    assert session.position == 1


@torch.no_grad()
def test_greedy_tokens_are_those_of_generate(reference: Get, start_engine: Start) -> None:
    whole = reference("llama-gqa")
    model = whole.model
    ids = tokens(1, 6)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    engine = start_engine(whole.span)
    session = engine.open(rows=1, first=0, last=4)
    done = 0
    while ids.shape[1] < expected.shape[1]:
        hidden = model.get_input_embeddings()(ids[:, done:])
        output = engine.step(session, hidden, start=done).result()
        done = ids.shape[1]
        logits = model.lm_head(model.model.norm(output[:, -1:]))
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert ids.tolist() == expected.tolist()


@pytest.mark.parametrize("prompt_rows", [1, 3])
@pytest.mark.parametrize("max_batch_tokens", [5, 64])
@pytest.mark.parametrize("like", ["llama-gqa", "bloom"])
def test_deep_prompts_and_gradients(
    like: str, max_batch_tokens: int, prompt_rows: int, reference: Get, start_engine: Start
) -> None:
    whole = reference(like)
    hidden = whole.inputs(tokens(3, 9)).detach().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randn(4, prompt_rows, 4, whole.span.hidden_size, generator=generator).requires_grad_()
    grad = torch.randn(hidden.shape, generator=generator)

    hooks = []
    for at, layer in enumerate(whole.layers()):

        def add(_module: Any, inputs: Any, at: int = at) -> Any:
            added = torch.cat([prompts[at], torch.zeros(prompt_rows, 5, whole.span.hidden_size)], dim=1)
            return (inputs[0] + added, *inputs[1:])

        hooks.append(layer.register_forward_pre_hook(add))
    last: list[torch.Tensor] = []
    hooks.append(
        whole.layers()[-1].register_forward_hook(
            lambda _module, _inputs, output: last.append(output[0] if isinstance(output, tuple) else output)
        )
    )
    if like == "bloom":
        hooks.append(whole.model.transformer.word_embeddings_layernorm.register_forward_hook(lambda *_: hidden))
        whole.model(tokens(3, 9))
    else:
        whole.model(inputs_embeds=hidden)
    for hook in hooks:
        hook.remove()
    expected = torch.autograd.grad(last[0], (hidden, prompts), grad)

    engine = start_engine(whole.span, max_batch_tokens=max_batch_tokens)
    options: Any = {"first": 0, "last": 4, "prompts": prompts.detach()}
    close(engine.forward(hidden.detach(), **options).result(), last[0])
    hidden_grad, prompt_grad = engine.backward(hidden.detach(), grad, **options).result()
    assert prompt_grad is not None
    close(hidden_grad, expected[0])
    close(prompt_grad, expected[1])
    session = engine.open(rows=3, first=0, last=4)
    close(engine.step(session, hidden.detach(), start=0, prompts=prompts.detach()).result(), last[0])


def test_backward_without_prompts(reference: Get, start_engine: Start) -> None:
    whole = reference("llama-mha")
    states = whole.blocks(tokens(2, 6))
    hidden = states[1].detach().requires_grad_()
    engine = start_engine(whole.span)
    grad = torch.ones_like(hidden)
    mine, none = engine.backward(hidden.detach(), grad, first=1, last=2).result()
    assert none is None
    rotary = whole.model.model.rotary_emb(hidden, torch.arange(6)[None])
    mask = torch.full((6, 6), float("-inf")).triu(1)[None, None]
    output = whole.layers()[1](hidden, position_embeddings=rotary, attention_mask=mask)
    torch.testing.assert_close(mine, torch.autograd.grad(output, hidden, grad)[0], atol=1e-5, rtol=1e-4)


def test_results_have_the_spans_dtype(reference: Get, start_engine: Start) -> None:
    whole = reference("llama-gqa")
    states = whole.blocks(tokens(1, 4))
    engine = start_engine(whole.span)
    session = engine.open(rows=1, first=0, last=4)
    assert engine.step(session, states[0].bfloat16(), start=0).result().dtype == torch.float32
    assert engine.forward(states[0].half(), first=0, last=4).result().dtype == torch.float32
