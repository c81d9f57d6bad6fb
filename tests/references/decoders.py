"""Float64 references of decoders, written from the equations alone: see each function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Params = Mapping[str, ArrayLike]


def _f64(x: ArrayLike) -> Array:
    """The array in float64."""
    return np.asarray(x, dtype=np.float64)


def _sub(p: Params, name: str) -> dict[str, ArrayLike]:
    """Entries of `p` below `name`, without that prefix: "norm1.weight" -> "weight"."""
    return {key[len(name) + 1 :]: value for key, value in p.items() if key.startswith(name + ".")}


def _linear(x: Array, p: Params) -> Array:
    """x W^T + b: x [... i], "weight" [o i], "bias" [o] -> [... o] (torch nn.Linear)."""
    return x @ _f64(p["weight"]).T + _f64(p["bias"])


def _ffn(x: Array, p: Params, first: str, second: str) -> Array:
    """second(ReLU(first(x))): x [n d] -> [n d]."""
    return _linear(np.maximum(_linear(x, _sub(p, first)), 0.0), _sub(p, second))


def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    p: Params,
    heads: int,
    mask: ArrayLike | None = None,
) -> Array:
    """Multi-head attention of one image: q [n d], k and v [m d], mask bool [m] -> [n d].

    Per head, softmax(q k^T / sqrt(d / heads)) v of the projected inputs; then the output
    projection. Weights in the layout of torch nn.MultiheadAttention: "in_proj_weight" [3d d] stacks
    the projections of query, key and value. Keys whose mask is False are left out; at least one has
    to stay.

    Source: Vaswani et al. 2017, equation 1 and section 3.2.2.
    """
    q, k, v = _f64(q), _f64(k), _f64(v)
    if mask is not None:
        keep = np.asarray(mask, dtype=bool)
        k, v = k[keep], v[keep]
    w_q, w_k, w_v = np.split(_f64(p["in_proj_weight"]), 3)
    b_q, b_k, b_v = np.split(_f64(p["in_proj_bias"]), 3)
    size = q.shape[1] // heads
    outputs = []
    for head in range(heads):
        rows = slice(head * size, (head + 1) * size)
        head_q = q @ w_q[rows].T + b_q[rows]
        head_k = k @ w_k[rows].T + b_k[rows]
        head_v = v @ w_v[rows].T + b_v[rows]
        scores = head_q @ head_k.T / np.sqrt(size)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        outputs.append(weights / weights.sum(axis=1, keepdims=True) @ head_v)
    return _linear(np.concatenate(outputs, axis=1), _sub(p, "out_proj"))


def layer_norm(x: ArrayLike, p: Params) -> Array:
    """Layer normalisation of the last axis: x [... d], "weight" and "bias" [d] -> [... d].

    (x - mean) / sqrt(variance + 1e-5) * weight + bias, with the biased variance (divided by d).

    Source: Ba et al. 2016.
    """
    x = _f64(x)
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-5) * _f64(p["weight"]) + _f64(p["bias"])


def _dual_modal_layer(
    q: Array, v: Array, p: Params, heads: int, mask: ArrayLike | None = None
) -> tuple[Array, Array]:
    """One block of ADDS equation 5: q [c d], v [t d] -> Q' [c d], V' [t d]; K = V."""
    q1 = layer_norm(q + q, _sub(p, "norm_q1"))
    q2 = attention(q1, v, v, _sub(p, "attn1"), heads)
    q3 = layer_norm(q2 + q1, _sub(p, "norm_q3"))
    q4 = _ffn(q3, p, "ffn2", "ffn1")
    q5 = layer_norm(q4 + q3, _sub(p, "norm_q5"))
    v1 = attention(v, q5, q5, _sub(p, "attn2"), heads, mask)
    return layer_norm(q5 + q, _sub(p, "norm_qout")), layer_norm(v1 + v, _sub(p, "norm_v"))


def dual_modal(
    q: ArrayLike,
    v: ArrayLike,
    layers: Sequence[Params],
    heads: int,
    mask: ArrayLike | None = None,
) -> Array:
    """Dual-modal decoder of one image: q [c d], v [t d], mask bool [c] -> last layer's Q' [c d].

    Chained reading: Q' is the next layer's query, K' = V' its keys and values. No dropout, so that
    Q1 = LayerNorm(Q + Q). Labels whose mask is False only pad: MultiHdAttn2 does not attend to them
    (their own rows of the output mean nothing). Layers use the names of adds.npz: "attn1", "attn2",
    "ffn2" (d -> hidden, the first), "ffn1" (hidden -> d), "norm_q1", "norm_q3", "norm_q5",
    "norm_qout", "norm_v".

    Source: ADDS equation 5; methods.md section 3.
    """
    q, v = _f64(q), _f64(v)
    for p in layers:
        q, v = _dual_modal_layer(q, v, p, heads, mask)
    return q


def ml_decoder_layers(q: ArrayLike, u: ArrayLike, layers: Sequence[Params], heads: int) -> Array:
    """ML-Decoder's layers for one image: q [k d], u [p d] (projected tokens) -> q3 [k d].

    q1 = LN1(q + q); q2 = LN2(q1 + MHA(q1, u, u)); q3 = LN3(q2 + linear2(ReLU(linear1(q2)))).
    No dropout, no self-attention; q3 is the next layer's query.

    Source: baselines.md section 6, items 3 and 7.
    """
    q, u = _f64(q), _f64(u)
    for p in layers:
        q1 = layer_norm(q + q, _sub(p, "norm1"))
        q2 = layer_norm(
            q1 + attention(q1, u, u, _sub(p, "multihead_attn"), heads), _sub(p, "norm2")
        )
        q = layer_norm(q2 + _ffn(q2, p, "linear1", "linear2"), _sub(p, "norm3"))
    return q


def group_logits(q3: ArrayLike, weight: ArrayLike, bias: ArrayLike, classes: int) -> Array:
    """Group fully-connected layer: q3 [k d], weight [k d g], bias [classes] -> logits [classes].

    Class c reads query c // g and slot c % g: <q3[c // g], weight[c // g, :, c % g]> + bias[c]. The
    slots after the last class are unused.

    Source: baselines.md section 6, item 4.
    """
    q3, weight, bias = _f64(q3), _f64(weight), _f64(bias)
    slots = weight.shape[2]
    logits = [q3[c // slots] @ weight[c // slots, :, c % slots] for c in range(classes)]
    return np.array(logits) + bias


def sine_positions(h: int, w: int, d: int) -> Array:
    """Query2Label's two-dimensional sine positions [h*w d], row-major; d is a multiple of 4.

    The first d/2 channels encode y, the others x. The index, counted from 1, is divided by the last
    one plus 1e-6 and scaled to 2 pi. Channels 2i and 2i+1 of a half are sine and cosine of the
    position over 10000^(2i / (d/2)).

    Source: baselines.md section 6, item 9; order of sines and cosines: DETR.
    """
    half = d // 2
    periods = 10000.0 ** (2 * np.arange(half // 2) / half)

    def axis(n: int) -> Array:
        angles = np.arange(1, n + 1)[:, None] / (n + 1e-6) * 2 * np.pi / periods
        return np.stack([np.sin(angles), np.cos(angles)], axis=2).reshape(n, half)

    y, x = axis(h), axis(w)
    return np.concatenate([np.repeat(y, w, axis=0), np.tile(x, (h, 1))], axis=1)


def _encoder_layer(src: Array, positions: Array, p: Params, heads: int) -> Array:
    """Post-norm encoder layer, q = k = src + positions, v = src: src [p d] -> [p d]."""
    keys = src + positions
    attended = attention(keys, keys, src, _sub(p, "self_attn"), heads)
    src = layer_norm(src + attended, _sub(p, "norm1"))
    return layer_norm(src + _ffn(src, p, "linear1", "linear2"), _sub(p, "norm2"))


def query2label(
    tokens: ArrayLike,
    positions: ArrayLike,
    queries: ArrayLike,
    encoder_layers: Sequence[Params],
    decoder_layers: Sequence[Params],
    final_norm: Params,
    weight: ArrayLike,
    bias: ArrayLike,
    heads: int,
    self_attention: bool = False,
) -> Array:
    """Query2Label's logits of one image [c].

    tokens and positions [p d], queries [c d], weight [c d], bias [c]. Post-norm layers, as many as
    are given (Query2Label: 1 in the encoder, 2 in the decoder), without dropout. In the decoder
    t = 0 at first; t = LN2(t + MHA(t + queries, memory + positions, memory)); t = LN3(t + FFN(t));
    after the last layer t = final_norm(t). With `self_attention` each layer begins with
    t = LN1(t + MHA(t + queries, t + queries, t)). logit_c = <t_c, weight_c> + bias_c.

    Source: baselines.md section 6, items 10 and 11; self-attention as in DETR.
    """
    memory, positions, queries = _f64(tokens), _f64(positions), _f64(queries)
    for p in encoder_layers:
        memory = _encoder_layer(memory, positions, p, heads)
    keys = memory + positions
    t = np.zeros_like(queries)
    for p in decoder_layers:
        if self_attention:
            x = t + queries
            t = layer_norm(t + attention(x, x, t, _sub(p, "self_attn"), heads), _sub(p, "norm1"))
        attended = attention(t + queries, keys, memory, _sub(p, "multihead_attn"), heads)
        t = layer_norm(t + attended, _sub(p, "norm2"))
        t = layer_norm(t + _ffn(t, p, "linear1", "linear2"), _sub(p, "norm3"))
    t = layer_norm(t, final_norm)
    return (t * _f64(weight)).sum(axis=1) + _f64(bias)


def pyramid_boxes(base: int, target: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """Levels of pyramid-forwarding, each (side of the level image, [(y0, x0), ...] row-major).

    Reading R1: ceil(log2(target / base)) + 1 levels; level i has 2^i x 2^i crops of base x base out
    of the image resized to base * 2^i, the last level out of the image resized to `target`, with
    evenly spaced crops, which overlap where target < base * 2^i: offset j is
    floor(j (side - base) / (2^i - 1) + 1/2), here in whole numbers.

    Source: ADDS, "Pyramid-Forwarding"; golden/README.md, reading R1.
    """
    if target < base:
        raise ValueError(f"target {target} is smaller than base {base}")
    last = 0
    while base * 2**last < target:
        last += 1
    levels = []
    for level in range(last + 1):
        side = target if level == last else base * 2**level
        gaps = 2**level - 1
        offsets = [0] + [(2 * j * (side - base) + gaps) // (2 * gaps) for j in range(1, gaps + 1)]
        levels.append((side, [(y, x) for y in offsets for x in offsets]))
    return levels


def selected_count(positives: int, classes: int, ratio: int) -> int:
    """How many labels selective language supervision keeps: positives and random negatives.

    |S_pos| + min(ratio |S_pos|, classes - |S_pos|), where S_pos are the labels positive in at least
    one image of the batch.

    Source: ADDS equation 6 and the text below it (ratio = alpha = 3).
    """
    return positives + min(ratio * positives, classes - positives)
