"""Joining the peer-to-peer network, and its directory: who is there, and what they serve."""
