"""A folder with a tiny random CLIP and a tokenizer of single letters, as a user would have one."""

from __future__ import annotations

import json
import string
from pathlib import Path

from flax import nnx

from mlclip_jax.clip import CLIP, weights
from mlclip_jax.clip.config import CLIPConfig, TextConfig, ViTConfig


def write_clip(folder: Path) -> Path:
    letters = string.ascii_lowercase + "."
    words = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    tokens = folder / "tokenizer"
    tokens.mkdir(parents=True)
    vocabulary = {word: number for number, word in enumerate(words)}
    (tokens / "vocab.json").write_text(json.dumps(vocabulary))
    (tokens / "merges.txt").write_text("#version: 0.2\n")
    width = {"width": 32, "layers": 1, "heads": 2, "mlp_width": 64}
    config = CLIPConfig(
        embed_dim=16,
        image=ViTConfig(image_size=32, patch_size=8, **width),
        text=TextConfig(
            vocab_size=len(words), context_length=40, eot_id=vocabulary["<|endoftext|>"], **width
        ),
    )
    clip = CLIP(config, rngs=nnx.Rngs(0))
    weights.save_hf(clip, folder / "clip", tokenizer_from=tokens)
    return folder / "clip"
