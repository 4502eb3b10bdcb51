"""On one or two GPUs: exact in float64, as close as a plain model in bfloat16, learning, in place.

JAX_PLATFORMS=cuda python -m pytest -m gpu tests/test_gpu.py
"""

import dataclasses
import functools
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from disag_jax import parts, plain_model, verify
from disag_jax.config import (
    BatchConfig,
    Dtype,
    ModelConfig,
    Overlap,
    PlacementKind,
    Recompute,
    SplitConfig,
)
from disag_jax.inputs import load_inputs
from layers import head, softmax_hopper, target
from layers.attention import AttentionKernel, causal_attention
from layers.grouped_matmul import (
    GroupWeights,
    PairProduct,
    PairWeights,
    WeightGradient,
    multiply_by_group,
    multiply_by_pair,
    order_by_expert,
    sorted_rows,
    tile_rows,
)
from tests import launching, reference, support

pytestmark = pytest.mark.gpu

PAIR = SplitConfig(stages=1, attention_workers=1, expert_workers=1, bucket_factors=())
TWIN = SplitConfig(
    attention_workers=2, expert_workers=2, bucket_factors=(), placement=PlacementKind.COLOCATED
)
CHUNKED = dataclasses.replace(TWIN, overlap=Overlap.CHUNKED, forward_chunks=4, backward_chunks=4)
INTERLEAVED = dataclasses.replace(TWIN, overlap=Overlap.INTERLEAVED)
ONE = dataclasses.replace(TWIN, attention_workers=1, expert_workers=1)


@pytest.fixture(autouse=True)
def needs_a_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")


def needs(split):
    if len(jax.devices()) < split.num_devices:
        pytest.skip(f"needs {split.num_devices} GPUs")


def gradients(config, params, sequences):
    needs(config.split)
    stepper = support.make_stepper(config)
    state = support.place_state(stepper, params, reference.init_router_bias(config))
    metrics, grads, _ = support.run_pipeline(stepper, state, sequences)
    return metrics, grads


def oracle_gradients(config, params, sequences):
    oracle = jax.jit(functools.partial(reference.loss_and_grads, config))
    (total, _), grads = oracle(params, reference.init_router_bias(config), sequences)
    return float(total), jax.device_get(grads)


SPLITS = {
    "hop 1": PAIR,
    "hop 2": dataclasses.replace(PAIR, hop=2),
    "co-located": TWIN,
    "co-located, experts on each": dataclasses.replace(TWIN, expert_workers=1),
    "co-located, two stages": dataclasses.replace(
        TWIN, stages=2, attention_workers=1, expert_workers=1
    ),
    "co-located, one device": ONE,
    "co-located, in chunks": CHUNKED,
    "co-located, in other chunks back": dataclasses.replace(CHUNKED, backward_chunks=2),
    "co-located, interleaved": INTERLEAVED,
}


@pytest.mark.parametrize("name", SPLITS)
def test_float64_equals_the_oracle(name):
    split = SPLITS[name]
    config = support.small_config(split, 5, num_layers=3, num_shared_experts=1)
    params, sequences = support.oracle_params(config), support.random_sequences(config)
    metrics, grads = gradients(config, params, sequences)
    total, expected = oracle_gradients(config, params, sequences)
    assert support.relative_error(metrics["total_loss"], total) < 1e-10
    errors = jax.tree.map(support.relative_error, grads, expected)
    assert max(jax.tree.leaves(errors)) < 1e-10, errors


@pytest.fixture
def few_processors(monkeypatch):
    """Kernels have few shares, so that each has several blocks, or rows."""
    monkeypatch.setattr(target, "num_processors", lambda: 1)


