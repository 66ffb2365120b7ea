"""What the commands share, each thing once: data, features, run folders, figures."""
