"""The authors' files: PyTorch's and safetensors, raw and averaged weights, nested or not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlclip_jax.clip.arrays import NamedArrays, open_safetensors
from mlclip_jax.errors import UserError

#: Keys that state dicts are nested under; averaged weights have "_ema" behind.
NESTS = ("state_dict", "model", "model_state_dict")

#: What training loops save beside the weights: Dassl's schedulers hold another scheduler and
#: with it its optimizer, and scores are numbers of numpy.
_BESIDE = (
    "torch.optim.lr_scheduler.CosineAnnealingLR",
    "torch.optim.lr_scheduler.MultiStepLR",
    "torch.optim.lr_scheduler.StepLR",
    "torch.optim.sgd.SGD",
    "torch.optim.adam.Adam",
    "torch.optim.adamw.AdamW",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "builtins.dict",
)


class _PassedOver:
    """Stands for an object of `_BESIDE`: is made from anything and keeps nothing."""

    def __new__(cls, *_: Any) -> _PassedOver:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None: ...


def _empty(*_: Any) -> dict[Any, Any]:
    """Stands for a defaultdict."""
    return {}


def open_released(path: Path, weights: str | None) -> NamedArrays:
    """The named arrays of a released file, wherever they are nested, without "module.".

    Args:
        path: safetensors by its suffix, PyTorch's otherwise.
        weights: "raw" or "ema" where the file has both, else None.

    Raises:
        UserError: the file cannot be read, needs unpickling, holds no arrays, or holds raw and
            averaged weights and `weights` does not choose.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        arrays = open_safetensors((path,))
        if weights is not None:
            raise UserError(f"{path} holds one set of weights: leave out --{weights}")
    else:
        tensors = _state_dict(_load_torch(path), path, weights)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        arrays = NamedArrays(shapes, lambda name: tensors[name].float().numpy())
    names = {name.removeprefix("module."): name for name in arrays.shapes}
    shapes = {short: arrays.shapes[name] for short, name in names.items()}
    return NamedArrays(shapes, lambda short: arrays.read(names[short]))


def _load_torch(path: Path) -> Any:
    """What a file of PyTorch holds: tensors, plain containers, and nothing for `_BESIDE`."""
    import pickle

    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} is read by PyTorch, which is missing: pip install 'mlclip-jax[parity]', or "
            "save the state dict elsewhere as .safetensors"
        ) from error
    beside = [(_PassedOver, name) for name in _BESIDE] + [(_empty, "collections.defaultdict")]
    try:
        with torch.serialization.safe_globals(beside):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is no PyTorch file or holds more than weights, and nothing is unpickled here: "
            "where its code is at home, save model.state_dict() alone"
        ) from error
    except (EOFError, RuntimeError) as error:
        reason = (str(error) or "it ends early").splitlines()[0]
        raise UserError(f"{path} cannot be read ({reason}); fetch it again") from error


def _state_dict(content: Any, path: Path, weights: str | None) -> Mapping[str, Any]:
    """The tensors by name in the content of a file.

    Raises:
        UserError: see `open_released`.
    """
    import torch

    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__} and no state dict")
    found = {
        kind: content[key + suffix]
        for kind, suffix in (("raw", ""), ("ema", "_ema"))
        for key in NESTS
        if isinstance(content.get(key + suffix), Mapping)
    }
    if len(found) == 2 and weights is None:
        raise UserError(f"{path} holds raw and averaged weights: choose with --raw or --ema")
    if len(found) < 2 and weights is not None:
        raise UserError(f"{path} holds one set of weights: leave out --{weights}")
    chosen = found[weights] if weights else next(iter(found.values()), content)
    others = [key for key, value in chosen.items() if not isinstance(value, torch.Tensor)]
    if others or not chosen:
        names = ", ".join(map(str, others[:3])) or "nothing"
        raise UserError(
            f"{path} holds no state dict: there is {names} where tensors should be (looked in it "
            f"and under {', '.join(NESTS)})"
        )
    return chosen
