"""The vocabulary of the mini CLIPs: byte-level BPE in CLIP's format, learned from a word list.

Every word below is one token; any other text is still encoded, in pieces or bytes. Ids follow
CLIP's order: 256 byte symbols, the same 256 ending a word ("</w>"), one token a merge, then
<|startoftext|> and <|endoftext|>, which so has the largest id.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"

WORDS = """
zero one two three four five six seven eight nine
circle square triangle star cross heart
red green blue yellow purple orange
digit digits shape shapes colour colours color colors object objects kind kinds
label labels group groups class classes category categories type types name number figure symbol
photo photos photograph image images picture pictures scene scenes view
a an and are as at be but by for from has have here i in is it its my no not of on or out that the
there these this those to was we were what which with without x
contains containing contain shows showing depicts depicting including includes belongs belong
looks like seen see can some many several few more most other all every each any only also both
bad good cool nice weird hard low high resolution bright clean dirty dark light large small big
little long short new old great best close up cropped blurry pixelated jpeg corrupted black white
grey gray brown pink
sculpture rendering rendition graffiti tattoo embroidered drawing drawn doodle sketch painting
plastic toy plushie cartoon origami art video game itap took handwritten written printed painted
background foreground left right top bottom middle centre center next near above below
person people animal animals vehicle vehicles food household thing things part parts
""".split()  # noqa: SIM905


def byte_symbols() -> list[str]:
    """A printable character for each byte, in CLIP's vocabulary order.

    Bytes that are visible Latin-1 characters stand for themselves and come first; the rest follow,
    shown as the characters from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return [chr(b) for b in visible] + [chr(0x100 + i) for i in range(len(hidden))]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges the commonest pair (ties: the first in alphabetical order) until words are whole."""
    pieces = [(*word[:-1], word[-1] + "</w>") for word in sorted(set(words))]
    merges = []
    while True:
        pairs = Counter(pair for word in pieces for pair in itertools.pairwise(word))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = [_merge(word, best) for word in pieces]


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    i = 0
    while i < len(word):
        if word[i : i + 2] == pair:
            out.append(word[i] + word[i + 1])
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token ids and merges."""
    merges = learn_merges(WORDS)
    symbols = byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(m) for m in merges), START, END]
    # Two ways of merging to the same token would leave one of them without an id.
    assert len(set(tokens)) == len(tokens), "a token occurs twice"
    return {token: i for i, token in enumerate(tokens)}, merges


def write_tokenizer(folder: Path, context_length: int) -> int:
    """Writes the files that transformers' CLIPTokenizer reads; returns the number of tokens."""
    vocab, merges = vocabulary()
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {
        **special,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": context_length,
        "tokenizer_class": "CLIPTokenizer",
    }
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    folder.mkdir(parents=True, exist_ok=True)
    text = {
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "\n".join(lines) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }
    for name, content in text.items():
        (folder / name).write_text(content, encoding="utf-8")
    return len(vocab)
