"""Run folders: settings, logs, results, and what a run costs."""