@pytest.mark.usefixtures("few_processors")
@pytest.mark.parametrize("num_weights", [1, 2], ids=["one", "pair"])
@pytest.mark.parametrize("outer", [320, 384, 1408])
def test_hopper_kernels_equal_the_portable_product(num_weights, outer):
    """Empty, tiny and large groups, unused tiles, widths that are not whole blocks."""
    counts = np.array([0, 1, 127, 128, 129, 700, 0, 40])
    ids = np.random.default_rng(0).permutation(np.repeat(np.arange(counts.size), counts))
    num_sorted = sorted_rows(ids.size + 300, counts.size, tile_rows())
    order, _ = order_by_expert(
        jnp.asarray(ids, jnp.int32)[:, None], counts.size, num_sorted, tile_rows()
    )
    keys = jax.random.split(jax.random.key(0), 4)
    draw = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)  # noqa: E731
    real = order.pair[:, None] >= 0
    x = jnp.where(real, draw(keys[0], num_sorted, 192), 0)
    dy = jnp.where(real, draw(keys[2], num_weights, num_sorted, outer), 0)

    # The weights lie among others in a stack, and their gradients are added to what is there.
    stack = draw(keys[1], 2 * counts.size + 3, 192, outer)
    firsts = [counts.size + 2, 1][:num_weights]
    sums = jax.random.normal(keys[3], (num_weights * counts.size + 3, 192, outer), jnp.float32)

    def all_products(dtype, x, stack, dy, sums, firsts):
        stack, x, dy = stack.astype(dtype), x.astype(dtype), dy.astype(dtype)
        views = [GroupWeights(stack, first, counts.size) for first in firsts]

        def product(x):
            if num_weights == 1:
                return (multiply_by_group(x, *views, order.half_expert),)
            return multiply_by_pair(x, PairWeights.of(*views), order.half_expert)

        y, vjp = jax.vjp(product, x)
        used = jnp.repeat(order.half_expert < counts.size, tile_rows() // 2)[:, None]
        wide = jnp.float32 if dtype == jnp.bfloat16 else dtype
        added, written = jnp.asarray(sums, wide), []
        for which in range(num_weights):
            gradient = WeightGradient(x, dy[which], order.half_expert, counts.size)
            place = 1 + which * counts.size
            if gradient.adds_in_place(wide):
                added = gradient.add_to(added, jnp.int32(place))
            else:
                added = added.at[place : place + counts.size].add(gradient.dense(wide))
            written.append(gradient.dense(dtype))
        dx = vjp(tuple(dy))[0]
        rows = jnp.where(used, jnp.stack(y), 0), jnp.where(used, dx, 0)
        return *rows, jnp.stack(written), added - sums

    arguments = (x, stack, dy, sums, jnp.array(firsts, jnp.int32))
    # What is written is made in memory that held something else.
    jax.block_until_ready(jnp.full((2**26,), jnp.nan))
    kernels = jax.jit(all_products, static_argnums=0)(jnp.bfloat16, *arguments)
    exact = jax.jit(all_products, static_argnums=0)(jnp.float64, *arguments)
    tolerances = (4e-3, 4e-3, 4e-3, 1e-5)
    for kernel, expected, tolerance in zip(kernels, exact, tolerances, strict=True):
        assert support.relative_error(np.asarray(kernel, np.float64), expected) < tolerance
    written, added = map(np.asarray, kernels[2:])
    assert not written[:, counts == 0].any()
    assert not added[0].any() and not added[-2:].any()


@pytest.mark.parametrize("outer", [320, 1408])
def test_a_pair_is_written_where_it_is_kept(outer):
    """By bits, into rows of a buffer of words, and nothing beside them is changed."""
    counts, first = np.array([0, 130, 1, 0, 300]), 24
    ids = np.repeat(np.arange(counts.size), counts)
    num_sorted = sorted_rows(ids.size + 300, counts.size, tile_rows())
    order, _ = order_by_expert(
        jnp.asarray(ids, jnp.int32)[:, None], counts.size, num_sorted, tile_rows()
    )
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (num_sorted, 192), jnp.bfloat16)
    stack = jax.random.normal(keys[1], (2 * counts.size, 192, outer), jnp.bfloat16)
    words = jnp.full((first + 2 * num_sorted + 8, outer), 7, jnp.uint16)

    @jax.jit
    def both_ways(x, stack, words, first):
        views = [GroupWeights(stack, jnp.int32(i * counts.size), counts.size) for i in range(2)]
        product = PairProduct(x, PairWeights.of(*views), order.half_expert)
        assert product.writes_in_place(words.dtype)
        return product.dense(), product.write_to(words, first)

    expected, found = map(np.asarray, both_ways(x, stack, words, jnp.int32(first)))
    np.testing.assert_array_equal(found[:first], 7)
    np.testing.assert_array_equal(found[-8:], 7)
    found = found[first:-8].reshape(2, num_sorted, outer)
    used = np.repeat(np.asarray(order.half_expert) < counts.size, tile_rows() // 2)
    np.testing.assert_array_equal(found[:, used], expected.view(np.uint16)[:, used])


@pytest.mark.usefixtures("few_processors")
@pytest.mark.parametrize("vocab_size", [512, 32_000, 49_152])
def test_the_kernel_of_the_loss_equals_the_formula(vocab_size):
    """Row by row; more rows than are loaded ahead, and not as many for each share."""
    num_rows = 1500
    keys = jax.random.split(jax.random.key(0), 3)
    logits = 2 * jax.random.normal(keys[0], (num_rows, vocab_size), jnp.float32)
    label = jax.random.randint(keys[1], (num_rows,), 0, vocab_size, jnp.int32)
    label = label.at[:4].set(jnp.array([0, vocab_size - 1, 255, 256], jnp.int32))
    weight = jax.random.uniform(keys[2], (num_rows,), jnp.float32).at[4].set(0)
    assert head.has_kernel(vocab_size, jnp.bfloat16)
    bfloat16 = jnp.dtype("bfloat16")
    nll, gradient = softmax_hopper.nll_and_gradient(logits, label, weight, bfloat16)

    log_probability = jax.nn.log_softmax(logits.astype(jnp.float64))
    is_label = jnp.arange(vocab_size) == label[:, None]
    expected = (jnp.exp(log_probability) - is_label) * weight[:, None]
    np.testing.assert_allclose(nll, -log_probability[jnp.arange(num_rows), label], rtol=1e-5)
    # Rounded once: half a unit of the last of eight digits, and a little for the exponential.
    off = jnp.abs(gradient.astype(jnp.float64) - expected)
    assert float(jnp.max(off - 1.01 * 2**-8 * jnp.abs(expected))) <= 1e-12


@pytest.mark.parametrize("num_documents", [None, 8])
def test_cudnn_attention_equals_einsum(num_documents):
    shape, segments = (2, 1024), None
    if num_documents:
        drawn = np.random.default_rng(0).integers(num_documents, size=shape)
        segments = jnp.asarray(np.sort(drawn, axis=1))
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, dout = (
        jax.random.normal(key, (*shape, heads, 64), jnp.bfloat16)
        for key, heads in zip(keys, (8, 2, 2, 8), strict=True)
    )

    @functools.partial(jax.jit, static_argnums=0)
    def both(kernel, dout, *qkv):
        out, vjp = jax.vjp(lambda *qkv: causal_attention(*qkv, kernel, segments).out, *qkv)
        return out, *vjp(dout)

    @functools.partial(jax.jit, static_argnums=0)
    def again(kernel, dout, *qkv):
        kept = causal_attention(*qkv, kernel, segments)
        attend = lambda *qkv: causal_attention(*qkv, kernel, segments, kept).out  # noqa: E731
        return kept.out, *jax.vjp(attend, *qkv)[1](dout)

    pairs = zip(
        again(AttentionKernel.CUDNN, dout, q, k, v),
        both(AttentionKernel.CUDNN, dout, q, k, v),
        both(AttentionKernel.EINSUM, dout, q, k, v),
        strict=True,
    )
    for *actual, expected in pairs:
        for x in actual:
            assert support.relative_error(np.asarray(x, float), np.asarray(expected, float)) < 6e-3


def bfloat16_config(split=PAIR):
    """Large enough for cuDNN attention with grouped queries and for whole tiles."""
    config = support.small_config(split, 2)
    config.run.recompute = Recompute.NONE
    config.model = ModelConfig(
        vocab_size=512, num_layers=4, d_model=256, num_heads=8, num_kv_heads=2, head_dim=64,
        num_experts=8, top_k=2, expert_width=256, balance_loss_weight=0.01, z_loss_weight=1e-3,
    )  # fmt: skip
    config.batch = BatchConfig(sequence_length=256, tokens_per_worker=1024, micro_batches=2)
    config.run = dataclasses.replace(config.run, compute_dtype=Dtype.BFLOAT16, loss_chunk=256)
    return config.validate()


def plain_gradients(config, params, batch):
    """Gradients of the mean cross-entropy by autodiff of the one-device model in bfloat16."""
    bias = reference.init_router_bias(config).astype(jnp.float32)

    def loss(params):
        logits = plain_model.logits(config, params, bias, batch.tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    return jax.device_get(jax.jit(jax.grad(loss))(params))


def distance(grads, expected):
    """Norm of the difference of two trees over the norm of the second."""
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True)
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    difference = sum(np.sum((a - b) ** 2) for a, b in pairs)
    return np.sqrt(difference / sum(np.sum(b**2) for _, b in pairs))


# The most that bfloat16 may be off, of all gradients and of those of one parameter: the plain model
# is made of the same layers, and cannot show what they do wrong.
MOST_OFF, MOST_OFF_IN_A_LEAF = 0.05, 0.15


def check_as_close(ours, plain, expected):
    """At most 1.5 times as far as the plain model, and as far as bfloat16 itself can be."""
    found = distance(ours, expected), distance(plain, expected)
    print("\nours {:.4f}, plain {:.4f}".format(*found))
    assert found[0] <= min(1.5 * found[1], MOST_OFF)
    leaves = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(ours), strict=True)
    off = {jax.tree_util.keystr(path): distance(x, exact) for (path, exact), x in leaves}
    assert max(off.values()) <= MOST_OFF_IN_A_LEAF, off


