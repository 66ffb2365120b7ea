"""Every number in the README as a command: ours beside PyTorch doing identical work, in one run."""
