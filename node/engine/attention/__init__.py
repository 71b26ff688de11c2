"""Attention over a batch of rows in pages."""
