"""Tables of embeddings: one row an image, in files that other programs read too."""