BFLOAT16_SPLITS = {"disaggregated": PAIR, "co-located": TWIN, "one device": ONE}


@pytest.mark.parametrize("split", BFLOAT16_SPLITS.values(), ids=BFLOAT16_SPLITS)
def test_bfloat16_is_as_close_as_a_plain_model(split):
    config = bfloat16_config(split)
    config.model = dataclasses.replace(config.model, balance_loss_weight=0.0, z_loss_weight=0.0)
    params, sequences = support.oracle_params(config), support.random_sequences(config)
    _, expected = oracle_gradients(config, params, sequences)  # in float64
    plain = plain_gradients(config, params, sequences)
    _, ours = gradients(
        config, jax.tree.map(lambda x: np.asarray(x, np.float32), params), sequences
    )
    check_as_close(ours, plain, expected)


@pytest.mark.parametrize("split", [PAIR, ONE], ids=["disaggregated", "one device"])
def test_twenty_steps_learn_real_text(split):
    needs(split)
    config = bfloat16_config(split)
    config.optimizer = dataclasses.replace(config.optimizer, peak_learning_rate=1e-3)
    stepper, batches = support.make_stepper(config), load_inputs(config).train
    state, losses = stepper.init(0), []
    for step in range(config.run.num_steps):
        state, metrics = stepper.train_step(state, stepper.read_batch(batches, step))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 1, losses


