"""The tasks of `python -m experiments.patches`, one file each, and the photos and the model that they share."""
