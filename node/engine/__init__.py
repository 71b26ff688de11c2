"""The engine: runs a span of blocks over the waiting work of all sessions at once."""
