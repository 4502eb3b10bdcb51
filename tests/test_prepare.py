"""The prepare command: every byte once, in bounded memory, and the same after an interruption."""

import dataclasses
import json
import pathlib
import random
import subprocess
import sys
import tempfile

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers

from disag_jax import prepare, token_files
from disag_jax.config import ConfigError
from disag_jax.tokenizer import ByteTokenizer, FileTokenizer

REPOSITORY = pathlib.Path(__file__).parent.parent
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory) -> str:
    """A byte-level BPE tokenizer with padding and truncation, which must not be used."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", END], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["the theory of the other thing\n"] * 9, trainer)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=8)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces and groups of a few bytes, and a note after every group."""
    monkeypatch.setattr(prepare, "PIECE_BYTES", 7)
    monkeypatch.setattr(prepare, "GROUP_BYTES", 20)
    monkeypatch.setattr(prepare, "SECONDS_BETWEEN_NOTES", 0.0)


def write_texts(root, texts) -> str:
    for name, content in texts.items():
        path = pathlib.Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(root)


def read(output) -> np.ndarray:
    return token_files.open_tokens(f"{output}.bin", "--output").tokens


@hypothesis.given(st.lists(st.text(), min_size=1, max_size=5).filter(any))
@hypothesis.settings(
    max_examples=50, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_bytes_of_all_documents_in_order_of_their_names(small_pieces, texts):
    with tempfile.TemporaryDirectory() as root:
        write_texts(root, {f"text/{i}.txt": text for i, text in enumerate(texts)})
        header = prepare.prepare((f"{root}/text",), f"{root}/out", "bytes")
        expected = b"".join(text.encode() + b"\0" for text in texts if text)
        assert read(f"{root}/out").astype(np.uint8).tobytes() == expected
        assert header.num_tokens == len(expected)
        assert sorted(path.name for path in pathlib.Path(root).iterdir()) == [
            "out.bin", "out.json", "text",
        ]  # fmt: skip


@hypothesis.given(st.text(st.sampled_from("a\n€𝄞"), max_size=60), st.integers(4, 12))
@hypothesis.settings(max_examples=100)
def test_pieces_end_behind_lines_and_depend_on_their_offset_alone(content, piece_bytes):
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "PIECE_BYTES", piece_bytes)
        path = pathlib.Path(root, "a.txt")
        path.write_bytes(content.encode())
        pieces = list(prepare._pieces([path], prepare.Position()))
        assert "".join(piece.text for piece in pieces) == content
        assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        for number, piece in enumerate(pieces[:-1]):
            assert piece.num_bytes <= piece_bytes
            assert piece.text.endswith("\n") or "\n" not in piece.text
            rest = prepare._pieces([path], prepare.Position(offset=piece.end))
            assert list(rest) == pieces[number + 1 :]


def test_a_tokenizer_file(tmp_path, tokenizer_file):
    root = write_texts(tmp_path / "text", {"a.txt": "the theory", "b.txt": f"other {END} thing"})
    header = prepare.prepare((root,), str(tmp_path / "out"), tokenizer_file)
    tokenizer = FileTokenizer(tokenizer_file)
    end = tokenizer.end_of_document
    tokens = read(tmp_path / "out")
    assert header == token_files.Header(
        "uint16", len(tokens), tokenizer.vocab_size, end, "tokenizer.json", tokenizer.digest,
        text_bytes=len("the theory") + len(f"other {END} thing"),
    )  # fmt: skip
    documents = np.split(tokens, np.flatnonzero(tokens == end) + 1)
    assert [tokenizer.decode(d) for d in documents] == [
        f"the theory{END}", f"other {END} thing{END}", "",
    ], "text that spells the special token is not that token"  # fmt: skip
    assert len(documents[0]) < len("the theory") and 0 not in tokens


def test_more_than_two_bytes_of_vocabulary_take_four(tmp_path, tokenizer_file, monkeypatch):
    root = write_texts(tmp_path / "text", {"a.txt": "the"})
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 2**16 + 1)
    assert prepare.prepare((root,), str(tmp_path / "out"), "bytes").dtype == "uint32"
    np.testing.assert_array_equal(read(tmp_path / "out"), [*b"the\0"])


class Interrupted(BaseException):
    pass


def interrupt(tokenizer, after: int, monkeypatch):
    """Makes a tokenizer break off in its call number `after`."""
    encode, calls = tokenizer.encode, iter(range(after))

    def broken(self, texts):
        if next(calls, None) is None:
            raise Interrupted
        return encode(self, texts)

    monkeypatch.setattr(tokenizer, "encode", broken)


@pytest.mark.parametrize("kind", [ByteTokenizer, FileTokenizer])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    kind, tmp_path, tokenizer_file, small_pieces, monkeypatch
):
    rng = random.Random(0)
    texts = {
        f"{i}.txt": "".join(rng.choice("the or\n€") for _ in range(rng.randrange(60)))
        for i in range(12)
    }
    root = write_texts(tmp_path / "text", texts)
    name = "bytes" if kind is ByteTokenizer else tokenizer_file
    whole = prepare.prepare((root,), str(tmp_path / "whole"), name)
    output, interruptions = str(tmp_path / "parts"), 0
    while True:
        with monkeypatch.context() as patch:
            interrupt(kind, rng.randrange(4), patch)
            try:
                parts = prepare.prepare((root,), output, name)
                break
            except Interrupted:
                interruptions += 1
        with open(f"{output}.bin", "ab") as file:
            file.write(b"written but not noted"[: rng.randrange(20)])
        assert not pathlib.Path(f"{output}.json").exists()
    assert interruptions > 5 and parts == whole
    for suffix in (".bin", ".json"):
        first, second = (pathlib.Path(str(tmp_path / n) + suffix) for n in ("whole", "parts"))
        assert first.read_bytes() == second.read_bytes()


