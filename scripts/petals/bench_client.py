"""Clients for scripts/bench_petals.py, ours or Petals', measured by the same code. Run by the Python of either side.

Reads a JSON object a line. Each order is carried out by fresh processes, forked from this one, which has imported
everything: as many as ``count``. They connect a few at a time, and measure all at once. Those that have not connected
or not finished in time are killed. Answers ``{"results": […], "failed": […], "hung": n}``.
"""

import contextlib
import gc
import json
import os
import selectors
import signal
import sys
import time
import traceback

import torch
import transformers

SIDE = sys.argv[1]
if SIDE == "ours":
    from swarm.client import SwarmModelForCausalLM
else:
    from hivemind.utils.mpfuture import MPFuture
    from petals import AutoDistributedModelForCausalLM
    from petals.client.inference_session import InferenceSession

CONNECTING = 4  # at once: more only make each other late
CONNECT_SECONDS = 60.0


def connect(order):
    """The model, ready to use."""
    if SIDE == "ours":
        return SwarmModelForCausalLM.from_pretrained(
            order["model"], initial_peers=order["peers"], dht_prefix=order["prefix"], dtype=order["dtype"]
        )
    return AutoDistributedModelForCausalLM.from_pretrained(
        order["model"],
        initial_peers=order["peers"],
        dht_prefix=order["prefix"],
        torch_dtype=getattr(torch, order["dtype"]),
        show_route=False,
    )


def open_session(model, length):
    """A session to step by hand."""
    if SIDE == "ours":
        return model._connection.session(max_length=length)
    return InferenceSession(model.transformer.h.sequence_manager, max_length=length)


def route_of(session):
    """The PeerIDs of a session's hops."""
    if SIDE == "ours":
        return [str(hop.peer_id) for hop in session.route]
    return [hop.span.peer_id.to_base58() for hop in session._server_sessions]


class Clock(transformers.StoppingCriteria):
    """Notes when each token comes; in old versions of transformers not the last one, which the length stops first."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **kwargs):
        self.times.append(time.perf_counter())
        return False


def generate(model, order, say):
    """Times of the tokens, counted from the call."""
    clock = Clock()
    ids = torch.randint(10, 250, (1, order["prompt"]))
    start = time.perf_counter()
    model.generate(
        ids,
        max_new_tokens=order["tokens"],
        do_sample=False,
        stopping_criteria=transformers.StoppingCriteriaList([clock]),
        pad_token_id=0,
    )
    return {"times": [moment - start for moment in clock.times]}


def forward(model, order, say):
    """Seconds for one pass without a cache."""
    hidden = torch.randn(order["rows"], order["tokens"], model.config.hidden_size, dtype=getattr(torch, order["dtype"]))
    blocks = model.blocks if SIDE == "ours" else model.transformer.h
    with torch.no_grad():
        blocks(hidden)
        start = time.perf_counter()
        blocks(hidden)
    return {"seconds": time.perf_counter() - start}


def hold(model, order, say):
    """Opens sessions and fills them, up to each number of ``sessions``; says so and waits each time."""
    sessions = []
    with torch.inference_mode():
        for number in order["sessions"]:
            while len(sessions) < number:
                sessions.append(open_session(model, order["tokens"]))
                for _ in range(order["tokens"] // 512):
                    hidden = torch.randn(1, 512, model.config.hidden_size, dtype=getattr(torch, order["dtype"]))
                    sessions[-1].step(hidden)
            say({"held": number})
    return {}


def stall(model, order, say):
    """Times of steps, while a hop dies."""
    session = open_session(model, order["prompt"] + order["tokens"])
    dtype = getattr(torch, order["dtype"])
    times = []
    with torch.inference_mode():
        session.step(torch.randn(1, order["prompt"], model.config.hidden_size, dtype=dtype))
        for number in range(order["tokens"]):
            if number == order["kill_at"]:
                say({"kill": route_of(session)[-1]})
                time.sleep(0.5)  # until it is dead for sure
            start = time.perf_counter()
            session.step(torch.randn(1, 1, model.config.hidden_size, dtype=dtype))
            times.append(time.perf_counter() - start)
    return {"times": times}


ORDERS = {order.__name__: order for order in (generate, forward, hold, stall)}


def child(order, go, out):
    """One client's life: connects when it may, waits for the others, measures, says."""

    def say(answer):
        os.write(out, json.dumps(answer).encode() + b"\n")
        if "held" in answer:
            os.read(go, 1)

    gc.disable()  # Petals' client waits for itself for ever when its event loop's thread collects a session as garbage
    try:
        if SIDE != "ours":
            MPFuture.reset_backend()  # its locks are shared by all that is forked after the import
        torch.set_num_threads(order["threads"])
        os.read(go, 1)
        model = connect(order)
        ORDERS["generate"](model, {"prompt": 4, "tokens": 2}, say)  # finds its route
        say({"ready": True})
        os.read(go, 1)
        say({"result": ORDERS[order["do"]](model, order, say)})
    except BaseException:
        say({"error": traceback.format_exc()})
    os._exit(0)


