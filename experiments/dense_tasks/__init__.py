"""Photos with masks or depth maps: their pairs, their patch features, training of a dense head, and its predictions."""
