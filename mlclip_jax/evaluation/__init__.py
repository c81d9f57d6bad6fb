"""Metrics, the evaluator and reports."""