class Clients:
    """The clients of one order."""

    def __init__(self, order, answer):
        self.order, self.answer = order, answer
        self.selector = selectors.DefaultSelector()
        self.pids, self.go, self.rest = {}, {}, {}
        self.results, self.failed, self.hung = [], [], 0
        for _ in range(order["count"]):
            go_read, go_write = os.pipe()
            out_read, out_write = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.setsid()
                os.dup2(2, 1)
                child(order, go_read, out_write)
            os.close(out_write)
            os.close(go_read)
            self.pids[out_read], self.go[out_read], self.rest[out_read] = pid, go_write, b""
            self.selector.register(out_read, selectors.EVENT_READ)

    def run(self):
        """All of it, from connecting to the last answer."""
        unborn, connecting, ready = list(self.pids), {}, set()
        while unborn or connecting:
            while unborn and len(connecting) < CONNECTING:
                connecting[unborn[-1]] = time.monotonic() + CONNECT_SECONDS
                self.tell(unborn.pop())
            for client, line in self.lines():
                del connecting[client]
                if "ready" in line:
                    ready.add(client)
                else:
                    self.end(client, line)
            for client in [client for client, deadline in connecting.items() if time.monotonic() > deadline]:
                del connecting[client]
                self.end(client)
        for client in ready:
            self.tell(client)
        deadline = time.monotonic() + self.order["timeout"]
        while ready and time.monotonic() < deadline:
            for client, line in self.lines():
                if "kill" in line:
                    os.killpg(self.order["pids"][line["kill"]], signal.SIGKILL)
                elif "held" in line:
                    self.answer(line)
                    sys.stdin.readline()
                    self.tell(client)
                    deadline = time.monotonic() + self.order["timeout"]
                else:
                    ready.discard(client)
                    self.end(client, line)
        for client in ready:
            self.end(client)
        return {"results": self.results, "failed": self.failed, "hung": self.hung}

    def tell(self, client):
        """Lets a client go on."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self.go[client], b"x")

    def lines(self):
        """What clients have said."""
        found = []
        for key, _ in self.selector.select(0.5):
            client, data = key.fd, os.read(key.fd, 2**20)
            *lines, self.rest[client] = (self.rest[client] + data).split(b"\n")
            found += [(client, json.loads(line)) for line in lines]
            if not data:
                found.append((client, {"error": "it died"}))
        return found

    def end(self, client, line=None):
        """Notes what became of a client, and ends it."""
        if line is None:
            self.hung += 1
        elif "result" in line:
            self.results.append(line["result"])
        else:
            self.failed.append(line["error"])
        self.selector.unregister(client)
        pid = self.pids[client]
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(self.go[client])
        os.close(client)


def main():
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value):
        print(json.dumps(value), file=out, flush=True)

    answer({"up": True})
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        answer(Clients(order, answer).run())


if __name__ == "__main__":
    main()
