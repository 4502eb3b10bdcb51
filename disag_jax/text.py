"""Real text without a download: the bytes of files on this machine, split by file."""

import dataclasses
import hashlib
import os
import pathlib
import platform
import sysconfig
from collections.abc import Iterator

import numpy as np

from disag_jax.config import ConfigError

# The byte between documents. UTF-8 text has it hardly ever; a document with it counts as two.
END_OF_DOCUMENT = 0

# Files that a directory is searched for. A file named directly is read whatever its suffix.
TEXT_SUFFIXES = (
    ".c", ".cc", ".cpp", ".css", ".csv", ".go", ".h", ".hpp", ".html", ".java", ".js", ".json",
    ".jsonl", ".md", ".py", ".rs", ".rst", ".sh", ".tex", ".toml", ".ts", ".txt", ".xml", ".yaml",
    ".yml",
)  # fmt: skip

# Not the library proper: installed packages, tests and their deliberately broken sources, IDLE.
_STDLIB_SKIPPED = ("site-packages", "dist-packages", "test", "tests", "idlelib")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text as bytes, a NUL byte between documents.

    Attributes:
      train, held_out: uint8 [bytes], read-only; no document is in both, except that a corpus of one
        document is cut in two.
      description: one line that says where the text is from and how much there is.
    """

    train: np.ndarray
    held_out: np.ndarray
    description: str


def load(paths: tuple[str, ...], held_out_fraction: float) -> Corpus:
    """Returns the text of files, split by file into training and held-out text.

    Which side a file falls on depends on its path below the given directory and on the fraction,
    not on the order of the paths or on the machine. Each side has at least one file; a single file
    is cut at the line boundary nearest to the fraction. Symbolic links to directories are not
    followed, and a file reached twice counts once.

    Args:
      paths: text files, and directories, searched recursively for files that end in one of
        TEXT_SUFFIXES and are not hidden; empty means the Python standard library's own sources.
      held_out_fraction: share of the files (of a single file: of its bytes) to hold out.

    Raises:
      ConfigError: a path is missing, unreadable or not UTF-8, or there is no text at all.
    """
    if paths:
        documents = _read(find_files(paths))
        where = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        rule = f"hold text, but no file that ends in one of {' '.join(TEXT_SUFFIXES)} has any"
    else:
        documents = _read(standard_library(), skip_undecodable=True)
        root = sysconfig.get_path("stdlib")
        where = f"the standard library of Python {platform.python_version()} ({root})"
        rule = f"name text files, because {where} has no sources here"
    if not documents:
        raise ConfigError(f"data.paths = {paths!r} must {rule}")

    if len(documents) == 1:
        train, held_out = _cut(documents[0][1], held_out_fraction)
    else:
        train, held_out = _split(documents, held_out_fraction)
    return Corpus(
        train=_join(train),
        held_out=_join(held_out),
        description=f"text of {where}: train {_size(train)}, held out {_size(held_out)}",
    )


def standard_library() -> dict[pathlib.Path, str]:
    """The sources of Python's standard library, as `find_files` returns them."""
    root = sysconfig.get_path("stdlib")
    return find_files((root,), suffixes=(".py",), skipped=_STDLIB_SKIPPED)


def find_files(
    paths: tuple[str, ...],
    field: str = "data.paths",
    *,
    suffixes: tuple[str, ...] = TEXT_SUFFIXES,
    skipped: tuple[str, ...] = (),
) -> dict[pathlib.Path, str]:
    """Returns {file: its posix path below the given directory, or its name if given itself}.

    field: what names the paths in error messages.
    """
    files = {}
    for given in paths:
        root = pathlib.Path(given)
        if root.is_file():
            found = {root: root.name}
        elif root.is_dir():
            found = {f: f.relative_to(root).as_posix() for f in _search(root, suffixes, skipped)}
        else:
            raise ConfigError(f"{field} = {given!r} must be a file or directory that exists")
        for path, name in found.items():
            # Reached by two routes, a file would have two names and could fall on both sides. The
            # smaller name does not depend on the order of the paths.
            path = path.resolve()
            files[path] = min(name, files.get(path, name))
    return files


def _search(
    root: pathlib.Path, suffixes: tuple[str, ...], skipped: tuple[str, ...]
) -> Iterator[pathlib.Path]:
    """Yields the files below a directory that have one of the suffixes and are not hidden.

    skipped: names of directories to leave out.
    """
    for folder, folders, names in os.walk(root, onerror=_raise_unreadable):
        folders[:] = [name for name in folders if name not in skipped and name[0] != "."]
        for path in (pathlib.Path(folder, name) for name in names if name[0] != "."):
            if path.suffix.lower() in suffixes and path.is_file():
                yield path


def _read(
    files: dict[pathlib.Path, str], skip_undecodable: bool = False
) -> list[tuple[str, bytes]]:
    """Returns (name, content) of the files that are not empty, sorted."""
    documents = []
    for path, name in files.items():
        try:
            content = path.read_bytes()
            content.decode()
        except UnicodeDecodeError as error:
            if skip_undecodable:
                continue
            raise ConfigError(
                f"data.paths = {str(path)!r} must be UTF-8 text, but byte {error.start} is not"
            ) from error
        except OSError as error:
            _raise_unreadable(error)
        if content:
            documents.append((name, content))
    return sorted(documents)


def _split(documents: list[tuple[str, bytes]], fraction: float) -> tuple[list[bytes], list[bytes]]:
    """Returns the documents to train on and those held out; neither list is empty."""
    by_score = sorted(documents, key=lambda document: _score(document[0]))
    num_held_out = sum(_score(name) < fraction for name, _ in documents)
    num_held_out = min(max(num_held_out, 1), len(documents) - 1)
    held_out, train = sorted(by_score[:num_held_out]), sorted(by_score[num_held_out:])
    return [content for _, content in train], [content for _, content in held_out]


def _score(name: str) -> float:
    """Returns a number in [0, 1], spread evenly over names; the lowest are held out first."""
    # surrogateescape: a file's name need not be UTF-8.
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _cut(content: bytes, fraction: float) -> tuple[list[bytes], list[bytes]]:
    """Returns the start and the end of the only document, cut at a line boundary if it has one."""
    target = round(len(content) * (1 - fraction))
    # A line that ends the file is no boundary: nothing would be held out.
    lines = content[:-1]
    boundaries = (lines.rfind(b"\n", 0, target) + 1, lines.find(b"\n", target) + 1)
    cut = min((b for b in boundaries if b), key=lambda b: abs(b - target), default=target)
    cut = max(min(cut, len(content) - 1), 1)
    return [content[:cut]], [content[cut:]]


def _join(documents: list[bytes]) -> np.ndarray:
    return np.frombuffer(bytes([END_OF_DOCUMENT]).join(documents), np.uint8)


def _size(documents: list[bytes]) -> str:
    files = "1 file" if len(documents) == 1 else f"{len(documents):,} files"
    return f"{files} with {sum(map(len, documents)):,} bytes"


def _raise_unreadable(error: OSError):
    raise ConfigError(
        f"data.paths = {str(error.filename)!r} must be readable, but: {error.strerror}"
    ) from error
