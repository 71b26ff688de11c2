"""``swarm gateway``: an OpenAI-compatible HTTP API over the models that a swarm serves.

Needs the extra ``swarm-llm[gateway]``. Nothing is imported here, so that the command can say so in one line.
"""
