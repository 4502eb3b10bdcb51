"""What a run reads: batches of both splits, ahead of their step, and the baseline's loss."""

import collections
import concurrent.futures
import dataclasses
import itertools
from collections.abc import Callable

from disag_jax import text, token_files
from disag_jax.batches import Batch, Batches, Source
from disag_jax.bigram import BigramModel
from disag_jax.config import Config, ConfigError, DataConfig
from disag_jax.tokenizer import BYTES

# Evaluation batches are the same for every run on a text, whatever its seed; so is the baseline.
EVALUATION_SEED = 0

# Enough for the baseline: more would take seconds to count and improve it little.
BASELINE_TOKENS = 2**23


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Batches of both splits, and the bigram baseline's loss on the evaluation batches, if any.

    tokens_per_byte: tokens of the held-out sources over bytes of their text; None if unknown.
    """

    description: str
    train: Batches
    held_out: Batches
    bigram_loss: float | None
    tokens_per_byte: float | None


@dataclasses.dataclass(frozen=True)
class _Splits:
    """Sources of both splits; documents end with the token `end_of_document`, None if unknown."""

    description: str
    train: list[Source]
    held_out: list[Source]
    end_of_document: int | None
    tokens_per_byte: float | None


def load_inputs(config: Config) -> Inputs:
    """Opens the text or the token files, and fits the bigram baseline on the training part."""
    data = config.data
    splits = _open_token_files(config) if data.sources else _read_text(data)
    if splits.end_of_document is None and not data.attend_across_documents:
        raise ConfigError(
            f"data.attend_across_documents = False must be True for data.sources = "
            f"{data.sources[0]!r}, which records no token that ends a document"
        )

    def batches(sources, seed, weights=()):
        return Batches(
            sources,
            config.batch.sequence_length,
            config.sequences_per_step,
            seed=seed,
            vocab_size=config.model.vocab_size,
            weights=weights,
            end_of_document=splits.end_of_document,
            across_documents=data.attend_across_documents,
        )

    held_out_weights = () if data.held_out_sources else data.weights
    held_out = batches(splits.held_out, EVALUATION_SEED, held_out_weights)
    sample = batches(splits.train, EVALUATION_SEED, data.weights)
    return Inputs(
        description=splits.description,
        train=batches(splits.train, config.run.seed, data.weights),
        held_out=held_out,
        bigram_loss=_bigram_loss(config, sample, held_out),
        tokens_per_byte=splits.tokens_per_byte,
    )


def _bigram_loss(config: Config, sample: Batches, held_out: Batches) -> float | None:
    """The baseline's loss on what evaluations read, nats per label; None where there are none."""
    if not config.run.eval_batches:
        return None
    num_counted = min(sample.num_records, -(-BASELINE_TOKENS // config.batch.sequence_length))
    bigram = BigramModel.fit(sample.examples(range(num_counted)), config.model.vocab_size)
    losses = [bigram.loss(held_out.step(i)) for i in range(config.run.eval_batches)]
    return sum(losses) / len(losses)


class Prefetch:
    """Makes the batches of consecutive steps in a thread, ahead of their use."""

    def __init__(self, make_batch: Callable[[int], Batch], steps: range, depth: int):
        """
        Args:
          make_batch: the batch of a step; called in the thread, for one step after the other.
          depth: batches made ahead; 0 makes each when it is asked for.
        """
        self._make_batch, self._steps, self._depth = make_batch, iter(steps), depth
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="input")
        self._pending = collections.deque()
        self._start(depth)

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_):
        self._executor.shutdown(cancel_futures=True)

    def take(self) -> Batch:
        """Returns the next step's batch, or raises what making it raised."""
        self._start(1)
        return self._pending.popleft().result()

    def _start(self, count: int):
        for step in itertools.islice(self._steps, count):
            self._pending.append(self._executor.submit(self._make_batch, step))


def _read_text(data: DataConfig) -> _Splits:
    corpus = text.load(data.paths, data.held_out_fraction)
    return _Splits(
        description=corpus.description,
        train=[Source("data.paths: the training text", corpus.train)],
        held_out=[Source("data.paths: the held-out text", corpus.held_out)],
        end_of_document=text.END_OF_DOCUMENT,
        tokens_per_byte=1.0,
    )


def _tokens_per_byte(headers: list[token_files.Header]) -> float | None:
    if all(header.tokenizer == BYTES for header in headers):
        return 1.0
    if not all(header.text_bytes for header in headers):
        return None
    return sum(h.num_tokens for h in headers) / sum(h.text_bytes for h in headers)


def _open_token_files(config: Config) -> _Splits:
    """Opens the sources and checks that they, the held-out ones and the model fit each other."""
    data = config.data
    train = [token_files.open_tokens(path, "data.sources") for path in data.sources]
    held_out = [token_files.open_tokens(p, "data.held_out_sources") for p in data.held_out_sources]
    for file in train + held_out:
        token_files.check_same_tokens(train[0], file)
        if file.header.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size = {config.model.vocab_size} must be at least "
                f"{file.header.vocab_size}, the vocabulary of {file.name}"
            )
    kept = 1.0 if held_out else 1 - data.held_out_fraction
    cuts = [round(kept * len(file.tokens)) for file in train]
    training = [Source(f.name, f.tokens[:cut]) for f, cut in zip(train, cuts, strict=True)]
    if held_out:
        evaluation = [Source(f.name, f.tokens) for f in held_out]
    else:
        evaluation = [
            Source(
                f"{f.name} (held out: data.held_out_fraction = {data.held_out_fraction})",
                f.tokens[cut:],
                cut,
            )
            for f, cut in zip(train, cuts, strict=True)
        ]
    sizes = [sum(len(source.tokens) for source in side) for side in (training, evaluation)]
    header, more = train[0].header, f" and {len(train) - 1} more" if train[1:] else ""
    return _Splits(
        description=f"tokens of {data.sources[0]}{more} ({header.tokenizer}): train {sizes[0]:,}, "
        f"held out {sizes[1]:,}",
        train=training,
        held_out=evaluation,
        end_of_document=header.end_of_document,
        tokens_per_byte=_tokens_per_byte([f.header for f in held_out or train]),
    )
