"""Weight matrices in few bits, a file for each kind, and products with them."""
