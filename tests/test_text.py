"""The corpus: which files it reads, how it splits them, and what it says about bad paths."""

import os
import pathlib
import random
import tempfile

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from disag_jax import text
from disag_jax.config import ConfigError

FRACTIONS = st.floats(0.01, 0.99)
NAMES = st.sets(st.from_regex(r"([a-c]/)?[a-z0-9]{1,6}\.txt", fullmatch=True), max_size=12)


def _write(root, files):
    """Writes {relative path: text or bytes}; returns the root as a path string."""
    for name, content in files.items():
        path = pathlib.Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(root)


def _documents(side):
    return side.tobytes().split(b"\0")


def _load_names(names, fraction, order=sorted):
    """Loads files that hold their own names, by many paths; returns the names on each side."""
    with tempfile.TemporaryDirectory() as root:
        _write(root, {name: name for name in names})
        paths = order([root, *map(str, pathlib.Path(root).iterdir())])
        corpus = text.load(tuple(paths), fraction)
    return [{d.decode() for d in _documents(side)} for side in (corpus.train, corpus.held_out)]


@hypothesis.given(NAMES.filter(lambda names: len(names) >= 2), FRACTIONS)
@hypothesis.settings(max_examples=25, deadline=None)
def test_every_file_is_on_one_side_and_no_side_is_empty(names, fraction):
    train, held_out = _load_names(names, fraction)
    assert train and held_out
    assert not train & held_out
    assert train | held_out == names


@hypothesis.given(NAMES.filter(lambda names: len(names) >= 2), FRACTIONS, st.randoms())
@hypothesis.settings(max_examples=25, deadline=None)
def test_the_split_ignores_the_order_of_the_paths(names, fraction, rng):
    def shuffled(paths):
        return rng.sample(paths, len(paths))

    assert _load_names(names, fraction) == _load_names(names, fraction, shuffled)


def test_corpus_is_the_same_bytes_for_paths_in_any_order(tmp_path):
    first = _write(tmp_path / "x", {"a.txt": "one", "b.txt": "two", "c.txt": "three"})
    second = _write(tmp_path / "y", {"a.txt": "four", "d.txt": "five"})
    corpus, swapped = text.load((first, second), 0.4), text.load((second, first), 0.4)
    np.testing.assert_array_equal(corpus.train, swapped.train)
    np.testing.assert_array_equal(corpus.held_out, swapped.held_out)


def test_a_file_stays_on_its_side_when_others_come(tmp_path):
    some = {f"{i}.txt": f"{i}" for i in range(50)}
    more = {f"{i}.txt": f"{i}" for i in range(100)}
    before = text.load((_write(tmp_path / "some", some),), 0.3)
    after = text.load((_write(tmp_path / "more", more),), 0.3)
    assert set(_documents(before.train)) < set(_documents(after.train))
    assert set(_documents(before.held_out)) < set(_documents(after.held_out))


def test_the_fraction_is_a_share_of_the_files(tmp_path):
    root = _write(tmp_path, {f"{i}.txt": f"{i}" for i in range(1000)})
    assert 230 < len(_documents(text.load((root,), 0.27).held_out)) < 310


def test_a_file_reached_twice_counts_once(tmp_path):
    root = _write(tmp_path, {"a/x.txt": "one", "b.txt": "two"})
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    corpus = text.load((root, str(tmp_path / "a"), str(tmp_path / "a" / "x.txt")), 0.5)
    assert sorted(_documents(corpus.train) + _documents(corpus.held_out)) == [b"one", b"two"]


def test_directories_give_text_files_and_a_named_file_may_have_any_suffix(tmp_path):
    root = _write(
        tmp_path / "root",
        {
            "a.txt": "a", "deep/er/b.md": "b", "C.PY": "c", "empty.txt": "",
            "image.png": b"\xff", ".hidden.txt": b"\xff", ".git/d.txt": b"\xff",
        },
    )  # fmt: skip
    named = _write(tmp_path, {"named.log": "e"}) + "/named.log"
    corpus = text.load((root, named), 0.5)
    found = sorted(_documents(corpus.train) + _documents(corpus.held_out))
    assert found == [b"a", b"b", b"c", b"e"]
    assert corpus.train.dtype == corpus.held_out.dtype == np.uint8


