"""Tokenizers: text to token ids and back."""

import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np

from disag_jax import text
from disag_jax.config import ConfigError

BYTES = "bytes"

# What tokenizers call the token behind a document, the most particular name first.
END_NAMES = (
    "<|endoftext|>", "<|end_of_text|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "</s>", "<eos>",
    "[EOS]", "<|im_end|>",
)  # fmt: skip


class ByteTokenizer:
    """Text as its UTF-8 bytes; the byte 0, which text hardly ever has, ends a document.

    Attributes, of every tokenizer:
      name, digest: what a token file's header says of it; equal digests mean equal ids.
      vocab_size: every id is below it.
      end_of_document: id of the token behind a document.
    """

    name = digest = BYTES
    vocab_size = 256
    end_of_document = text.END_OF_DOCUMENT

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text."""
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns text; bytes that are no UTF-8 become U+FFFD."""
        return bytes(ids).decode(errors="replace")


class FileTokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library.

    Text is text: what spells a special token is split like any other, nothing is put before or
    behind it, and the file's settings for padding and truncation are not used.
    """

    def __init__(self, path: str, end_name: str | None = None):
        """
        Args:
          end_name: the token behind a document; None takes the first of END_NAMES that there is.

        Raises:
          ConfigError: the file is not a tokenizer, or it has no such token.
        """
        import tokenizers

        try:
            content = pathlib.Path(path).read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing more particular
            raise ConfigError(
                f"--tokenizer = {path!r} must be {BYTES!r} or a tokenizer.json file, but: {error}"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self.name = pathlib.Path(path).name
        self.digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        # Ids need not be without gaps.
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        names = END_NAMES if end_name is None else (end_name,)
        found = next((name for name in names if name in vocabulary), None)
        if found is None:
            raise ConfigError(
                f"--end_of_document = {end_name!r} must name a token of {path!r}, which has none "
                f"of {', '.join(names)}"
            )
        self.end_of_document = vocabulary[found]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text; all cores work at it."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns text, special tokens included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def load_tokenizer(name: str, end_name: str | None = None) -> ByteTokenizer | FileTokenizer:
    """Returns the tokenizer that `--tokenizer=name` means: BYTES, or the path of a file."""
    if name != BYTES:
        return FileTokenizer(name, end_name)
    if end_name is not None:
        raise ConfigError(f"--end_of_document = {end_name!r} must be left out with {BYTES!r}")
    return ByteTokenizer()
