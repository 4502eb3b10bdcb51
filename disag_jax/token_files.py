"""Token files: documents as token ids, to be mapped into memory.

NAME.bin is little-endian ids one after another, each document with an end-of-document token behind
it. NAME.npy is the same as a numpy array of one dim. NAME.json beside either is its `Header`.

A file is opened without being read: its size, its type and the vocabulary that the header names are
checked then, each id when it becomes part of a batch (disag_jax/batches.py).
"""

import dataclasses
import json
import os
import pathlib

import numpy as np

from disag_jax.config import ConfigError
from disag_jax.files import write_json

DTYPES = ("uint16", "uint32")


@dataclasses.dataclass(frozen=True)
class Header:
    """What the ids of a file are.

    Attributes:
      dtype: one of DTYPES.
      vocab_size: every id is below it.
      end_of_document: id of the token behind each document; None if documents run together.
      tokenizer: name of what made the ids.
      tokenizer_digest: files with another digest have other ids for the same text.
      text_bytes: bytes of the text that the ids stand for; None if unknown.
    """

    dtype: str
    num_tokens: int
    vocab_size: int
    end_of_document: int | None
    tokenizer: str
    tokenizer_digest: str
    text_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """An open token file.

    Attributes:
      name: begins a sentence about the file.
      tokens: [num_tokens], mapped.
    """

    name: str
    header: Header
    tokens: np.ndarray


def open_tokens(path: str, field: str) -> TokenFile:
    """Maps a token file into memory.

    Args:
      path: of the .bin or .npy file.
      field: names the file in error messages together with its path, such as "data.sources".

    Raises:
      ConfigError: the file or its header is missing, damaged, or not as the other says.
    """
    name = f"{field} = {path!r}"
    if pathlib.Path(path).suffix not in (".bin", ".npy") or not os.path.isfile(path):
        raise ConfigError(f"{name} must be a .bin or .npy file that exists")
    header = _read_header(path, name)
    if path.endswith(".npy"):
        return TokenFile(name, header, _map_npy(path, name, header))
    size, dtype = os.path.getsize(path), np.dtype(header.dtype).newbyteorder("<")
    if size != header.num_tokens * dtype.itemsize:
        raise ConfigError(
            f"{name} must have {header.num_tokens * dtype.itemsize} bytes, for the "
            f"{header.num_tokens} tokens of type {header.dtype} in {header_path(path).name}, but "
            f"has {size}"
        )
    # An empty file cannot be mapped.
    tokens = np.memmap(path, dtype, "r") if size else np.empty(0, dtype)
    return TokenFile(name, header, tokens)


def check_same_tokens(first: TokenFile, other: TokenFile):
    """Raises ConfigError unless ids mean the same in both files."""
    for field in ("tokenizer_digest", "end_of_document"):
        mine, wanted = getattr(other.header, field), getattr(first.header, field)
        if mine != wanted:
            raise ConfigError(
                f"{other.name} must have {field} {wanted!r}, as {first.name} has, but has {mine!r}"
            )


def header_path(path) -> pathlib.Path:
    return pathlib.Path(path).with_suffix(".json")


def write_header(path, header: Header):
    """Writes the header of a token file, which is complete from then on."""
    write_json(header_path(path), dataclasses.asdict(header))


class TokenWriter:
    """Appends ids to a .bin file; what stands there after the first `keep` ids is cut off."""

    def __init__(self, path: pathlib.Path, dtype: str, keep: int = 0):
        self._dtype = np.dtype(dtype).newbyteorder("<")
        size = keep * self._dtype.itemsize
        if keep and (not path.exists() or path.stat().st_size < size):
            raise ConfigError(f"{path} must have the first {size} bytes of its interrupted writing")
        self._file = open(path, "r+b" if keep else "wb")  # noqa: SIM115
        self._file.truncate(size)
        self._file.seek(size)

    def append(self, ids):
        self._file.write(np.asarray(ids, self._dtype).tobytes())

    def sync(self):
        """Returns once everything appended is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self):
        self._file.close()


def _read_header(path: str, name: str) -> Header:
    file = header_path(path)
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{name} must have a header {file.name} beside it, which disag_jax.prepare writes when "
            f"it is done, but: {getattr(error, 'strerror', None) or error}"
        ) from error
    wanted = [field.name for field in dataclasses.fields(Header) if field.name != "text_bytes"]
    if not isinstance(fields, dict) or set(fields) - {"text_bytes"} != set(wanted):
        raise ConfigError(f"{name}: {file.name} must have the fields {', '.join(wanted)}")
    header = Header(**fields)
    end = header.end_of_document
    size = header.text_bytes
    rules = {
        "dtype": (header.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
        "num_tokens": (_is_int(header.num_tokens), "an integer, 0 or more"),
        "vocab_size": (_is_int(header.vocab_size), "an integer, 0 or more"),
        "text_bytes": (size is None or _is_int(size), "an integer, 0 or more, or null"),
        "end_of_document": (end is None or _is_int(end), "an integer, 0 or more, or null"),
    }
    for field, (holds, rule) in rules.items():
        if not holds:
            value = getattr(header, field)
            raise ConfigError(f"{name}: {field} = {value!r} in {file.name} must be {rule}")
    if end is not None and end >= header.vocab_size:
        raise ConfigError(
            f"{name}: end_of_document = {end} in {file.name} must be below vocab_size = "
            f"{header.vocab_size}"
        )
    return header


def _map_npy(path: str, name: str, header: Header) -> np.ndarray:
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    # numpy parses the header as a Python literal, and what a broken one raises has many types.
    except Exception as error:
        raise ConfigError(f"{name} must be a whole .npy file, but: {error}") from error
    found, wanted = (tokens.dtype.str, tokens.shape), (header.dtype, (header.num_tokens,))
    if found != (np.dtype(header.dtype).newbyteorder("<").str, wanted[1]):
        raise ConfigError(
            f"{name} must have the type and shape {wanted} of {header_path(path).name}, but has "
            f"{(str(tokens.dtype), tokens.shape)}"
        )
    return tokens


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
