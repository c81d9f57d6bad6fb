"""mlclip_jax: multi-label image recognition with CLIP in JAX/Flax."""

__version__ = "0.1.0"
