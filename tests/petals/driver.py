"""An unmodified Petals client under orders. Run by Petals' Python; knows nothing of this project.

Reads a JSON object a line from a socket, ``{"do": name, …}``; answers each with one: ``{"result": …}`` or
``{"error": text}``. With ``pause_at``, ``generate`` says ``{"paused": [PeerIDs of the session's hops]}`` in between and
waits for a line.
"""

import asyncio
import contextlib
import gc
import json
import os
import socket
import sys
import traceback
import uuid

import torch
import transformers
from hivemind.compression import deserialize_torch_tensor
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from petals import AutoDistributedModelForCausalLM
from petals.utils.misc import DUMMY, DUMMY_INT64


class Driver:
    """One client: one model."""

    def __init__(self, stream):
        self.stream = stream
        self.model = None

    def say(self, answer):
        self.stream.write(json.dumps(answer) + "\n")
        self.stream.flush()

    def connect(self, path, initial_peers, dht_prefix, **options):
        """Makes the model; the name of its class."""
        self.model = AutoDistributedModelForCausalLM.from_pretrained(
            path,
            initial_peers=initial_peers,
            dht_prefix=dht_prefix,
            torch_dtype=torch.float32,
            show_route=False,
            **options,
        )
        return type(self.model).__name__

    def generate(self, ids, pause_at=None, max_retries=None, **options):
        """Tokens, the prompt's included. Petals' default is to try again for ever."""
        self.model.transformer.h.sequence_manager.config.max_retries = max_retries
        stopping = transformers.StoppingCriteriaList([PauseAt(self, pause_at)] if pause_at else [])
        return self.model.generate(torch.tensor(ids), stopping_criteria=stopping, **options).tolist()

    def session(self, hidden, steps):
        """Hidden states through a session, in steps of so many columns."""
        pieces = torch.tensor(hidden).split(steps, dim=1)
        with torch.inference_mode(), self.model.inference_session(max_length=sum(steps)) as opened:
            return torch.cat([opened.step(piece) for piece in pieces], dim=1).tolist()

    def pushed(self, hidden, columns):
        """What the second hop gives for the columns from ``columns`` on, which only the first hop is sent."""
        begin, rest = torch.tensor(hidden).split([columns, len(hidden[0]) - columns], dim=1)
        with torch.inference_mode(), self.model.inference_session(max_length=len(hidden[0])) as opened:
            opened.step(begin)  # Petals' clients name the next servers from the second step on
            first, second = opened._server_sessions[:2]
            first.step(rest, DUMMY, DUMMY_INT64, step_id=str(uuid.uuid4()))
            answer = RemoteExpertWorker.run_coroutine(asyncio.wait_for(anext(second._outputs_stream), 30))
        return deserialize_torch_tensor(answer.tensors[0]).tolist()

    def forward_backward(self, hidden, grad, first, last):
        """Output of the blocks, and the gradient of their input."""
        inputs = torch.tensor(hidden, requires_grad=True)
        output = self.model.transformer.h[first:last](inputs)
        output.backward(torch.tensor(grad))
        return {"output": output.tolist(), "grad": inputs.grad.tolist()}

    def room(self, tokens):
        """Which of these lengths each server has room for, as the client thinks that it needs it."""
        manager = self.model.transformer.h.sequence_manager
        manager.make_sequence(mode="min_latency")  # it looks at the swarm when it first needs to
        spans = manager.state.sequence_info.spans_by_priority
        return [[length for length in tokens if manager._has_cache_for(span, length)] for span in spans]

    def cache_available(self, sessions):
        """What the first server tells before any of ``sessions``, and in each, opened one within the other.

        A session is given by its blocks' ``first`` and ``last``, and its ``max_length``.
        """
        layers = self.model.transformer.h
        told = [self._ask_for_cache()]
        with contextlib.ExitStack() as opened, torch.inference_mode():
            for first, last, max_length in sessions:
                session = opened.enter_context(layers[first:last].inference_session(max_length=max_length))
                session.step(torch.zeros(1, 1, self.model.config.hidden_size))
                told.append(self._ask_for_cache())
        return told

    def _ask_for_cache(self):
        manager = self.model.transformer.h.sequence_manager
        manager.state.rpc_info = None  # it remembers the last answer
        return manager.rpc_info["cache_tokens_available"]

    def tune(self, ids, labels, prompts, deep=None):
        """Loss and the gradients of trainable prompts, set to these values before."""
        model = self.model
        embeddings = model.transformer.prompt_embeddings.weight
        embeddings.data.copy_(torch.tensor(prompts))
        found = {"prompts": embeddings}
        if deep is not None:
            found["deep"] = model.transformer.intermediate_prompt_embeddings.weight
            found["deep"].data.copy_(torch.tensor(deep))
        logits = model(torch.tensor(ids)).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(labels).flatten())
        model.zero_grad()
        loss.backward()
        return {"loss": loss.item(), **{key: weight.grad.tolist() for key, weight in found.items()}}


class PauseAt(transformers.StoppingCriteria):
    """Stops the text at a length until a line comes."""

    def __init__(self, driver, length):
        self.driver, self.length = driver, length

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] == self.length:
            session = self.driver.model.transformer.h.active_session
            self.driver.say({"paused": [hop.span.peer_id.to_base58() for hop in session._server_sessions]})
            self.driver.stream.readline()
        return False


def serve(address):
    """Carries out orders until the socket is closed."""
    # A session of Petals' that is collected as garbage waits for Petals' event loop to close it. Python collects in
    # whichever thread has just made an object: in the loop's own, that is a wait for ever. So it is done here alone.
    gc.disable()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    driver = Driver(connection.makefile("rw"))
    for line in iter(driver.stream.readline, ""):
        gc.collect()
        order = json.loads(line)
        try:
            result = getattr(driver, order.pop("do"))(**order)
        except Exception:
            driver.say({"error": traceback.format_exc()})
        else:
            driver.say({"result": result})
    sys.stderr.flush()
    os._exit(0)  # nothing of it needs to be put in order
