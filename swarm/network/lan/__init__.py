"""Finding a swarm on the local network by multicast DNS, so that nobody has to copy an address."""
