"""Clients for scripts/bench_petals.py, ours or Petals', measured by the same code. Run by the Python of either side.

Reads a JSON object a line. Each order is carried out by fresh processes, forked from this one, which has imported
everything: as many as ``count``, all at once. Answers ``{"results": […], "failed": […], "hung": n}``.
"""

import contextlib
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
    from petals import AutoDistributedModelForCausalLM
    from petals.client.inference_session import InferenceSession


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
    """Opens sessions and fills them, then waits to be ended."""
    sessions = [open_session(model, order["tokens"]) for _ in range(order["sessions"])]
    with torch.inference_mode():
        for session in sessions:
            for _ in range(order["tokens"] // 512):
                session.step(torch.randn(1, 512, model.config.hidden_size, dtype=getattr(torch, order["dtype"])))
    say({"held": True})
    time.sleep(600)


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
    """One client's life: connects, waits for the others, measures, says."""

    def say(answer):
        os.write(out, json.dumps(answer).encode() + b"\n")

    try:
        torch.set_num_threads(order["threads"])
        model = connect(order)
        ORDERS["generate"](model, {"prompt": 4, "tokens": 2}, say)  # finds its route
        say({"ready": True})
        os.read(go, 1)
        say({"result": ORDERS[order["do"]](model, order, say)})
    except BaseException:
        say({"error": traceback.format_exc()})
    os._exit(0)


def carry_out(order, answer):
    """Runs clients until all have answered or time is up."""
    clients = {}
    selector = selectors.DefaultSelector()
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
        clients[out_read] = [pid, go_write, b""]
        selector.register(out_read, selectors.EVENT_READ)
    waiting, ready, results, failed = set(clients), set(), [], []
    deadline = time.monotonic() + order["timeout"]
    while waiting and time.monotonic() < deadline:
        for key, _ in selector.select(0.5):
            data = os.read(key.fd, 2**20)
            if not data:
                if key.fd in waiting:
                    failed.append("it died")
                    waiting.discard(key.fd)
                selector.unregister(key.fd)
                continue
            *lines, clients[key.fd][2] = (clients[key.fd][2] + data).split(b"\n")
            for line in map(json.loads, lines):
                if "ready" in line:
                    ready.add(key.fd)
                elif "kill" in line:
                    os.killpg(order["pids"][line["kill"]], signal.SIGKILL)
                elif "held" in line:
                    answer(line)
                    sys.stdin.readline()
                    waiting.discard(key.fd)
                else:
                    waiting.discard(key.fd)
                    results.append(line["result"]) if "result" in line else failed.append(line["error"])
        if ready and ready >= waiting:  # those that failed to connect are not waited for
            for fd in ready:
                os.write(clients[fd][1], b"x")
            ready = set()
            deadline = time.monotonic() + order["timeout"]
    for pid, go, _ in clients.values():
        os.close(go)
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    for fd in clients:
        os.close(fd)
    return {"results": results, "failed": failed, "hung": len(waiting)}


def main():
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value):
        print(json.dumps(value), file=out, flush=True)

    answer({"up": True})
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        result = carry_out(order, answer)
        answer(result)


if __name__ == "__main__":
    main()
