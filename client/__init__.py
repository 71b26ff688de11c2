"""Using a swarm: the model facade, sessions and routing, and the ``swarm`` command."""
