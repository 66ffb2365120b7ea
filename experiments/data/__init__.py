"""Labelled images: their sources, how they are decoded, and how they are batched."""
