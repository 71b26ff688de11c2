"""What the engine uses of a GPU."""
