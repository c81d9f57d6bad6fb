"""Tagging a user's own images."""
