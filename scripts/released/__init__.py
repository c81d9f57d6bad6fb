"""The authors' released checkpoints: their files, and a module for each of their methods."""
