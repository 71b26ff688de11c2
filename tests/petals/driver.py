"""An unmodified Petals client under orders. Run by Petals' Python; knows nothing of this project.

Reads a JSON object a line, ``{"do": name, …}``; answers each with one: ``{"result": …}`` or ``{"error": text}``.
Before that an order with ``pause_at`` says ``{"paused": true}`` once and waits for a line.
"""

import json
import os
import sys
import threading
import traceback

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print

import torch  # noqa: E402
import transformers  # noqa: E402
from petals import AutoDistributedModelForCausalLM  # noqa: E402

MODELS = {}


def say(answer):
    print(json.dumps(answer), file=ANSWERS, flush=True)


class PauseAt(transformers.StoppingCriteria):
    """Stops the text at a length until a line comes."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] == self.length:
            say({"paused": True})
            sys.stdin.readline()
        return False


def connect(name, path, initial_peers, dht_prefix, **options):
    """Makes a model."""

    def make():
        MODELS[name] = AutoDistributedModelForCausalLM.from_pretrained(
            path,
            initial_peers=initial_peers,
            dht_prefix=dht_prefix,
            torch_dtype=torch.float32,
            show_route=False,
            **options,
        )

    for _ in range(3):  # it forks its DHT while threads run: now and then the child hangs on a lock that nobody holds
        thread = threading.Thread(target=make, daemon=True)
        thread.start()
        thread.join(30)
        if name in MODELS:
            return type(MODELS[name]).__name__
    raise TimeoutError("the Petals client does not connect")


def generate(name, ids, pause_at=None, **options):
    """Tokens, the prompt's included."""
    stopping = transformers.StoppingCriteriaList([PauseAt(pause_at)] if pause_at else [])
    return MODELS[name].generate(torch.tensor(ids), stopping_criteria=stopping, **options).tolist()


def session(name, hidden, steps):
    """Hidden states through a session, in steps of so many columns."""
    pieces = torch.tensor(hidden).split(steps, dim=1)
    with torch.inference_mode(), MODELS[name].inference_session(max_length=sum(steps)) as opened:
        return torch.cat([opened.step(piece) for piece in pieces], dim=1).tolist()


def forward_backward(name, hidden, grad, first, last):
    """Output of the blocks, and the gradient of their input."""
    inputs = torch.tensor(hidden, requires_grad=True)
    output = MODELS[name].transformer.h[first:last](inputs)
    output.backward(torch.tensor(grad))
    return {"output": output.tolist(), "grad": inputs.grad.tolist()}


def tune(name, ids, labels, prompts, deep=None):
    """Loss and the gradients of trainable prompts, set to these values before."""
    model = MODELS[name]
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


def main():
    orders = {order.__name__: order for order in (connect, generate, session, forward_backward, tune)}
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        try:
            result = orders[order.pop("do")](**order)
        except Exception:
            say({"error": traceback.format_exc()})
        else:
            say({"result": result})
    ANSWERS.flush()
    os._exit(0)  # nothing of it needs to be put in order


if __name__ == "__main__":
    main()
