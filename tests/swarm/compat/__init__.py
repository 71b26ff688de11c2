"""What we rely on in the libraries that we reach into."""
