"""What the commands of ``swarm-node`` do beside serving."""
