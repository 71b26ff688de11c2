"""Serving: the ``swarm-node`` command, the engine, and everything a node does in a swarm."""
