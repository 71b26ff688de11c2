"""Being reached from outside: whether it is so, and through whom else."""
