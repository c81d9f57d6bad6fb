"""The parts of make_mini_clip.py."""
