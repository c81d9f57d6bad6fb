"""CLIP's byte-pair encoding, offline, from the tokenizer files of a checkpoint folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlclip_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

#: Every file that belongs to a tokenizer; the first alone, or the next two, suffice.
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


class Tokenizer:
    """Texts to token ids, by transformers' `CLIPTokenizerFast` (imported on construction).

    Rows are padded with zeros after the end of text, as OpenAI's are; Hugging Face pads with the
    end-of-text id. Two things differ from OpenAI's own tokenizer, because Hugging Face's does
    not run ftfy and html.unescape first: HTML entities ("&amp;" stays five characters) and
    typographic ligatures or full-width forms ("\ufb01" is not spelt out as "fi").
    """

    def __init__(self, backend: PreTrainedTokenizerFast, context_length: int = 77) -> None:
        """Wraps a transformers tokenizer; most callers want `from_folder`.

        Raises:
            UserError: the tokenizer has no start-of-text or end-of-text token.
        """
        if backend.bos_token_id is None or backend.eos_token_id is None:
            raise UserError("the tokenizer names no start-of-text and end-of-text tokens")
        self.context_length = context_length
        self.sot: int = backend.bos_token_id
        self.eot: int = backend.eos_token_id
        self.vocab_size: int = len(backend)
        # The compiled tokenizer underneath: no length warnings, and no state of its own.
        self._encoder = backend.backend_tokenizer
        self._encoder.no_truncation()
        self._encoder.no_padding()

    @classmethod
    def from_folder(cls, path: str | Path, context_length: int = 77) -> Tokenizer:
        """The tokenizer of a checkpoint folder: `tokenizer.json`, or `vocab.json` + `merges.txt`.

        Raises:
            UserError: neither is there, or they cannot be read.
        """
        folder = Path(path)
        cls.check_folder(folder)
        from transformers import CLIPTokenizerFast

        try:
            backend = CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # the compiled tokenizers raise bare Exception
            raise UserError(
                f"the tokenizer files in {folder} cannot be read ({error}); fetch them again"
            ) from error
        return cls(backend, context_length)

    @staticmethod
    def check_folder(folder: Path) -> None:
        """UserError unless the folder has the files a tokenizer needs."""
        pair = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
        if not pair and not (folder / "tokenizer.json").is_file():
            raise UserError(
                f"{folder} holds no tokenizer: looked for tokenizer.json, or vocab.json with "
                "merges.txt; copy them from the model's page (every CLIP on the hub has them)"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without start and end of text."""
        return self._encoder.encode(text, add_special_tokens=False).ids

    def __call__(self, texts: str | Sequence[str], *, truncate: bool = False) -> np.ndarray:
        """Token ids with start and end of text, zeros after it.

        Args:
            texts: one text or n of them.
            truncate: cut texts that are too long; their last id is then the end of text.

        Returns:
            int32 `[n context_length]`.

        Raises:
            UserError: a text is too long and `truncate` is not set.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = np.zeros((len(texts), self.context_length), np.int32)
        encodings = self._encoder.encode_batch(texts, add_special_tokens=False)
        for row, text, encoding in zip(rows, texts, encodings, strict=True):
            ids = [self.sot, *encoding.ids, self.eot]
            if len(ids) > self.context_length:
                if not truncate:
                    raise UserError(
                        f"the text {text!r} has {len(ids)} tokens with start and end, and the "
                        f"model reads {self.context_length}: shorten it, or ask for truncation"
                    )
                ids = [*ids[: self.context_length - 1], self.eot]
            row[: len(ids)] = ids
        return rows
