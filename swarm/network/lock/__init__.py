"""The lock of a private swarm: who knows its key is let in, and nobody else."""
