"""Which families the tests run over real nodes, too."""

OVER_NODES = ("gemma4-e2b", "qwen3_next", "deepseek_v3")
"""Labels of those that tests/swarm_e2e/test_families.py runs over real nodes; test_exact.py has other families.

One of each kind for which a node keeps, or sends, something else than a plain model's: more than hidden states from
node to node, recurrent states, latents. Windows, chunks and sinks are the attention's own affair."""
