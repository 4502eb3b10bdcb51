"""Text to measure training on: a tokenizer of 32,000 words and its tokens, without a download.

  python -m benchmarks.text --output runs/text

writes tokenizer.json and tokens.bin from the sources of the Python standard library. A trained
tokenizer matters to routing: of single bytes one in four is a space, and its experts get as much.
"""

import pathlib

import tokenizers
from absl import flags

from disag_jax import cli, prepare, text
from disag_jax.errors import ConfigError

VOCAB_SIZE = 32_000
END_OF_DOCUMENT = "<|endoftext|>"


def train_tokenizer(files: list[str], path: pathlib.Path):
    """Trains byte-level BPE on the files and writes it as a tokenizer.json."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train(files, trainer)
    tokenizer.save(str(path))


def main(output: str):
    directory = pathlib.Path(output)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ConfigError(f"--output = {output!r} must be a new or empty directory")
    directory.mkdir(parents=True, exist_ok=True)
    files = [str(path) for path in text.standard_library()]
    train_tokenizer(files, directory / "tokenizer.json")
    header = prepare.prepare(
        tuple(files), str(directory / "tokens"), str(directory / "tokenizer.json"), END_OF_DOCUMENT
    )
    print(f"{directory}/tokens.bin: {header.num_tokens:,} tokens of {len(files):,} files")


if __name__ == "__main__":
    _OUTPUT = flags.DEFINE_string("output", None, "directory for the tokenizer and the tokens")
    flags.mark_flag_as_required("output")
    cli.run(lambda: main(_OUTPUT.value))
