"""A model's weights: in files, on the Hub, with peers; read, dequantized and put into modules."""
