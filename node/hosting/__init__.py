"""The life of a node in its swarm: what it serves, what it says of itself, when it moves."""
