"""What goes over the wire between a client and nodes: tensors, messages, streams, records."""
