"""The KV cache: pages, the rows that live in them, and recurrent states."""