def test_documents_are_joined_by_nul_in_the_order_of_their_names(tmp_path):
    names = [f"{i}.txt" for i in range(20)]
    random.Random(0).shuffle(names)
    corpus = text.load((_write(tmp_path, {name: name for name in names}),), 0.3)
    for side in (corpus.train, corpus.held_out):
        assert _documents(side) == sorted(_documents(side))
    assert corpus.train[0] != 0 and corpus.train[-1] != 0


@hypothesis.given(st.text(st.sampled_from("ab\né"), min_size=2), FRACTIONS)
@hypothesis.settings(max_examples=100, deadline=None)
def test_one_file_is_cut_at_the_nearest_line(content, fraction):
    content = content.encode()
    with tempfile.TemporaryDirectory() as root:
        corpus = text.load((_write(root, {"a.txt": content}),), fraction)
    train, held_out = corpus.train.tobytes(), corpus.held_out.tobytes()
    assert train and held_out
    assert train + held_out == content
    boundaries = [i + 1 for i, byte in enumerate(content[:-1]) if byte == ord("\n")]
    target = round(len(content) * (1 - fraction))
    distance = abs(len(train) - target)
    assert distance == min((abs(b - target) for b in boundaries), default=distance)
    assert distance <= 1 or boundaries


def test_description_counts_files_and_bytes(tmp_path):
    root = _write(tmp_path, {f"{i}.txt": "x" * 1000 for i in range(3)})
    corpus = text.load((root,), 0.01)
    assert root in corpus.description
    assert "train 2 files with 2,000 bytes, held out 1 file with 1,000 bytes" in corpus.description


def test_the_default_is_the_standard_library_without_its_tests():
    corpus = text.load((), 0.1)
    assert len(corpus.train) > 5_000_000 and len(corpus.held_out) > 200_000
    assert "standard library of Python" in corpus.description
    both = corpus.train.tobytes() + corpus.held_out.tobytes()
    assert b"class TextIOWrapper(TextIOBase):" in both  # _pyio.py
    assert b"class RegressionTestResult(" not in both  # test/libregrtest/testresult.py


def test_the_default_passes_over_sources_that_are_not_utf8(tmp_path, monkeypatch):
    root = _write(tmp_path, {"a.py": "a", "b.py": "b", "c.py": b"\xff", "test/d.py": "d"})
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: root)
    corpus = text.load((), 0.5)
    assert sorted(_documents(corpus.train) + _documents(corpus.held_out)) == [b"a", b"b"]


def _error(paths):
    with pytest.raises(ConfigError) as caught:
        text.load(paths, 0.1)
    message = str(caught.value)
    assert message.startswith("data.paths = ") and "\n" not in message
    return message


def test_missing_path():
    assert _error(("no/such/file",)) == (
        "data.paths = 'no/such/file' must be a file or directory that exists"
    )


@pytest.mark.parametrize("files", [{}, {"a.txt": ""}, {"a.png": b"\x89PNG"}])
def test_no_text(tmp_path, files):
    root = _write(tmp_path, files)
    message = _error((root,))
    assert root in message and "must hold text" in message and ".txt" in message


def test_no_standard_library_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "must name text files" in _error(())


def test_not_utf8_names_the_file_and_the_byte(tmp_path):
    root = _write(tmp_path, {"a.txt": "fine", "b.txt": b"caf\xe9 au lait"})
    assert f"{root}/b.txt' must be UTF-8 text, but byte 3 is not" in _error((root,))


def test_unreadable_file(tmp_path, monkeypatch):
    root = _write(tmp_path, {"a.txt": "a"})

    # Changing the mode would not do: root reads everything.
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
    assert f"{root}/a.txt' must be readable, but: Permission denied" in _error((root,))


def test_unreadable_directory(tmp_path, monkeypatch):
    root = _write(tmp_path, {"a/b.txt": "b"})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"{root}/a' must be readable, but: Permission denied" in _error((root,))
