"""The model as transformers knows it, computed by a swarm."""
