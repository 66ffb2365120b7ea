"""Frozen backbones, and the features they compute from images."""
