"""Learned pieces between the towers and the loss."""
