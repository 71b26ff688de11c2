"""What the commands of ``swarm`` do."""
