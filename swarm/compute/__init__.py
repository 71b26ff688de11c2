"""How this machine computes: layers packed for its processor, its threads and its memory."""
