"""Frozen backbones as sources of features."""
