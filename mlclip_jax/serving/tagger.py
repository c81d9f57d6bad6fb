"""Tagging a user's own images with a trained method, a classifier or zero-shot CLIP.

    tagger = Tagger.from_clip("ViT-B/32", ("cat", "dog", "sofa"))
    tagger.tag(["holiday.jpg"], top_k=2)
    # [[{"label": "dog", "score": 0.81, "cosine": 0.26}, {"label": "sofa", ...}]]

What a score means depends on where it comes from, and `Tagger.score_kind` says which:

- "sigmoid", for trained methods: the sigmoid of the label's logit, each label for itself, which is
  what the losses of multi-label training fit. How well it is calibrated depends on the loss.
- "softmax", for zero-shot CLIP: the label's share in a softmax of the scaled cosines over all the
  labels given. It ranks labels and says nothing of whether any is present: the shares of an image
  add up to 1 however few of the labels it shows. A sigmoid would be worse, as CLIP's scaled cosines
  are far above zero for absent labels too. "cosine" beside it is the bare cosine similarity,
  comparable between images; about 0.2 to 0.3 for present labels with the published CLIPs.
- "relative", for methods whose scores depend on which labels are scored together (MKT, CLIP-FT):
  the score itself, between -1 and 1 as scores have unit length over the labels. It ranks the
  labels of an image; a threshold means something for these labels alone.
- "raw", for MKT's plain sums (score="sum"): the score itself, of any size, each label for itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from flax import nnx

from mlclip_jax import methods
from mlclip_jax.clip import weights
from mlclip_jax.data.transforms import Preprocess, Source
from mlclip_jax.errors import UserError
from mlclip_jax.evaluation.evaluator import predict_fn
from mlclip_jax.evaluation.maps import Kind, map_fn
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.labels.taxonomies import regroup
from mlclip_jax.methods.base import Method
from mlclip_jax.modules.prompts import Encoder
from mlclip_jax.serving.explanations import Explanation
from mlclip_jax.serving.export import Classifier
from mlclip_jax.serving.export import load as load_classifier
from mlclip_jax.training.build import load_trained, name_features

#: {"label": name, "score": float}, for zero-shot also {"cosine": float}.
Tag = dict[str, Any]
T = TypeVar("T", bound=Source)

DEFAULT_TEMPLATE = "a photo of a {}."


class Tagger:
    """Labels images; the label features are encoded once, when it is made.

    Args:
        method: with its weights; or a classifier made of one.
        space: the labels to choose from.
        encoder: tokenizer for the labels' prompts; a classifier has none.
        preprocess: brings images to the method's size.
        batch_size: most images scored at once; fewer are padded to the next power of two, so that
            few shapes are ever compiled.
    """

    def __init__(
        self,
        method: Method | Classifier,
        space: LabelSpace,
        encoder: Encoder | None,
        preprocess: Preprocess,
        *,
        batch_size: int = 32,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"the batch size must be at least 1, not {batch_size}")
        self.space = space
        self.preprocess = preprocess
        self.batch_size = batch_size
        self.score_kind = method.score_kind
        if self.score_kind == "softmax":
            self._scale = float(method.scale())
        self._graphdef, state = nnx.split(method)
        self._predictor = predict_fn(self._graphdef)
        self._maps: dict[Kind, Callable[..., Any]] = {}
        self._state = (jax.device_put(nnx.to_pure_dict(state)),)
        self._labels = jax.device_put(method.label_inputs(space, encoder))
        self._features = self._predictor.encode_labels(self._state, self._labels)

    @classmethod
    def from_clip(
        cls,
        source: str | Path,
        labels: LabelSpace | Sequence[str],
        *,
        templates: str | Sequence[str] = DEFAULT_TEMPLATE,
        revision: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
    ) -> Tagger:
        """Zero-shot: any CLIP and any labels, nothing trained.

        Args:
            source: name of a preset or packaged CLIP, folder, or hub id.
            labels: a label space (`LabelSpace.from_file`) or names.
            templates: prompts with "{}" where the label goes; features of several are averaged.
            revision: of a hub id.
            dtype: compute type, "float32" or "bfloat16".
            batch_size: most images scored at once.

        Raises:
            UserError: no such CLIP, or a label or template that makes no prompt.
        """
        space = _space(labels)
        templates = (templates,) if isinstance(templates, str) else tuple(templates)
        checkpoint = weights.resolve(source, revision=revision)
        clip, encoder = checkpoint.load(dtype=dtype), checkpoint.tokenizer()
        spec = {"name": "zero_shot", "templates": templates}
        method = methods.build(spec, clip, space=space, encoder=encoder, rngs=nnx.Rngs(0))
        preprocess = Preprocess(clip.config.image.image_size)
        return cls(method, space, encoder, preprocess, batch_size=batch_size)

    @classmethod
    def from_workdir(
        cls,
        workdir: str | Path,
        *,
        labels: LabelSpace | Sequence[str] | None = None,
        taxonomy: str = "own",
        checkpoint: Literal["best", "latest"] = "best",
        weights: Literal["auto", "raw", "ema"] = "auto",
        batch_size: int = 32,
    ) -> Tagger:
        """A trained method.

        Args:
            workdir: folder of a training run.
            labels: other labels than it was trained for, where the method allows (open
                vocabulary); None: its own.
            taxonomy: groups of `labels`, as `labels.taxonomies.regroup` reads them.
            checkpoint: the best by its selection metric, or the latest.
            weights: raw, averaged, or averaged where the run kept an average.
            batch_size: most images scored at once.

        Raises:
            UserError: no checkpoint, or labels the method cannot take.
        """
        trained = load_trained(workdir, which=checkpoint, weights=weights)
        space = trained.space if labels is None else _space(labels)
        space = regroup(space, taxonomy, name_features(trained.backbone))
        encoder = trained.backbone.tokenizer
        return cls(trained.method, space, encoder, trained.preprocess, batch_size=batch_size)

    @classmethod
    def from_classifier(cls, folder: str | Path, *, batch_size: int = 32) -> Tagger:
        """A classifier that `mlclip export` wrote: no text tower, no tokenizer, its own labels.

        Args:
            folder: of the classifier.
            batch_size: most images scored at once.

        Raises:
            UserError: there is no classifier, or it is damaged.
        """
        found = load_classifier(folder)
        return cls(found, found.space, None, found.config.preprocess, batch_size=batch_size)

    def tag(
        self, images: Iterable[Source], *, top_k: int | None = None, threshold: float | None = None
    ) -> list[list[Tag]]:
        """The labels of each image, highest score first.

        Args:
            images: paths, encoded bytes, Pillow images or uint8 pixels `[h w 3]`.
            top_k: keep at most this many labels; None: all.
            threshold: keep labels with at least this score.

        Raises:
            UserError: an image cannot be read.
        """
        tagged = []
        for _, tags in self.stream(images, top_k=top_k, threshold=threshold):
            if isinstance(tags, UserError):
                raise tags
            tagged.append(tags)
        return tagged

    def stream(
        self,
        images: Iterable[T],
        *,
        top_k: int | None = None,
        threshold: float | None = None,
        workers: int = 8,
    ) -> Iterator[tuple[T, list[Tag] | UserError]]:
        """Each image with its labels, or with what is wrong with it; in the order given.

        Images are decoded by `workers` threads while the device scores the batch before; memory
        is bounded whatever the number of images.
        """
        self._check_choice(top_k, threshold)
        waiting: tuple[list[tuple[T, np.ndarray | UserError]], Any] | None = None
        for chunk in _chunks(self._decoded(images, workers), self.batch_size):
            logits = self._logits([pixels for _, pixels in chunk if _readable(pixels)])
            if waiting is not None:
                yield from self._finish(*waiting, top_k, threshold)
            waiting = chunk, logits
        if waiting is not None:
            yield from self._finish(*waiting, top_k, threshold)

    def logits(self, images: Iterable[Source]) -> np.ndarray:
        """The method's logits, float32 `[b c]`, for images as `tag` takes them."""
        chunks = _chunks((self.preprocess(image) for image in images), self.batch_size)
        rows = [np.asarray(self._logits(chunk))[: len(chunk)] for chunk in chunks]
        return np.concatenate(rows) if rows else np.zeros((0, len(self.space)), np.float32)

    def explain(
        self,
        images: Iterable[Source],
        labels: Sequence[str] | None = None,
        *,
        kind: Kind = "contrast",
        top_k: int = 5,
        threshold: float | None = None,
    ) -> list[Explanation]:
        """Where in each image the scores of labels come from.

        Args:
            images: as `tag` takes them.
            labels: their names; None: the highest of each image.
            kind: of the maps, see `mlclip_jax.evaluation.maps`.
            top_k, threshold: which are the highest, as of `tag`.

        Raises:
            UserError: an image cannot be read, there is no such label or kind, or a single label,
                which has no contrast.
        """
        self._check_choice(top_k, threshold)
        if kind == "contrast" and len(self.space) == 1:
            raise UserError("contrast compares labels and there is one: take patches or grad_cam")
        if kind not in self._maps:
            self._maps[kind] = map_fn(self._graphdef, kind)
        named = None if labels is None else [self.space.index(name) for name in labels]
        found = []
        for pixels in _chunks((self.preprocess(image) for image in images), self.batch_size):
            inputs = self._state, self._batch(pixels), self._features, self._labels
            logits = np.asarray(self._predictor.logits(*inputs), np.float64)[:, : len(self.space)]
            if named is None:
                chosen = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
            else:
                chosen = np.tile(np.array(named, int), (len(logits), 1))
            maps = np.asarray(self._maps[kind](*inputs, chosen.astype(np.int32)))
            for image, row, own, of in zip(pixels, logits, chosen, maps, strict=False):
                limit = threshold if named is None else None
                tags = self._tags_of(row, own, limit)
                found.append(Explanation(image, tags, of[: len(tags)]))
        return found

    def _decoded(
        self, images: Iterable[T], workers: int
    ) -> Iterator[tuple[T, np.ndarray | UserError]]:
        """Images with their pixels, decoded ahead by up to two batches."""

        def read(image: T) -> np.ndarray | UserError:
            try:
                return self.preprocess(image)
            except UserError as error:
                return error
            except Exception as error:  # one odd file must not end a run over many
                return UserError(f"{image}: cannot be read ({type(error).__name__}: {error})")

        remaining = iter(images)
        ahead: deque[tuple[T, Future]] = deque()
        with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
            try:
                for image in islice(remaining, 2 * self.batch_size + workers):
                    ahead.append((image, pool.submit(read, image)))
                while ahead:
                    image, future = ahead.popleft()
                    for upcoming in islice(remaining, 1):
                        ahead.append((upcoming, pool.submit(read, upcoming)))
                    yield image, future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _logits(self, pixels: Sequence[np.ndarray]) -> Any:
        """Logits of up to `batch_size` images on the device, `[>=n c]`; None for no image."""
        if not pixels:
            return None
        batch = self._batch(pixels)
        return self._predictor.logits(self._state, batch, self._features, self._labels)

    def _batch(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Images together, padded: uint8 `[>=n s s 3]`."""
        size = min(self.batch_size, 1 << (len(pixels) - 1).bit_length())
        batch = np.zeros((size, *pixels[0].shape), np.uint8)
        batch[: len(pixels)] = pixels
        return batch

    def _finish(
        self,
        chunk: Sequence[tuple[T, np.ndarray | UserError]],
        logits: Any,
        top_k: int | None,
        threshold: float | None,
    ) -> Iterator[tuple[T, list[Tag] | UserError]]:
        rows = iter(() if logits is None else np.asarray(logits, np.float64))
        for image, pixels in chunk:
            if _readable(pixels):
                yield image, self._tags(next(rows)[: len(self.space)], top_k, threshold)
            else:
                yield image, pixels

    def _tags(self, logits: np.ndarray, top_k: int | None, threshold: float | None) -> list[Tag]:
        """Sorted labels of one image from its logits `[c]`; equal scores keep the labels' order."""
        order = np.argsort(-logits, kind="stable")[:top_k]
        return self._tags_of(logits, order, threshold)

    def _tags_of(self, logits: np.ndarray, order: np.ndarray, threshold: float | None) -> list[Tag]:
        """Labels in this order, up to the first below the threshold."""
        if self.score_kind == "sigmoid":
            scores = 0.5 * (1 + np.tanh(0.5 * logits))  # does not overflow
        elif self.score_kind in ("relative", "raw"):
            scores = logits
        else:
            shares = np.exp(logits - logits.max())
            scores = shares / shares.sum()
        scores = scores.round(6)  # before the threshold, which then agrees with what is printed
        tags = []
        for label in order:
            if threshold is not None and scores[label] < threshold:
                break
            tag: Tag = {"label": self.space.names[label], "score": float(scores[label])}
            if self.score_kind == "softmax":
                tag["cosine"] = round(float(logits[label]) / self._scale, 6)
            tags.append(tag)
        return tags

    def _check_choice(self, top_k: int | None, threshold: float | None) -> None:
        bounds = {"relative": (-1, 1), "raw": (-np.inf, np.inf)}
        lowest, highest = bounds.get(self.score_kind, (0, 1))
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k must be at least 1, not {top_k}")
        if threshold is not None and not lowest <= threshold <= highest:
            raise UserError(
                f"the threshold is compared with scores between {lowest} and {highest}; "
                f"got {threshold}"
            )


def _space(labels: LabelSpace | Sequence[str]) -> LabelSpace:
    return labels if isinstance(labels, LabelSpace) else LabelSpace(tuple(labels))


def _readable(pixels: np.ndarray | UserError) -> bool:
    return not isinstance(pixels, UserError)


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
