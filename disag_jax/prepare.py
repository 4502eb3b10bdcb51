"""Writes token files (disag_jax/token_files.py) from text.

  python -m disag_jax.prepare --input books/ --input more.txt --tokenizer bytes --output data/books

Every file is a document. Text is read in pieces, so memory does not grow with it; a piece ends
behind a line, and a tokenizer that joins lines may differ there from one that saw the whole. Given
again, an interrupted command goes on behind the last piece that `<output>.progress.json` notes; the
result is the same to the bit.
"""

import codecs
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from disag_jax import text, token_files
from disag_jax.config import ConfigError
from disag_jax.files import write_json
from disag_jax.token_files import Header, TokenWriter
from disag_jax.tokenizer import load_tokenizer

PIECE_BYTES = 2**18
# Pieces that are tokenized at once, on as many cores.
GROUP_BYTES = 2**22

SECONDS_BETWEEN_NOTES = 1.0
SECONDS_BETWEEN_LINES = 10.0


@dataclasses.dataclass(frozen=True)
class Position:
    """How far the work is.

    Attributes:
      file: number of the file that comes next, or is being read.
      offset: bytes of it that are done.
      done_bytes: bytes of all files that are done.
      num_tokens: tokens written.
    """

    file: int = 0
    offset: int = 0
    done_bytes: int = 0
    num_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some text of a file.

    Attributes:
      file, end: number of the file and the offset behind the text.
      num_bytes: of the text.
      ends_document: whether the file ends here.
    """

    text: str
    file: int
    end: int
    num_bytes: int
    ends_document: bool


def prepare(
    inputs: tuple[str, ...],
    output: str,
    tokenizer_name: str,
    end_name: str | None = None,
    report: Callable[[Position], None] = lambda position: None,
) -> Header:
    """Writes `<output>.bin` and `<output>.json`, or goes on with them.

    Args:
      inputs: text files and directories, as `data.paths` names them.
      tokenizer_name, end_name: as `load_tokenizer` takes them.
      report: called now and then.

    Raises:
      ConfigError: an input is not UTF-8 text, the output exists, or is of other inputs.
    """
    tokenizer = load_tokenizer(tokenizer_name, end_name)
    files = find_inputs(inputs)
    target = pathlib.Path(output.removesuffix(".bin") + ".bin")
    if output.endswith("/") or not target.stem or target.stem.endswith((".npy", ".json")):
        raise ConfigError(f"--output = {output!r} must be a file's path, without a suffix or .bin")
    if token_files.header_path(target).exists():
        raise ConfigError(f"--output = {output!r} must be new: {target} is finished")
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    notes = _Notes(
        target.with_suffix(".progress.json"),
        job={
            "inputs": _digest(files),
            "tokenizer_digest": tokenizer.digest,
            "end_of_document": tokenizer.end_of_document,
        },
    )
    position = notes.begin(output, target)
    writer = TokenWriter(target, dtype, keep=position.num_tokens)
    try:
        for group in _groups(_pieces(list(files), position)):
            for piece, ids in zip(group, tokenizer.encode([p.text for p in group]), strict=True):
                writer.append(ids)
                if piece.ends_document:
                    writer.append([tokenizer.end_of_document])
                position = Position(
                    file=piece.file + piece.ends_document,
                    offset=0 if piece.ends_document else piece.end,
                    done_bytes=position.done_bytes + piece.num_bytes,
                    num_tokens=position.num_tokens + len(ids) + piece.ends_document,
                )
            report(position)
            notes.take(position, writer)
    finally:
        notes.take(position, writer, now=True)
        writer.close()
    header = Header(
        dtype=dtype,
        num_tokens=position.num_tokens,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        tokenizer=tokenizer.name,
        tokenizer_digest=tokenizer.digest,
        text_bytes=position.done_bytes,
    )
    token_files.write_header(target, header)
    notes.delete()
    return header


def find_inputs(inputs: tuple[str, ...]) -> dict[pathlib.Path, int]:
    """Returns {text file: its bytes} in the order of their names; empty files are left out."""
    found = text.find_files(inputs, "--input")
    ordered = sorted(found, key=lambda path: (found[path], path))
    sizes = {path: path.stat().st_size for path in ordered}
    sizes = {path: size for path, size in sizes.items() if size}
    if not sizes:
        raise ConfigError(
            f"--input = {inputs!r} must hold text, but no file that ends in one of "
            f"{' '.join(text.TEXT_SUFFIXES)} has any"
        )
    return sizes


class _Notes:
    """The file that says how far the work is; what it says is always on the disk already."""

    def __init__(self, path: pathlib.Path, job: dict):
        self._path, self._job = path, job
        self._taken = time.monotonic()

    def begin(self, output: str, target: pathlib.Path) -> Position:
        """Returns where to go on from: the start, unless the same work was interrupted."""
        try:
            if self._path.exists():
                return self._read(output, target)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                raise ConfigError(f"--output = {output!r} must be new: {target} is another file")
            self._write(Position())
        except OSError as error:
            raise ConfigError(
                f"--output = {output!r} must be writable, but: {error.strerror}"
            ) from error
        return Position()

    def take(self, position: Position, writer: TokenWriter, now: bool = False):
        if now or time.monotonic() - self._taken >= SECONDS_BETWEEN_NOTES:
            writer.sync()
            self._write(position)
            self._taken = time.monotonic()

    def delete(self):
        self._path.unlink()

    def _read(self, output: str, target: pathlib.Path) -> Position:
        notes = json.loads(self._path.read_text(encoding="utf-8"))
        position = Position(**notes.pop("position"))
        for name, value in self._job.items():
            if notes[name] != value:
                raise ConfigError(
                    f"--output = {output!r} must be of the same {name} as when it was interrupted "
                    f"(delete {self._path.name} and {target.name} to begin again)"
                )
        return position

    def _write(self, position: Position):
        write_json(self._path, self._job | {"position": dataclasses.asdict(position)})


def _pieces(files: list[pathlib.Path], position: Position) -> Iterator[Piece]:
    """Yields the text behind a position. A piece is decided by its file and offset alone."""
    for number in range(position.file, len(files)):
        offset = position.offset if number == position.file else 0
        with open(files[number], "rb") as file:
            is_last = False
            while not is_last:
                file.seek(offset)
                block = file.read(PIECE_BYTES)
                is_last = len(block) < PIECE_BYTES
                if not is_last:
                    block = block[: block.rfind(b"\n") + 1] or block
                try:
                    # Without a line's end, the last character may go on in the next block.
                    content, size = codecs.utf_8_decode(block, "strict", is_last)
                except UnicodeDecodeError as error:
                    raise ConfigError(
                        f"--input = {str(files[number])!r} must be UTF-8 text, but byte "
                        f"{offset + error.start} is not"
                    ) from error
                offset += size
                yield Piece(content, number, offset, size, is_last)


def _groups(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    group, size = [], 0
    for piece in pieces:
        group.append(piece)
        size += piece.num_bytes
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _digest(files: dict[pathlib.Path, int]) -> str:
    listing = json.dumps([(str(path), size) for path, size in files.items()])
    return hashlib.blake2b(listing.encode(errors="surrogateescape"), digest_size=16).hexdigest()


@contextlib.contextmanager
def progress_report(total_bytes: int):
    """A function that shows a position: a bar on a terminal, else a line every ten seconds."""
    if sys.stderr.isatty():
        import rich.console
        import rich.progress

        columns = (
            *rich.progress.Progress.get_default_columns(),
            rich.progress.DownloadColumn(binary_units=True),
            rich.progress.TransferSpeedColumn(),
        )
        with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True)) as bar:
            task = bar.add_task("tokenizing", total=total_bytes)
            yield lambda position: bar.update(task, completed=position.done_bytes)
        return

    shown = time.monotonic()

    def show(position: Position):
        nonlocal shown
        if time.monotonic() - shown >= SECONDS_BETWEEN_LINES:
            shown = time.monotonic()
            share = position.done_bytes / total_bytes
            print(
                f"{share:.1%} of {total_bytes:,} bytes, {position.num_tokens:,} tokens", flush=True
            )

    yield show


def main(inputs: list[str], output: str, tokenizer_name: str, end_name: str | None):
    inputs = tuple(inputs)
    with progress_report(sum(find_inputs(inputs).values())) as report:
        header = prepare(inputs, output, tokenizer_name, end_name, report)
    name = output.removesuffix(".bin") + ".bin"
    print(f"{name}: {header.num_tokens:,} tokens of {header.tokenizer}, {header.dtype}")


if __name__ == "__main__":
    from absl import flags

    from disag_jax import cli

    _INPUT = flags.DEFINE_multi_string("input", None, "Text file or directory; may be repeated.")
    _OUTPUT = flags.DEFINE_string("output", None, "Path of the token file, without its suffix.")
    _TOKENIZER = flags.DEFINE_string("tokenizer", None, "`bytes`, or a tokenizer.json file.")
    _END = flags.DEFINE_string(
        "end_of_document", None, "Token behind each document; the tokenizer's usual one if absent."
    )
    flags.mark_flags_as_required(["input", "output", "tokenizer"])
    cli.run(lambda: main(_INPUT.value, _OUTPUT.value, _TOKENIZER.value, _END.value))
