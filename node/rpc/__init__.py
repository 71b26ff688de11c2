"""The RPCs of a node: messages are checked and queued for the engine here, and results sent on."""
