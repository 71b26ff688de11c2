"""A model as its config describes it, and its blocks made ready to run."""
