"""Readers of the corpora as their authors publish them: annotations only, no image is opened."""
