"""Claims as commands: each file is one `python -m experiments.<name>`, one config, one result."""
