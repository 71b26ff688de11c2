"""What a node can take and where it helps: the machine, its memory, how many blocks and which."""
