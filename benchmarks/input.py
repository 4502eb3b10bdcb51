"""How fast the loader is alone: tokens/s of batches from token files, before they are placed.

  python -m benchmarks.input

The files are new, hence in the page cache: a disk that is slower than the loader is not seen here.
"""

import pathlib
import tempfile
import time

import numpy as np

from disag_jax import cli, token_files
from disag_jax.batches import Batches, Source
from disag_jax.token_files import Header, TokenWriter

VOCAB_SIZE = 50_000
TOKENS_PER_FILE = 2**24
TOKENS_PER_STEP = 2**18
SECONDS = 2.0


def main():
    print(f"batches of {TOKENS_PER_STEP:,} tokens, files of {TOKENS_PER_FILE:,}")
    print(f"{'sequence':>8}  {'files':>5}  {'documents':<22}  {'tokens/s':>11}")
    with tempfile.TemporaryDirectory() as directory:
        paths = [write_file(pathlib.Path(directory), number) for number in range(4)]
        for sequence_length in (128, 1024, 4096):
            for num_files in (1, 4):
                for across_documents in (True, False):
                    batches = make_batches(paths[:num_files], sequence_length, across_documents)
                    kind = "attention across" if across_documents else "attention within"
                    print(
                        f"{sequence_length:>8}  {num_files:>5}  {kind:<22}  "
                        f"{tokens_per_second(batches):>11,.0f}"
                    )


def write_file(directory: pathlib.Path, number: int) -> str:
    """Writes random ids, with a document of about a thousand tokens each; returns the path."""
    path = directory / f"{number}.bin"
    writer = TokenWriter(path, "uint16")
    ids = np.random.default_rng(number).integers(1, VOCAB_SIZE, TOKENS_PER_FILE, np.uint16)
    ids[np.random.default_rng(number).random(TOKENS_PER_FILE) < 1e-3] = 0
    writer.append(ids)
    writer.close()
    token_files.write_header(path, Header("uint16", TOKENS_PER_FILE, VOCAB_SIZE, 0, "random", ""))
    return str(path)


def make_batches(paths: list[str], sequence_length: int, across_documents: bool) -> Batches:
    files = [token_files.open_tokens(path, "path") for path in paths]
    return Batches(
        [Source(file.name, file.tokens) for file in files],
        sequence_length,
        TOKENS_PER_STEP // sequence_length,
        seed=0,
        vocab_size=VOCAB_SIZE,
        end_of_document=0,
        across_documents=across_documents,
    )


def tokens_per_second(batches: Batches) -> float:
    batches.step(0)
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        steps += 1
        batches.step(steps)
    return steps * TOKENS_PER_STEP / (time.perf_counter() - began)


if __name__ == "__main__":
    cli.run(main)
