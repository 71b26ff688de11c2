"""Which nodes a client goes through."""
