"""Requests of the API: from bytes to checked fields."""
