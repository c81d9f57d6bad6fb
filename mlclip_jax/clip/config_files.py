"""Configuration files of Hugging Face and open_clip, read and written; shapes as a last resort."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlclip_jax.clip.config import (
    CLIP_MEAN,
    CLIP_STD,
    CLIPConfig,
    ResNetConfig,
    TextConfig,
    ViTConfig,
)
from mlclip_jax.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; a UserError names the file where it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; fetch it again")
    return value


# --- Hugging Face -----------------------------------------------------------------------------


def hugging_face_config(folder: Path) -> CLIPConfig:
    """CLIPConfig of `config.json` and, if present, `preprocessor_config.json`.

    The files leave out values equal to Hugging Face's defaults, which are filled in here. A
    `text_config_dict` (old files) replaces `text_config` as a whole, as in transformers.
    """
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type", "clip") != "clip":
        raise UserError(
            f"{path} describes a model of type {config['model_type']!r}, not 'clip': "
            "only CLIP models can be loaded"
        )
    text, vision = (
        config.get(f"{tower}_config_dict") or config.get(f"{tower}_config") or {}
        for tower in ("text", "vision")
    )
    preprocessor = folder / "preprocessor_config.json"
    pixels = read_json(preprocessor) if preprocessor.is_file() else {}
    eos = text.get("eos_token_id", 49407)
    text_config = TextConfig(
        vocab_size=text.get("vocab_size", 49408),
        context_length=text.get("max_position_embeddings", 77),
        width=text.get("hidden_size", 512),
        layers=text.get("num_hidden_layers", 12),
        heads=text.get("num_attention_heads", 8),
        mlp_width=text.get("intermediate_size", 2048),
        activation=_activation(text, path),
        norm_eps=text.get("layer_norm_eps", 1e-5),
        # Files written before transformers 4.31 say 2 here and mean "the largest id".
        eot_id=None if eos == 2 else eos,
    )
    image_config = ViTConfig(
        image_size=vision.get("image_size", 224),
        patch_size=vision.get("patch_size", 32),
        width=vision.get("hidden_size", 768),
        layers=vision.get("num_hidden_layers", 12),
        heads=vision.get("num_attention_heads", 12),
        mlp_width=vision.get("intermediate_size", 3072),
        activation=_activation(vision, path),
        norm_eps=vision.get("layer_norm_eps", 1e-5),
    )
    return CLIPConfig(
        embed_dim=config.get("projection_dim", 512),
        image=image_config,
        text=text_config,
        image_mean=tuple(pixels.get("image_mean", CLIP_MEAN)),
        image_std=tuple(pixels.get("image_std", CLIP_STD)),
    )


def _activation(tower: Mapping[str, Any], path: Path) -> str:
    name = tower.get("hidden_act", "quick_gelu")
    if name not in ("quick_gelu", "gelu"):
        raise UserError(f"{path}: hidden_act {name!r} is not known; use 'quick_gelu' or 'gelu'")
    return name


def hugging_face_files(config: CLIPConfig) -> dict[str, dict[str, Any]]:
    """File name -> content such that transformers' CLIPModel and image processor read `config`.

    Raises:
        UserError: the image tower is a ResNet, which Hugging Face's CLIP does not have.
    """
    image, text = config.image, config.text
    if not isinstance(image, ViTConfig):
        raise UserError(
            "Hugging Face's CLIP has no ResNet towers: save this model in open_clip's layout "
            "(save_openai)"
        )
    size = image.image_size
    eos = 2 if text.eot_id is None else text.eot_id
    main = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        # What to compute in, whatever the dtype the file stores.
        "torch_dtype": "float32",
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "eos_token_id": eos,
            "projection_dim": config.embed_dim,
            **_hugging_face_tower(text),
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": size,
            "patch_size": image.patch_size,
            "projection_dim": config.embed_dim,
            **_hugging_face_tower(image),
        },
    }
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }
    return {"config.json": main, "preprocessor_config.json": preprocessor}


def _hugging_face_tower(tower: TextConfig | ViTConfig) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": tower.activation,
        "layer_norm_eps": tower.norm_eps,
    }


# --- open_clip --------------------------------------------------------------------------------

# Keys of open_clip's tower sections that change the function, at the values that leave it CLIP's.
_PLAIN_VISION = {
    "ls_init_value": None,
    "attentional_pool": False,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "final_ln_after_pool": False,
    "pool_type": "tok",
    "act_kwargs": None,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
    "timm_model_name": None,
}
_PLAIN_TEXT = {
    "ls_init_value": None,
    "embed_cls": False,
    "no_causal_mask": False,
    "final_ln_after_pool": False,
    "proj_bias": False,
    "proj_type": "linear",
    "act_kwargs": None,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
    "hf_model_name": None,
}
_PLAIN_MODEL = {
    "custom_text": False,
    "init_logit_bias": None,
    "nonscalar_logit_scale": False,
    "multimodal_cfg": None,
}


def open_clip_config(path: Path) -> CLIPConfig:
    """CLIPConfig of an `open_clip_config.json`.

    Raises:
        UserError: the file asks for something OpenAI's architecture does not have.
    """
    content = read_json(path)
    model = content.get("model_cfg", content)
    if not {"embed_dim", "vision_cfg", "text_cfg"} <= model.keys():
        raise UserError(f"{path} has no model_cfg with embed_dim, vision_cfg and text_cfg")
    vision, text = model["vision_cfg"], model["text_cfg"]
    sections = (
        ("model_cfg", model, _PLAIN_MODEL),
        ("vision_cfg", vision, _PLAIN_VISION),
        ("text_cfg", text, _PLAIN_TEXT),
    )
    foreign = [
        f"{name}.{key}={section[key]!r}"
        for name, section, plain in sections
        for key, value in plain.items()
        if section.get(key, value) != value
    ]
    if text.get("pool_type", "argmax") not in ("argmax", "eos"):
        foreign.append(f"text_cfg.pool_type={text['pool_type']!r}")
    if foreign:
        raise UserError(
            f"{path} describes a model that is not OpenAI's CLIP: {', '.join(foreign)}; "
            "only the plain ViT and ModifiedResNet models can be loaded"
        )
    activation = "quick_gelu" if model.get("quick_gelu", False) else "gelu"
    size = vision.get("image_size", 224)
    if isinstance(size, list):
        if len(set(size)) != 1:
            raise UserError(f"{path}: image_size {size} is not square")
        size = size[0]
    layers, head_width = vision.get("layers", 12), vision.get("head_width", 64)
    if isinstance(layers, list):
        width = vision.get("width", 64)
        image = ResNetConfig(size, width, tuple(layers), heads=width * 32 // head_width)
    else:
        width = vision.get("width", 768)
        image = ViTConfig(
            image_size=size,
            patch_size=vision.get("patch_size", 16),
            width=width,
            layers=layers,
            heads=width // head_width,
            mlp_width=int(width * vision.get("mlp_ratio", 4.0)),
            activation=activation,
            norm_eps=(vision.get("norm_kwargs") or {}).get("eps", 1e-5),
        )
    width = text.get("width", 512)
    pixels = content.get("preprocess_cfg", {})
    return CLIPConfig(
        embed_dim=model["embed_dim"],
        image=image,
        text=TextConfig(
            vocab_size=text.get("vocab_size", 49408),
            context_length=text.get("context_length", 77),
            width=width,
            layers=text.get("layers", 12),
            heads=text.get("heads", 8),
            mlp_width=int(width * text.get("mlp_ratio", 4.0)),
            activation=activation,
            norm_eps=(text.get("norm_kwargs") or {}).get("eps", 1e-5),
            eot_id=text.get("eos_id", 2) if text.get("pool_type") == "eos" else None,
        ),
        image_mean=tuple(pixels.get("mean", CLIP_MEAN)),
        image_std=tuple(pixels.get("std", CLIP_STD)),
    )


def open_clip_files(config: CLIPConfig) -> dict[str, dict[str, Any]]:
    """File name -> content such that open_clip builds the model of `config`.

    Raises:
        UserError: the two towers use different activations, which open_clip cannot say.
    """
    image, text = config.image, config.text
    if isinstance(image, ViTConfig):
        if image.activation != text.activation:
            raise UserError("open_clip's layout has one activation for both towers")
        vision: dict[str, Any] = {
            "image_size": image.image_size,
            "layers": image.layers,
            "width": image.width,
            "head_width": image.width // image.heads,
            "patch_size": image.patch_size,
            "mlp_ratio": image.mlp_width / image.width,
            "norm_kwargs": {"eps": image.norm_eps},
        }
    else:
        vision = {
            "image_size": image.image_size,
            "layers": list(image.layers),
            "width": image.width,
            "head_width": image.width * 32 // image.heads,
            "patch_size": None,
        }
    section: dict[str, Any] = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.layers,
        "mlp_ratio": text.mlp_width / text.width,
        "norm_kwargs": {"eps": text.norm_eps},
    }
    if text.eot_id is not None:
        section |= {"pool_type": "eos", "eos_id": text.eot_id}
    model = {
        "embed_dim": config.embed_dim,
        "quick_gelu": text.activation == "quick_gelu",
        "vision_cfg": vision,
        "text_cfg": section,
    }
    pixels = {"mean": list(config.image_mean), "std": list(config.image_std)}
    return {"open_clip_config.json": {"model_cfg": model, "preprocess_cfg": pixels}}


# --- no configuration file --------------------------------------------------------------------


def infer_config(shapes: Shapes) -> CLIPConfig:
    """CLIPConfig from the array shapes of an OpenAI-named file, by OpenAI's own conventions.

    Heads are 64 wide (the attention pool too), the activation is QuickGELU.

    Raises:
        UserError: an array that tells a size is missing.
    """
    try:
        embed_dim = shapes["text_projection"][1]
        context_length, width = shapes["positional_embedding"]
        text = TextConfig(
            vocab_size=shapes["token_embedding.weight"][0],
            context_length=context_length,
            width=width,
            layers=_count(shapes, r"transformer\.resblocks\.(\d+)\..*"),
            heads=max(1, width // 64),
            mlp_width=shapes["transformer.resblocks.0.mlp.c_fc.bias"][0],
        )
        image: ViTConfig | ResNetConfig
        if "visual.proj" in shapes:
            width, _, patch, _ = shapes["visual.conv1.weight"]
            image = ViTConfig(
                image_size=patch * _side(shapes["visual.positional_embedding"][0] - 1),
                patch_size=patch,
                width=width,
                layers=_count(shapes, r"visual\.transformer\.resblocks\.(\d+)\..*"),
                heads=max(1, width // 64),
                mlp_width=shapes["visual.transformer.resblocks.0.mlp.c_fc.bias"][0],
            )
        else:
            width = shapes["visual.layer1.0.conv1.weight"][0]
            layers = tuple(
                _count(shapes, rf"visual\.layer{stage}\.(\d+)\..*") for stage in range(1, 5)
            )
            side = _side(shapes["visual.attnpool.positional_embedding"][0] - 1)
            image = ResNetConfig(32 * side, width, layers, heads=max(1, width * 32 // 64))
    except KeyError as error:
        raise UserError(
            f"the sizes of the model cannot be told: {error.args[0]!r} is not among the weights "
            "and there is no open_clip_config.json beside them"
        ) from error
    return CLIPConfig(embed_dim, image, text)


def _count(shapes: Shapes, pattern: str) -> int:
    return len({match[1] for name in shapes if (match := re.fullmatch(pattern, name))})


def _side(places: int) -> int:
    return round(places**0.5)
