"""What both sides of a swarm speak. Nodes are in ``swarm.node``, clients in ``swarm.client``."""

__version__ = "0.1.0"
