"""Writes tests/fixtures/weights: tiny random CLIPs in every layout, made by other implementations.

    python scripts/make_weight_fixtures.py        # needs the parity extra and transformers 4.57

    hf/          model.safetensors by transformers' PyTorch CLIPModel; end of text = largest id
    hf_flax/     the same weights, flax_model.msgpack by transformers' FlaxCLIPModel (gone in v5)
    hf_sharded/  bfloat16 in shards, exact GELU, end of text = id 50 although larger ids exist
    openai_vit/  open_clip_model.safetensors by open_clip's ViT, QuickGELU
    openai_rn/   float16 open_clip_model.safetensors by open_clip's ModifiedResNet

Each folder has an expected.npz: images (float16 [b h w 3], normalised), ids [c t], and the features
`image` [b d] and `text` [c d] (not normalised, float32) that the other implementation gives.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures" / "weights"
VOCAB, CONTEXT = 64, 12

HF_TEXT = {
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
HF_VISION = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
OPEN_CLIP_TEXT = {
    "context_length": CONTEXT,
    "vocab_size": VOCAB,
    "width": 24,
    "heads": 4,
    "layers": 2,
}
OPEN_CLIP_VIT = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
        "mlp_ratio": 2.0,
    },
    "text_cfg": OPEN_CLIP_TEXT,
}
OPEN_CLIP_RN = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 64,
        "layers": [1, 2, 1, 1],
        "width": 4,
        "head_width": 32,
        "patch_size": None,
    },
    "text_cfg": OPEN_CLIP_TEXT,
}
# Not CLIP's statistics, so that a reader who ignores the file is found out.
PREPROCESS = {"mean": [0.5, 0.45, 0.4], "std": [0.25, 0.3, 0.35]}


def import_open_clip() -> types.ModuleType:
    """open_clip's model module.

    The package imports torchvision for its image transforms; where there is no torchvision, the
    model submodules alone are imported. They ask for one class of it, which nothing here uses.
    """
    if "open_clip.model" in sys.modules:
        return sys.modules["open_clip.model"]
    if importlib.util.find_spec("torchvision") is None:
        import torch
        import transformers.utils  # noqa: F401  (looks for torchvision too: before there is a stand-in)

        spec = importlib.util.find_spec("open_clip")
        package = importlib.util.module_from_spec(spec)  # made, but its __init__ is not run
        misc = types.ModuleType("torchvision.ops.misc")
        misc.FrozenBatchNorm2d = torch.nn.BatchNorm2d
        sys.modules["open_clip"] = package
        for name in ("torchvision", "torchvision.ops"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["torchvision.ops.misc"] = misc
        try:
            return importlib.import_module("open_clip.model")
        finally:
            # Others must still see that torchvision is absent.
            for name in ("torchvision.ops.misc", "torchvision.ops", "torchvision"):
                del sys.modules[name]
    return importlib.import_module("open_clip.model")


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter and BatchNorm statistic random and far from its usual start."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: torch.Tensor, scale: float) -> torch.Tensor:
        return scale * torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name == "logit_scale":
                tensor.copy_(torch.tensor(3.0) + noise(tensor, 0.1))
            elif tensor.ndim == 1 and name.endswith("weight"):  # norms
                tensor.copy_(1 + noise(tensor, 0.2))
            elif tensor.ndim == 1:
                tensor.copy_(noise(tensor, 0.1))
            elif "embed" in name:
                tensor.copy_(noise(tensor, 0.5))
            else:
                fan_in = tensor[0].numel()
                tensor.copy_(noise(tensor, 1.5 * fan_in**-0.5))
        for name, tensor in model.named_buffers():
            if name.endswith("running_mean"):
                tensor.copy_(noise(tensor, 0.2))
            elif name.endswith("running_var"):
                tensor.copy_(1 + noise(tensor, 0.2).abs())
    return model.eval()


def inputs(image_size: int, eot: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalised images float16 [2 h w 3] and ids int32 [4 t] with `eot`, zero padded.

    Where larger ids than `eot` exist, they come before it, and the last row ends twice.
    """
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(2, image_size, image_size, 3)).astype(np.float16)
    ids = np.zeros((4, CONTEXT), np.int32)
    for row, length in zip(ids, (3, 5, 8, CONTEXT), strict=True):
        row[0] = 1
        others = [i for i in range(2, VOCAB) if i != eot]
        row[1 : length - 1] = rng.choice(others, length - 2)
        row[length - 1] = eot
    if eot < VOCAB - 1:
        ids[:, 1] = VOCAB - 1
        ids[3, 6] = eot
    return images, ids