def test_a_process_for_each_gpu_trains_like_one_for_both(tmp_path):
    needs(PAIR)
    config_file = launching.write_config(tmp_path)
    dtype = "--config.run.compute_dtype=float32"

    def losses(*gpus):
        environments = [
            {"CUDA_VISIBLE_DEVICES": gpu, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"} for gpu in gpus
        ]
        records = launching.launch(
            config_file, tmp_path / f"{len(gpus)}", len(gpus), *launching.PAIR, dtype,
            devices=0, environments=environments,
        )  # fmt: skip
        return launching.losses(records)

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:2]
    one, two = losses(",".join(visible)), losses(*visible)
    assert len(one) == 4 and two == pytest.approx(one, rel=1e-4)


SPLITS_OF_FOUR = {
    "2 + 2, hop 2": (("attention_workers", 2), ("expert_workers", 2), ("hop", 2)),
    "1 + 3": (("expert_workers", 3),),
    "3 + 1": (("attention_workers", 3), ("expert_workers", 1)),
    "two stages": (("stages", 2), ("expert_workers", 1)),
}


def test_four_parts_of_a_gpu_train_as_one_worker(tmp_path):
    """Splits of four workers, each with a part of the GPU, on the batches of one that has all."""
    if shutil.which(parts.CONTROL) is None:
        pytest.skip("needs MPS")
    config_file = launching.write_config(tmp_path)
    common = ("--config.run.compute_dtype=float32", "--config.model.num_layers=2")
    alone = ("placement=colocated", "stages=1", "attention_workers=1", "expert_workers=1")

    def flags(num_attention_workers, *split):
        micro_batches = 12 // num_attention_workers
        return (
            *common, f"--config.batch.micro_batches={micro_batches}",
            *(f"--config.split.{one}" for one in split),
        )  # fmt: skip

    memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    expected = launching.losses(
        launching.launch(
            config_file, tmp_path / "one", 1, *flags(1, *alone), devices=0, environments=[memory]
        )
    )
    assert len(expected) == 4
    for name, split in SPLITS_OF_FOUR.items():
        split = {"stages": 1, "attention_workers": 1} | dict(split)
        workdir = tmp_path / name
        command = [
            sys.executable, "-m", "disag_jax.parts", "--parts=4", "--", "train.py",
            f"--config={config_file}", f"--workdir={workdir}",
            *flags(split["attention_workers"], *(f"{k}={v}" for k, v in split.items())),
        ]  # fmt: skip
        with subprocess.Popen(
            command, env=os.environ | memory, stderr=subprocess.PIPE, text=True
        ) as training:
            try:
                said = training.communicate(timeout=180)[1]
            except subprocess.TimeoutExpired:
                training.terminate()  # it ends its parts, and what serves them
                said = training.communicate()[1]
        assert training.returncode == 0, (name, said[-2000:])
        losses = launching.losses(launching.read_records(workdir))
        assert losses == pytest.approx(expected, rel=1e-4), name


