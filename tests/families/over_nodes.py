"""Which families the tests run over real nodes, too."""

OVER_NODES = ("llama4_text", "gemma3_text", "gemma4-e2b", "gpt_oss", "qwen3_next", "deepseek_v3")
"""Labels of those that tests/swarm_e2e/test_families.py runs over real nodes; test_exact.py has other families."""
