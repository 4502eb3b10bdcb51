"""Files from elsewhere: none runs code, none leads out of its directory, damage has a name."""

import ast
import contextlib
import json
import pathlib
import shutil

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from disag_jax.config import ConfigError
from disag_jax.inspect import describe
from disag_jax.saved_checkpoint import METADATA, SavedCheckpoint, UnreadableCheckpointError
from disag_jax.step import BucketChooser
from disag_jax.token_files import Header, open_tokens, write_header
from disag_jax.workdir import config_from_dict
from tests import launching

SOURCES = ("disag_jax", "layers", "mesh", "configs", "benchmarks", "train.py")
# Modules whose loaders run what a file says, and functions that do.
LOADERS = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
RUNNERS = {"eval", "exec", "compile", "__import__"}

BIAS = "arrays/router_bias/zarr.json"

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=8), values),
    max_leaves=5,
)
few = hypothesis.settings(
    max_examples=150, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


def source_files():
    for name in SOURCES:
        path = launching.REPOSITORY / name
        yield from [path] if path.is_file() else path.rglob("*.py")


def test_no_source_file_can_run_what_data_says():
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                imported = [node.module or ""]
            assert not {name.split(".")[0] for name in imported} & LOADERS, path
            if isinstance(node, ast.Call):
                called = getattr(node.func, "id", None)
                assert called not in RUNNERS, (path, node.lineno)
                assert all(k.arg != "allow_pickle" for k in node.keywords), (path, node.lineno)


@st.composite
def damaged(draw, data: bytes):
    """The bytes with some overwritten, inserted or cut off."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(changed)))
        action = draw(st.sampled_from(("overwrite", "insert", "cut")))
        new = draw(st.binary(min_size=1, max_size=6))
        if action == "cut":
            del changed[place:]
        else:
            changed[place : place + (len(new) if action == "overwrite" else 0)] = new
    return bytes(changed)


@st.composite
def altered(draw, value):
    """The JSON value with one part of it, at any depth, replaced by anything."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        return value | {key: draw(altered(value[key]))}
    return draw(JSON)


HEADER = {
    "dtype": "uint16", "num_tokens": 6, "vocab_size": 300, "end_of_document": 0,
    "tokenizer": "some.json", "tokenizer_digest": "digest", "text_bytes": 12,
}  # fmt: skip


@few
@hypothesis.given(altered(HEADER).map(json.dumps) | damaged(json.dumps(HEADER).encode()))
@hypothesis.example("[" * 100_000)
def test_headers_of_token_files(tmp_path, text):
    (tmp_path / "a.bin").write_bytes(bytes(12))
    (tmp_path / "a.json").write_bytes(text.encode() if isinstance(text, str) else text)
    try:
        assert len(open_tokens(str(tmp_path / "a.bin"), "data.sources").tokens) == 6
    except ConfigError as error:
        assert "data.sources = " in str(error)


@pytest.fixture(scope="module")
def npy(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("npy") / "a.npy"
    np.save(path, np.arange(6, dtype=np.uint16))
    return path.read_bytes()


@few
@hypothesis.given(st.data())
def test_npy_files(tmp_path, npy, data):
    path = tmp_path / "a.npy"
    path.write_bytes(data.draw(damaged(npy)))
    write_header(path, Header(**HEADER))
    try:
        tokens = open_tokens(str(path), "data.sources").tokens
        assert (tokens.dtype, tokens.shape) == (np.uint16, (6,))
    except ConfigError as error:
        assert "data.sources = " in str(error)


def test_an_npy_file_of_objects_is_not_unpickled(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.array([{"any": "object"}] * 6), allow_pickle=True)
    write_header(path, Header(**HEADER))
    with pytest.raises(ConfigError, match=r"must be a whole .npy file, but: .*Python objects"):
        open_tokens(str(path), "data.sources")


@pytest.fixture(scope="module")
def saved(trained_run, tmp_path_factory):
    """A directory with a copy of one checkpoint, and the contents of the files with JSON."""
    _, workdir = trained_run
    directory = tmp_path_factory.mktemp("saved")
    shutil.copytree(pathlib.Path(workdir, "checkpoints/6"), directory / "6")
    return directory, {name: (directory / "6" / name).read_bytes() for name in (METADATA, BIAS)}


@pytest.fixture
def rewritten(saved):
    """A function that overwrites a file of the checkpoint until the end of the test."""
    directory, originals = saved

    def rewrite(name: str, data: bytes | str):
        data = data.encode() if isinstance(data, str) else data
        (directory / "6" / name).write_bytes(data)

    yield rewrite
    for name, data in originals.items():
        rewrite(name, data)


def read_all(directory):
    """All that commands read of a checkpoint."""
    found = SavedCheckpoint.open(directory)
    describe(found)
    found.params()
    found.router_bias()
    if "config" in found.extra:
        config_from_dict(found.extra["config"])
    if "buckets" in found.extra:
        BucketChooser([None]).remember(found.extra["buckets"])


@few
@hypothesis.given(st.data())
def test_metadata_of_checkpoints(saved, rewritten, data):
    directory, originals = saved
    original = originals[METADATA]
    kinds = altered(json.loads(original)).map(json.dumps) | damaged(original)
    rewritten(METADATA, data.draw(kinds))
    with contextlib.suppress(ConfigError):
        read_all(directory)


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "a/../../b", "..", "", "a\0b"])
def test_no_name_leads_out_of_the_checkpoint(saved, rewritten, name):
    directory, originals = saved
    metadata = json.loads(originals[METADATA])
    metadata["custom_metadata"]["leaves"][name] = "float32[1]"
    del metadata["custom_metadata"]["checksum"]
    rewritten(METADATA, json.dumps(metadata))
    with pytest.raises(UnreadableCheckpointError, match="must be a name of an array"):
        SavedCheckpoint.open(directory)


@few
@hypothesis.given(st.data())
def test_metadata_of_arrays(saved, rewritten, data):
    directory, originals = saved
    original = originals[BIAS]
    kinds = altered(json.loads(original)).map(json.dumps) | damaged(original)
    rewritten(BIAS, data.draw(kinds))
    try:
        SavedCheckpoint.open(directory).router_bias()
    except UnreadableCheckpointError as error:
        assert "the checkpoint of step 6" in str(error)


def test_no_flipped_bit_goes_unnoticed(saved):
    """One in any file: it is noticed, or it changed nothing."""
    directory, _ = saved
    whole, rng = SavedCheckpoint.open(directory), np.random.default_rng(0)
    files = sorted(path for path in (directory / "6").rglob("*") if path.is_file())
    noticed = 0
    for path in [*files, *rng.choice([directory / "6" / METADATA], 30)]:
        before = path.read_bytes()
        changed = bytearray(before)
        changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        try:
            found = SavedCheckpoint.open(directory)
            assert (found.leaves, found.extra) == (whole.leaves, whole.extra), path
            for name in found.leaves:
                if name in path.parts:
                    value = found.read(name).tobytes()
                    path.write_bytes(before)
                    assert value == whole.read(name).tobytes(), path
        except UnreadableCheckpointError:
            noticed += 1
        finally:
            path.write_bytes(before)
    assert noticed > len(files) / 2, noticed
