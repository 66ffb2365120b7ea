"""Classifiers on frozen features: fitting, evaluation, reports."""
