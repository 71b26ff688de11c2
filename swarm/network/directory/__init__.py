"""The DHT as a directory: who may write what into it."""
