"""Weights from peers: pieces of a checkpoint go from those that have them to those that need them, each checked."""
