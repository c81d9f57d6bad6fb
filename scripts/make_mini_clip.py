"""Makes the two small CLIPs that ship with the package, clip-mini and clip-mini-rn.

    python scripts/make_mini_clip.py clip-mini --workdir runs/clip-mini
    python scripts/make_mini_clip.py clip-mini-rn --workdir runs/clip-mini-rn

Stages, each kept in the working directory, so that a repeated run goes on from where it is:

1. image.npz: the image tower learns from Scenes with the sigmoid loss of SigLIP (Zhai et al., 2023)
   against 118 free vectors, one for each phrase "red three" (96) and each single label (22). Patch
   tokens get the same loss with what is visible in their patch: this speeds learning several
   times and puts them in the joint space too.
2. text.npz: the image tower stays locked (Zhai et al., 2022, "LiT") and the text tower learns to
   match its features from captions and from phrases in changing sentences.
3. The folder is written, in Hugging Face (ViT) or open_clip (ResNet) layout and float16, with its
   tokenizer and a metrics.json of what the model can do on test scenes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from mini import bpe, report
from mini.common import SEED, load_npz, log, rendered, unit
from mini.image import train_image
from mini.text import train_text

from mlclip_jax.clip import CLIP, PRESETS, CLIPConfig, ViTConfig
from mlclip_jax.clip.tokenizer import Tokenizer
from mlclip_jax.clip.weights import PRETRAINED, open_folder, save_hf, save_openai
from mlclip_jax.data.scenes import Scenes

# Steps of both stages, peak learning rate of the first, captioned scenes and weight of the caption
# loss in the second. The text towers see few captions and no label by itself: zero-shot is then
# well above chance and well below what the image features allow, as with the published CLIPs.
RECIPES = {
    "clip-mini": {
        "image_steps": 3000,
        "peak": 2e-3,
        "text_steps": 150,
        "text_scenes": 100,
        "captions": 0.1,
    },
    "clip-mini-rn": {
        "image_steps": 450,
        "peak": 2e-3,
        "text_steps": 150,
        "text_scenes": 64,
        "captions": 0.1,
    },
}
LIMIT_BYTES = 4_000_000


def features_of(clip: CLIP, images: np.ndarray) -> np.ndarray:
    """Unit pooled features of uint8 images: float32 [n d]."""
    graph, params, stats = nnx.split(clip, nnx.Param, nnx.BatchStat)
    encode = jax.jit(lambda p, s, x: unit(nnx.merge(graph, p, s).encode_images(x).pooled))
    parts = [encode(params, stats, images[i : i + 250]) for i in range(0, len(images), 250)]
    return np.concatenate([np.asarray(p) for p in parts])


def assemble(config: CLIPConfig, workdir: Path) -> CLIP:
    """The CLIP of the stages that are done; the others' leaves stay random."""
    clip = CLIP(config, rngs=nnx.Rngs(SEED))
    nnx.update(clip, {"image": load_npz(workdir / "image.npz")["tower"]})
    if (workdir / "text.npz").exists():
        nnx.update(clip, load_npz(workdir / "text.npz"))
    return clip


def export(clip: CLIP, tokenizer_folder: Path, folder: Path) -> CLIP:
    """Writes the folder and gives back the model that is in it."""
    save = save_hf if isinstance(clip.config.image, ViTConfig) else save_openai
    save(clip, folder, tokenizer_from=tokenizer_folder, dtype=np.float16)
    return open_folder(folder).load()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=tuple(RECIPES))
    parser.add_argument("--workdir", type=Path, required=True, help="keeps each stage's result")
    parser.add_argument("--output", type=Path, help="default: the package's own folder")
    for key, value in RECIPES["clip-mini"].items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=type(value), help="of the recipe")
    args = parser.parse_args()
    given = {k: v for k, v in vars(args).items() if k in RECIPES["clip-mini"] and v is not None}
    recipe = {**RECIPES[args.name], **given}
    workdir, config = args.workdir, PRESETS[args.name]
    workdir.mkdir(parents=True, exist_ok=True)

    words = bpe.write_tokenizer(workdir / "tokenizer", config.text.context_length)
    if words != config.text.vocab_size:
        raise SystemExit(f"set vocab_size of the preset {args.name!r} to {words}")
    tokenizer = Tokenizer.from_folder(workdir / "tokenizer", config.text.context_length)

    if not (workdir / "image.npz").exists():
        train_image(config, workdir, recipe["image_steps"], recipe["peak"])
    if not (workdir / "text.npz").exists():
        clip = assemble(config, workdir)
        images, _ = rendered("train", recipe["text_scenes"], seed=SEED + 1)
        held_out, labels = rendered("validation", 1000)
        train_text(
            config,
            tokenizer,
            features_of(clip, images),
            Scenes("train", recipe["text_scenes"], seed=SEED + 1),
            (features_of(clip, held_out), labels),
            workdir,
            steps=recipe["text_steps"],
            caption_weight=recipe["captions"],
        )
    folder = args.output or PRETRAINED / args.name
    clip = export(assemble(config, workdir), workdir / "tokenizer", folder)
    train, test = (rendered(*which) for which in (("train", 4000), ("test", 1000)))
    figures = report.measure(
        clip,
        tokenizer,
        (features_of(clip, train[0]), train[1]),
        (features_of(clip, test[0]), test[1]),
    )
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(clip)))
    figures = {
        "model": args.name,
        "parameters": sum(int(np.size(a)) for a in leaves),
        "recipe": recipe,
        **figures,
    }
    (folder / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
    size = sum(p.stat().st_size for p in folder.iterdir())
    log(bytes=size, **{k: v for k, v in figures.items() if not isinstance(v, dict)})
    for key in ("chance", "zero_shot", "learned_context", "linear_head", "mlp_head"):
        print(f"{key:16}", *(f"{g} {v:.3f}" for g, v in figures[key].items()))
    if size > LIMIT_BYTES:
        raise SystemExit(f"{folder} has {size} bytes, more than {LIMIT_BYTES}")


if __name__ == "__main__":
    main()
