"""The ends, with the blocks of engines between them, are transformers' whole model, for every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from swarm.client import SwarmModelForCausalLM
from swarm.client.ends.model_ends import ModelEnds
from swarm.client.gateway.decode.admission import Admission
from swarm.client.gateway.decode.engine import GatewayEngine
from swarm.client.gateway.decode.generation import Generation, Job, Sampled, Timing
from swarm.client.gateway.decode.sampling import SamplingParams
from swarm.model.load_ends import load_ends
from swarm.model.source import resolve
from tests.client.in_process import InProcessConnection
from tests.models import PRESETS, tiny_model


@pytest.mark.parametrize("family", PRESETS)
def test_rows_at_different_positions_in_one_batch(family: str) -> None:
    path = tiny_model(family)
    connection: Any = InProcessConnection(path)
    whole = AutoModelForCausalLM.from_pretrained(path)
    with SwarmModelForCausalLM.from_ends(load_ends(resolve(str(path))), connection) as model:
        ends = ModelEnds(model)
        prompts = [
            torch.randint(10, 250, (1, length), generator=torch.Generator().manual_seed(length)) for length in (3, 9)
        ]
        sessions = [connection.session(max_length=20) for _ in prompts]
        columns = [torch.arange(prompt.shape[1])[None] for prompt in prompts]
        hidden = [
            session.step(ends.embed(prompt, column))
            for session, prompt, column in zip(sessions, prompts, columns, strict=True)
        ]
        texts = prompts
        for _ in range(4):
            logits = ends.logits(torch.cat([each[:, -1] for each in hidden]))
            for row, text in enumerate(texts):
                with torch.no_grad():
                    right = whole(text, output_hidden_states=True)
                torch.testing.assert_close(logits[row], right.logits[0, -1], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(
                    ends.norm(hidden[row])[:, -1], right.hidden_states[-1][:, -1], atol=1e-4, rtol=1e-4
                )
            tokens = logits.argmax(dim=-1, keepdim=True)
            positions = torch.tensor([[text.shape[1]] for text in texts])
            embedded = ends.embed(tokens, positions)
            hidden = [session.step(embedded[row : row + 1]) for row, session in enumerate(sessions)]
            texts = [torch.cat([text, tokens[row : row + 1]], dim=1) for row, text in enumerate(texts)]


class TooMuch:
    """A grammar that can't say what comes next."""

    finished = False

    def allowed(self) -> torch.Tensor:
        raise RuntimeError("too much")

    def accept(self, token: int) -> None:
        raise AssertionError


def test_a_grammar_that_fails_ends_its_own_text_alone() -> None:
    path = tiny_model("llama-gqa")
    connection: Any = InProcessConnection(path)
    with SwarmModelForCausalLM.from_ends(load_ends(resolve(str(path))), connection) as model:
        engine = GatewayEngine(ModelEnds(model), connection, Admission(2, 2), lambda rows: None)
        greedy, session = SamplingParams(temperature=0), None
        jobs = [Job((1, 2), 5, greedy, 0, grammar=TooMuch()), Job((1, 2), 5, greedy, 0)]
        batch = [Generation(job, session, Timing()) for job in jobs]  # type: ignore[arg-type]
        hidden = torch.randn(1, model.config.hidden_size)
        (failed, other), embedded = engine._compute(batch, [hidden, hidden])
        assert str(failed) == "too much"
        assert isinstance(other, Sampled)
        assert other.token == int(ModelEnds(model).logits(hidden).argmax())
        assert embedded.shape == (2, 1, model.config.hidden_size)