@pytest.mark.parametrize("name", ["PAIR", "TWIN", "ONE"])
def test_equal_runs_are_bitwise_equal_if_asked(name):
    """In two processes: the flag counts when JAX starts, and each chooses its kernels."""
    needs(globals()[name])
    command = [sys.executable, "-c", HASH_OF_A_RUN.replace("SPLIT", name)]
    environment = {**os.environ, "XLA_FLAGS": "", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    hashes = []
    for _ in range(2):
        found = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr[-2000:]
        hashes.append(found.stdout.splitlines()[-1])
    assert len(hashes[0]) == 64 and hashes[0] == hashes[1]


def test_a_step_waits_for_nothing_that_other_streams_run():
    """Of such a shape, and with as many queues as CUDA takes by itself, it did (docs/design.md)."""
    pytest.importorskip("torch")
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-c", STEP_BESIDE_HELD_PROCESSORS]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert found.returncode == 0, found.stderr[-2000:]


STEP_BESIDE_HELD_PROCESSORS = """
from mesh import runtime
runtime.start(0)
from benchmarks.held_processors import Holder
from configs import balanced
from tests import support, test_gpu
config = balanced.get_config()
config.split, config.model.num_layers, config.batch.micro_batches = test_gpu.ONE, 2, 8
# The process of the tests has taken three quarters of the memory.
config.model.num_experts = 16
stepper = support.make_stepper(config.validate())
batch = support.random_sequences(config)
state, holder = stepper.init(0), Holder(milliseconds=60)
for is_held in (False, False, False, True):
    if is_held:
        holder.hold(2, kernels=12)
    state, _ = stepper.train_step(state, batch)
    state.wait()
holder.wait()
"""


@pytest.mark.parametrize("name", ["PAIR", "TWIN"])
def test_a_resumed_run_equals_the_whole_one(name, tmp_path, monkeypatch):
    """Bit for bit, with checkpoints that GPUs wrote and read."""
    needs(globals()[name])
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    config = bfloat16_config(globals()[name])
    assert "equal" in verify.verify_resume(config, tmp_path, 4, "--deterministic")


HASH_OF_A_RUN = """
import hashlib
from mesh import runtime
runtime.start(0, deterministic=True)
import jax, numpy as np
from tests import support, test_gpu
config = test_gpu.bfloat16_config(test_gpu.SPLIT)
stepper = support.make_stepper(config)
batch = support.random_sequences(config)
state, digest = stepper.init(0), hashlib.sha256()
for _ in range(5):
    state, metrics = stepper.train_step(state, batch)
for leaf in jax.tree.leaves(state.masters):
    for shard in leaf.addressable_shards:
        digest.update(np.asarray(shard.data).tobytes())
digest.update(np.asarray(metrics["loss"]).tobytes())
print(digest.hexdigest())
"""


def test_a_gpu_that_lacks_memory_ends_the_process_of_both():
    """XLA has the other one wait for it, by default for ever."""
    needs(PAIR)
    environment = {
        **os.environ,
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.1",
        "XLA_FLAGS": "--xla_gpu_nccl_termination_timeout_seconds=15",
    }
    command = [sys.executable, "-c", LACKS_MEMORY]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert "begins" in found.stdout and "ends" not in found.stdout
    assert found.returncode and "ran out of memory" in found.stderr, found.stderr[-2000:]


LACKS_MEMORY = """
from mesh import runtime
runtime.start(0)
import jax, jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
devices = jax.devices()[:2]
limit = devices[1].memory_stats()["bytes_limit"]
ballast = jax.device_put(jnp.zeros(int(0.9 * limit), jnp.uint8), devices[1])

def sorted_sum(x):
    many = jnp.sin(jnp.arange(0.05 * limit, dtype=jnp.float32) + x)
    return jax.lax.psum(jnp.sort(many)[:1], "both")

mesh = Mesh(devices, "both")
specs = dict(in_specs=PartitionSpec("both"), out_specs=PartitionSpec())
program = jax.shard_map(sorted_sum, mesh=mesh, **specs)
print("begins", flush=True)
jax.block_until_ready(jax.jit(program)(jnp.zeros(2)))
print("ends", flush=True)
"""
