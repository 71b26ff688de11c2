"""Whose work runs next, and how much of it."""
