"""Self-supervised training from a command's settings to a run folder."""
