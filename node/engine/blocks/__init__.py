"""Transformer blocks made quick for this machine, and what adapters add to them."""