def test_the_note_of_an_interruption_is_where_work_goes_on(tmp_path, small_pieces, monkeypatch):
    root = write_texts(tmp_path / "text", {"a.txt": "12345\n" * 5, "b.txt": "1234\n" * 4})
    output = str(tmp_path / "out")
    with monkeypatch.context() as patch:
        interrupt(ByteTokenizer, 2, patch)
        with pytest.raises(Interrupted):
            prepare.prepare((root,), output, "bytes")
    note = json.loads(pathlib.Path(f"{output}.progress.json").read_text())["position"]
    # Two groups of four lines each: a.txt with the token behind it, and three lines of b.txt.
    assert prepare.Position(**note) == prepare.Position(1, 15, 45, 46)
    seen = []
    prepare.prepare((root,), output, "bytes", report=seen.append)
    assert [dataclasses.astuple(position) for position in seen] == [(2, 0, 50, 52)]


def check_refused(sentence, *args):
    with pytest.raises(ConfigError) as refused:
        prepare.prepare(*args)
    said = str(refused.value)
    assert sentence in said and "\n" not in said, said


def test_mistakes_are_told_in_one_sentence(tmp_path, tokenizer_file):
    root = write_texts(tmp_path / "text", {"a.txt": "the"})
    bad = write_texts(tmp_path / "bad", {"a.txt": "the \n" * 5 + "\xff", "b.txt": b"12\n45\xff7"})
    empty = write_texts(tmp_path / "empty", {"a.txt": ""})
    out = str(tmp_path / "out")
    check_refused("--input = '/no/text' must be a file or directory", ("/no/text",), out, "bytes")
    check_refused("must hold text, but no file that ends in", (empty,), out, "bytes")
    check_refused("b.txt' must be UTF-8 text, but byte 5 is not", (bad,), out, "bytes")
    check_refused(
        f"--tokenizer = {root + '/a.txt'!r} must be 'bytes' or a tokenizer.json file, but: ",
        (root,), out, f"{root}/a.txt",
    )  # fmt: skip
    check_refused("must be 'bytes' or a tokenizer.json file", (root,), out, "/no/tokenizer.json")
    check_refused(
        "--end_of_document = '<eot>' must name a token of", (root,), out, tokenizer_file, "<eot>"
    )
    check_refused("must be left out with 'bytes'", (root,), out, "bytes", "<eot>")
    write_texts(tmp_path, {"file": "", "mine.bin": "precious"})
    check_refused("mine.bin is another file", (root,), str(tmp_path / "mine"), "bytes")
    check_refused("must be writable, but: ", (root,), str(tmp_path / "file" / "out"), "bytes")


@pytest.mark.parametrize("name", ["out/", "out.npy", "out.json", ""])
def test_an_output_is_the_path_of_a_file(name, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    root = (str(tmp_path / "a.txt"),)
    output = f"{tmp_path}/{name}"
    check_refused("must be a file's path, without a suffix or .bin", root, output, "bytes")


def test_an_output_is_neither_overwritten_nor_mixed(tmp_path, monkeypatch):
    root = write_texts(tmp_path / "text", {"a.txt": "the"})
    output = str(tmp_path / "out")
    with monkeypatch.context() as patch:
        interrupt(ByteTokenizer, 0, patch)
        with pytest.raises(Interrupted):
            prepare.prepare((root,), output, "bytes")
    write_texts(root, {"b.txt": "more"})
    check_refused("must be of the same inputs as when it was interrupted", (root,), output, "bytes")
    pathlib.Path(root, "b.txt").unlink()
    prepare.prepare((root,), f"{output}.bin", "bytes")
    check_refused("out.bin is finished", (root,), output, "bytes")


def test_the_command(tmp_path):
    root = write_texts(tmp_path / "text", {"a.txt": "the\n", "b.txt": "other\n"})
    command = [
        sys.executable, "-m", "disag_jax.prepare", f"--input={root}/a.txt", f"--input={root}",
        "--tokenizer=bytes", f"--output={tmp_path}/new/out",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path}/new/out.bin: 12 tokens of bytes, uint16\n"
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr.startswith("error: --output = ") and again.stderr.count("\n") == 1


def test_progress_is_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(prepare, "SECONDS_BETWEEN_LINES", 0.0)
    with prepare.progress_report(2000) as report:
        report(prepare.Position(done_bytes=500, num_tokens=1234))
    assert capsys.readouterr().out == "25.0% of 2,000 bytes, 1,234 tokens\n"


def test_progress_is_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with prepare.progress_report(2000) as report:
        report(prepare.Position(done_bytes=2000, num_tokens=1234))
    assert "tokenizing" in capsys.readouterr().err
