"""Token files: what is written is read, and a damaged file is named with what is wrong with it."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from disag_jax import token_files
from disag_jax.config import ConfigError
from disag_jax.token_files import Header, TokenWriter, check_same_tokens, open_tokens

HEADER = Header("uint16", 6, 300, 0, "some.json", "digest")
IDS = [1, 2, 0, 299, 5, 0]


def write(path: pathlib.Path, ids=IDS, header: Header | dict = HEADER) -> str:
    """Writes a token file with any header; returns its path."""
    if path.suffix == ".npy":
        np.save(path, np.asarray(ids))
    else:
        writer = TokenWriter(path, "uint16")
        writer.append(ids)
        writer.close()
    if isinstance(header, Header):
        token_files.write_header(path, header)
    else:
        path.with_suffix(".json").write_text(json.dumps(header))
    return str(path)


@pytest.mark.parametrize("dtype, ids", [("uint16", [0, 2**16 - 1]), ("uint32", [2**16, 2**32 - 1])])
@pytest.mark.parametrize("suffix", [".bin", ".npy"])
def test_what_is_written_is_read(tmp_path, dtype, ids, suffix):
    path = tmp_path / f"tokens{suffix}"
    header = Header(dtype, 3, 2**32, None, "any", "digest")
    if suffix == ".npy":
        np.save(path, np.array([ids[0], *ids], dtype))
    else:
        writer = TokenWriter(path, dtype)
        writer.append(ids[:1])
        writer.append(ids)
        writer.close()
    token_files.write_header(path, header)
    file = open_tokens(str(path), "data.sources")
    assert file.header == header and isinstance(file.tokens, np.memmap)
    np.testing.assert_array_equal(file.tokens, [ids[0], *ids])
    assert not file.tokens.flags.writeable


def test_ids_are_little_endian_and_nothing_else(tmp_path):
    path = write(tmp_path / "a.bin", [1, 0x0203], dataclasses.replace(HEADER, num_tokens=2))
    assert pathlib.Path(path).read_bytes() == b"\x01\x00\x03\x02"


def test_a_writer_goes_on_after_the_tokens_it_is_to_keep(tmp_path):
    path = pathlib.Path(write(tmp_path / "a.bin"))
    writer = TokenWriter(path, "uint16", keep=2)
    writer.append([7])
    writer.sync()
    np.testing.assert_array_equal(np.fromfile(path, np.uint16), [1, 2, 7])
    writer.close()
    with pytest.raises(ConfigError, match=r"a\.bin must have the first 8 bytes"):
        TokenWriter(path, "uint16", keep=4)


def test_an_empty_file_is_whole(tmp_path):
    path = write(tmp_path / "a.bin", [], dataclasses.replace(HEADER, num_tokens=0))
    assert len(open_tokens(path, "data.sources").tokens) == 0


def changed(**fields) -> dict:
    return dataclasses.asdict(HEADER) | fields


def without(field: str) -> dict:
    return {name: value for name, value in changed().items() if name != field}


BAD_FILES = {
    "truncated": (
        "a.bin", IDS[:5], HEADER,
        "must have 12 bytes, for the 6 tokens of type uint16 in a.json, but has 10",
    ),
    "wrong dtype": (
        "a.bin", IDS, changed(dtype="uint32"),
        "must have 24 bytes, for the 6 tokens of type uint32 in a.json, but has 12",
    ),
    "wrong dtype, .npy": (
        "a.npy", np.array(IDS, np.int64), HEADER,
        "must have the type and shape ('uint16', (6,)) of a.json, but has ('int64', (6,))",
    ),
    "wrong byte order": ("a.npy", np.array(IDS, ">u2"), HEADER, "but has ('>u2', (6,))"),
    "wrong shape": ("a.npy", np.array([IDS], np.uint16), HEADER, "but has ('uint16', (1, 6))"),
    "unknown dtype": (
        "a.bin", IDS, changed(dtype="float16"),
        ": dtype = 'float16' in a.json must be one of uint16, uint32",
    ),
    "no header": ("a.bin", IDS, [], ": a.json must have the fields dtype, num_tokens, vocab_size"),
    "header without a field": (
        "a.bin", IDS, without("vocab_size"), ": a.json must have the fields dtype, num_tokens",
    ),
    "end outside of the vocabulary": (
        "a.bin", IDS, changed(end_of_document=HEADER.vocab_size),
        f"in a.json must be below vocab_size = {HEADER.vocab_size}",
    ),
    "header with a wrong field": (
        "a.bin", IDS, changed(end_of_document="</s>"),
        ": end_of_document = '</s>' in a.json must be an integer, 0 or more, or null",
    ),
    "suffix": ("a.txt", IDS, HEADER, "must be a .bin or .npy file that exists"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_in_one_sentence(name, tmp_path):
    file, ids, header, sentence = BAD_FILES[name]
    path = write(tmp_path / file, ids, header)
    check_refused(path, sentence)


def check_refused(path: str, sentence: str):
    with pytest.raises(ConfigError) as refused:
        open_tokens(path, "data.sources")
    said = str(refused.value)
    assert said.startswith(f"data.sources = {path!r}"), said
    assert sentence in said and "\n" not in said, said


def test_a_missing_file_and_a_missing_header(tmp_path):
    check_refused(str(tmp_path / "no.bin"), "must be a .bin or .npy file that exists")
    path = write(tmp_path / "a.bin")
    (tmp_path / "a.json").unlink()
    check_refused(path, "must have a header a.json beside it, which disag_jax.prepare writes when")
    (tmp_path / "a.json").write_text('{"dtype": ')
    check_refused(path, "must have a header a.json beside it")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\x93NUMPY and no more", b"text"])
def test_a_file_that_is_no_npy(content, tmp_path):
    path = write(tmp_path / "a.npy", np.array(IDS, np.uint16))
    pathlib.Path(path).write_bytes(content)
    check_refused(path, "must be a whole .npy file, but: ")


def test_a_truncated_npy_file(tmp_path):
    path = write(tmp_path / "a.npy", np.array(IDS, np.uint16))
    whole = pathlib.Path(path).read_bytes()
    for size in (len(whole) - 1, 50, 0):
        pathlib.Path(path).write_bytes(whole[:size])
        check_refused(path, "must be a whole .npy file, but: ")


@pytest.mark.parametrize("field, value", [("tokenizer_digest", "other"), ("end_of_document", 2)])
def test_files_of_different_tokens_do_not_mix(tmp_path, field, value):
    first = open_tokens(write(tmp_path / "a.bin"), "data.sources")
    header = dataclasses.replace(HEADER, **{field: value})
    other = open_tokens(write(tmp_path / "b.bin", header=header), "data.sources")
    check_same_tokens(first, first)
    with pytest.raises(ConfigError, match=rf"b\.bin' must have {field} .*, as .*a\.bin' has"):
        check_same_tokens(first, other)
