"""Supervised training on a folder of images."""