def hugging_face(name: str) -> tuple[Any, np.ndarray, np.ndarray]:
    """transformers' CLIPModel of the fixture `hf` or `hf_sharded`, with images and ids."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    sharded = name == "hf_sharded"
    extra = {"hidden_act": "gelu", "layer_norm_eps": 1e-3} if sharded else {}
    eos = 50 if sharded else 2
    config = CLIPConfig(
        text_config={**HF_TEXT, **extra, "eos_token_id": eos},
        vision_config={**HF_VISION, **extra},
        projection_dim=24,
    )
    model = randomise(CLIPModel(config), seed=2 if sharded else 1)
    if sharded:  # stored in bfloat16: the features are those of the rounded weights
        model = model.to(torch.bfloat16).to(torch.float32)
    return model, *inputs(32, 50 if sharded else VOCAB - 1, seed=3)


def open_clip(name: str) -> tuple[Any, np.ndarray, np.ndarray]:
    """open_clip's CLIP of the fixture `openai_vit` or `openai_rn`, with images and ids."""
    import torch

    resnet = name == "openai_rn"
    config = OPEN_CLIP_RN if resnet else OPEN_CLIP_VIT
    model = randomise(import_open_clip().CLIP(**config), seed=4 if resnet else 5)
    if resnet:
        model = model.to(torch.float16).to(torch.float32)
    return model, *inputs(64 if resnet else 32, VOCAB - 1, seed=6)


def pooled(output: Any) -> torch.Tensor:
    """The feature of transformers' get_*_features: 4.57 returns it bare, 5 in an output object."""
    return getattr(output, "pooler_output", output)


def features(model: Any, images: np.ndarray, ids: np.ndarray) -> dict[str, np.ndarray]:
    """What the PyTorch model (either library's) makes of images and ids."""
    import torch

    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32))
    tokens = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        if hasattr(model, "get_image_features"):
            image = pooled(model.get_image_features(pixel_values=pixels))
            text = pooled(model.get_text_features(input_ids=tokens))
        else:
            image, text = model.encode_image(pixels), model.encode_text(tokens)
    return {"images": images, "ids": ids, "image": image.numpy(), "text": text.numpy()}


def main() -> None:
    """Writes every fixture anew."""
    import jax
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPImageProcessor, FlaxCLIPModel

    shutil.rmtree(FIXTURES, ignore_errors=True)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=PREPROCESS["mean"],
        image_std=PREPROCESS["std"],
    )
    for name in ("hf", "hf_sharded"):
        model, images, ids = hugging_face(name)
        folder = FIXTURES / name
        stored = model.to(torch.bfloat16) if name == "hf_sharded" else model
        size = "30KB" if name == "hf_sharded" else "5GB"
        stored.save_pretrained(folder, max_shard_size=size, safe_serialization=True)
        processor.save_pretrained(folder)
        np.savez(folder / "expected.npz", **features(model.to(torch.float32), images, ids))

    flax = FlaxCLIPModel.from_pretrained(FIXTURES / "hf", from_pt=True)
    flax.save_pretrained(FIXTURES / "hf_flax")
    _, images, ids = hugging_face("hf")
    with jax.default_matmul_precision("highest"):
        image = flax.get_image_features(images.transpose(0, 3, 1, 2).astype(np.float32))
        text = flax.get_text_features(ids)
    np.savez(FIXTURES / "hf_flax" / "expected.npz", images=images, ids=ids, image=image, text=text)
    processor.save_pretrained(FIXTURES / "hf_flax")

    for name, config in (("openai_vit", OPEN_CLIP_VIT), ("openai_rn", OPEN_CLIP_RN)):
        model, images, ids = open_clip(name)
        folder = FIXTURES / name
        folder.mkdir(parents=True)
        np.savez(folder / "expected.npz", **features(model, images, ids))
        stored = model.to(torch.float16) if name == "openai_rn" else model
        save_file(stored.state_dict(), folder / "open_clip_model.safetensors")
        content = {"model_cfg": config, "preprocess_cfg": PREPROCESS}
        text = json.dumps(content, indent=2) + "\n"
        (folder / "open_clip_config.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
