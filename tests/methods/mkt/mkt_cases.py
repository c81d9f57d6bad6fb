"""MKT on the golden's CLIP, and the golden's labels and batch."""

from __future__ import annotations

import exact
import jax.numpy as jnp

from mlclip_jax.methods.base import Batch, LabelInputs


def make(clip, golden, **fields):
    """MKT with the golden's k, of the last block of two."""
    k = {} if fields.get("streams") == "global" else {"top_k": int(golden["cfg/topk"])}
    return exact.make({"name": "mkt", "train_blocks": 1, **k, **fields}, clip)


def labels_of(features, mask=None):
    """Label inputs with these text features."""
    n = len(features)
    mask = jnp.ones(n, bool) if mask is None else jnp.asarray(mask)
    return LabelInputs((), jnp.arange(n), mask, features=jnp.asarray(features))


def batch_of(images, golden):
    targets = jnp.asarray(golden["in/labels_seen"], jnp.int8)
    return Batch(images, targets, jnp.arange(4), jnp.ones(4, bool))
