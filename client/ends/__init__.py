"""The two ends of a model: what the client computes itself, before and behind the blocks."""
