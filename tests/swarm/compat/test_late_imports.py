"""In processes of their own: imports can't be taken back."""

import subprocess
import sys

import pytest

HEAVY = ["torch._dynamo.eval_frame", "torch.distributed.tensor", "scipy.special", "sympy"]
BEGIN = "from swarm.compat.late_imports import defer_imports, importing; defer_imports()\n"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("module", ["swarm.node.hosting.server", "swarm.client.model.facade"])
def test_what_is_not_imported(module: str) -> None:
    code = f"with importing():\n    import {module}, sys\nprint([name for name in {HEAVY} if name in sys.modules])"
    assert run(BEGIN + code) == "[]\n"


def test_all_works_when_it_is_asked_for() -> None:
    code = """
import inspect, sys
import numpy, torch, hivemind
import transformers.models.llama.modeling_llama
from transformers.integrations import deepgemm, eager_paged
from transformers.loss.loss_for_object_detection import linear_sum_assignment

@torch.compiler.disable
def hidden(x):
    seen.append(torch.compiler.is_compiling())
    return x + 1

for module in ("torch._dynamo", "scipy.optimize"):
    inspect.getfile(sys.modules[module])
assert "torch._dynamo.eval_frame" not in sys.modules
seen = []
assert hidden(1) == 2  # nothing compiles
assert "torch._dynamo.eval_frame" not in sys.modules

assert linear_sum_assignment(numpy.eye(2))[1].tolist() == [1, 0]
assert "scipy.special" in sys.modules

import torch._dynamo.utils
assert torch._dynamo.utils is sys.modules["torch._dynamo.utils"]
assert torch._dynamo.variables.base.VariableTracker is sys.modules["torch._dynamo.variables.base"].VariableTracker
assert torch._dynamo._trace_wrapped_higher_order_op is sys.modules["torch._dynamo._trace_wrapped_higher_order_op"]
torch.compile(lambda x: hidden(x.sin()).cos(), backend="eager")(torch.ones(2))
try:
    torch.compile(lambda x: hidden(x.sin()), backend="eager", fullgraph=True)(torch.ones(2))
except torch._dynamo.exc.Unsupported:
    seen.append("refused")
assert seen == [False, False, "refused"], seen
assert deepgemm.is_sm100._dynamo_marked_constant

from torch.nn.attention.flex_attention import create_block_mask, flex_attention
mask = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 128, 128, device="cpu")
query = torch.ones(1, 1, 128, 16)
assert flex_attention(query, query, query, block_mask=mask).shape == query.shape
import torch.distributed.tensor
"""
    run(BEGIN + code)


def test_marks_are_not_lost() -> None:
    code = """
import torch, torch._dynamo
marked = torch._dynamo.allow_in_graph(lambda x: x + 1)
assert torch._dynamo.__class__.__name__ == "_Deferred"
assert id(marked) in torch._dynamo.trace_rules._allowed_callable_ids
assert torch._dynamo.allow_in_graph.__module__ == "torch._dynamo.decorators"
assert not hasattr(torch._dynamo, "nothing_of_the_kind")
"""
    run(BEGIN + code)


def test_a_program_that_has_torch_is_left_alone() -> None:
    code = "import torch, sys\nbefore = sys.meta_path[:]\n" + BEGIN + "print(sys.meta_path == before)"
    assert run(code) == "True\n"
    assert run("import swarm.client.model.facade, sys\nprint('torch._dynamo.eval_frame' in sys.modules)") == "True\n"
