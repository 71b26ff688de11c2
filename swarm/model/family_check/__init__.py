"""With versions of transformers and torch that aren't tested, families are checked on tiny models before use."""
