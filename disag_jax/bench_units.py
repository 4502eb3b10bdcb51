"""Times of the units of work on one device, against what its measured rates allow at best.

The floor of a unit is the larger of its model FLOPs over the rate of a large matrix product and its
least memory traffic over the rate of a copy, both measured in the same run. Recomputed activations
are no model FLOPs: a policy that recomputes cannot reach the floor of a backward unit. Of GPUs a
unit is timed under load too: as fast as it is where it does not stop.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from disag_jax.config import Config
from disag_jax.dispatch import Cotangent
from disag_jax.flops import FORWARD_AND_BACKWARD, model_flops
from disag_jax.geometry import Bucket, Geometry, buckets, make_geometry
from disag_jax.model import EXPERTS, POST_NORM, init_attention_layer, init_experts
from disag_jax.phases import Layouts
from disag_jax.shared_loss import SharedLoss
from disag_jax.timing import Figure, time_calls, time_under_load
from disag_jax.units import AttentionUnit, ExpertUnit
from layers import target
from layers.head import HeadParams
from mesh.m2n import slot_of_receiver
from mesh.roles import Role


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the device was measured to do: FLOP/s of a large product, bytes/s of a copy."""

    flops: float
    bytes: float

    def floor(self, flops: float, num_bytes: float) -> float:
        """The least milliseconds of this much work."""
        return 1e3 * max(flops / self.flops, num_bytes / self.bytes)


def measure(config: Config) -> list[Figure]:
    """The units of the config's first workers, and the rates that their floors come from."""
    rates, figures = measure_rates(config)
    return figures + measure_units(config, rates)


def measure_rates(config: Config) -> tuple[Rates, list[Figure]]:
    """The device's rates for the config's compute type."""
    is_gpu = target.is_gpu()
    size, num_bytes = (8192, 2**30) if is_gpu else (512, 2**25)
    dtype = jnp.dtype(config.run.compute_dtype.value)
    square = jax.random.normal(jax.random.key(0), (size, size), dtype)
    words = jnp.zeros(num_bytes // 4, jnp.int32)
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    matmul = time_calls(f"matrix product {size}^3", lambda: product(square, square))
    moved = time_calls(f"copy of {num_bytes >> 20} MiB", lambda: copy(words))
    rates = Rates(2e3 * size**3 / matmul.milliseconds, 2e3 * num_bytes / moved.milliseconds)
    facts = (f"{rates.flops / 1e12:.3g} TFLOP/s", f"{rates.bytes / 1e9:.3g} GB/s")
    return rates, [
        dataclasses.replace(figure, extra={"rate": fact})
        for figure, fact in zip((matmul, moved), facts, strict=True)
    ]


def measure_units(config: Config, rates: Rates) -> list[Figure]:
    """The units' times and floors."""
    bench = UnitBench.of(config)
    calls = bench.calls()
    figures = [bench.time(name, call, rates) for name, call in calls.items()]
    if not target.is_gpu():
        return figures
    # After all of them: a GPU that was under load has a lower clock for a while.
    return [time_under_load(figure, calls[figure.name]) for figure in figures]


class UnitBench:
    """The units of attention worker 0 and expert worker 0 of one layer, fed as in a pipeline."""

    @classmethod
    def of(cls, config: Config) -> "UnitBench":
        """Those in the smallest transport bucket that holds what the routing needs."""
        for bucket in buckets(config):
            bench = cls(make_geometry(config, bucket))
            if bench.fits:
                return bench
        raise AssertionError("the last bucket holds everything")

    def __init__(self, geometry: Geometry):
        g = self.g = geometry
        model = g.config.model
        self.attention, self.expert = AttentionUnit(g), ExpertUnit(g)
        self.layouts = dataclasses.replace(Layouts.of(g), colocated=False)
        key, dtype = jax.random.key(0), g.compute_dtype
        ids = np.concatenate(
            [g.places.place_experts()[: g.places.per_worker],
             model.num_experts + np.arange(model.num_shared_experts)]
        )  # fmt: skip
        self.attention_params = jax.jit(lambda: init_attention_layer(model, dtype, key, 0))()
        post_norm = self.attention_params[POST_NORM]

        def expert_rows():
            experts = init_experts(model, dtype, key, 0, jnp.asarray(ids))
            leaves = jax.tree.map(lambda leaf: leaf[None], {EXPERTS: experts})
            num_columns = self.layouts.num_columns(Role.EXPERT)
            return self.layouts[Role.EXPERT].pack(leaves, num_columns)

        # As in a pipeline: the experts' weights are read where they lie in a worker's rows.
        self.packed_experts = jax.jit(expert_rows)(), post_norm
        self.bias = jnp.zeros((g.E,), g.wide_dtype)
        self.h = [_draw(g, i, g.T, g.D) for i in range(g.M)]
        colocated = g.placement.colocated
        origin = None if colocated else jnp.zeros((g.R, g.C), jnp.int32)

        def forward(params, bias, h, rank):
            return self.attention.forward(params, bias, h, origin, rank)

        self.attention_forward = jax.jit(forward)
        outputs = [self._attend(i) for i in range(g.M)]
        self.kept, stats = outputs[0][1], outputs[0][2]
        slots = [0 if colocated else slot_of_receiver(i, 0, g.R) for i in range(g.M)]
        self.inbox = jax.tree.map(
            lambda *leaves: jnp.stack([x[s] for x, s in zip(leaves, slots, strict=True)]),
            *(message for message, _, _ in outputs),
        )
        self.expert_forward = jax.jit(
            lambda packed, inbox: self.expert.forward(self._expert_params(packed), inbox)
        )
        finished, self.expert_kept, needed = self.expert_forward(*self._expert_inputs())
        self.dy = finished.x
        self.fits = g.bucket.holds(Bucket(int(stats.rows_needed), int(needed)))
        self.pairs = int(jnp.sum(self.expert_kept.order.pair >= 0))

    def calls(self) -> dict:
        """A call of each unit, by name."""
        return {
            "attention forward": self._attend,
            "attention backward": self._attention_backward(),
            "expert forward": lambda: self.expert_forward(*self._expert_inputs()),
            "expert backward": self._expert_backward(),
            "loss, share of a worker": loss_call(self.g),
        }

    def time(self, name: str, call, rates: Rates) -> Figure:
        """The time of a unit's call, and its floor."""
        flops, num_bytes = self._work(name)
        figure = time_calls(name, call, floor_milliseconds=rates.floor(flops, num_bytes))
        rate = f"{flops / figure.milliseconds / 1e9:.3g} TFLOP/s"
        return dataclasses.replace(figure, extra={"rate": rate})

    def _work(self, name: str) -> tuple[float, float]:
        """(model FLOPs, least bytes moved) of a unit."""
        g, model = self.g, self.g.config.model
        per_token, size = model_flops(g.config), g.compute_dtype.itemsize
        attend = g.T * per_token.attention / model.num_layers / FORWARD_AND_BACKWARD
        experts = 6 * self.pairs * g.D * model.expert_width
        attention_size, expert_size = (
            sum(x.size for x in jax.tree.leaves(p))
            for p in (self.attention_params, self.expert.module.params)
        )
        rows, wide = g.M * g.C * g.D, 2 * np.dtype(g.wide_dtype).itemsize
        tokens = SharedLoss(g).own_tokens
        head = model.vocab_size * g.D
        # Forward reads weights and rows and writes rows; backward also reads and writes sums.
        return {
            "attention forward": (attend, (attention_size + 2 * g.T * g.D) * size),
            "attention backward": (
                2 * attend, attention_size * (size + wide) + 3 * g.T * g.D * size,
            ),
            "expert forward": (experts, (expert_size + 2 * rows) * size),
            "expert backward": (2 * experts, expert_size * (size + wide) + 3 * rows * size),
            "loss, share of a worker": (
                tokens * per_token.head, head * (size + wide) + 2 * tokens * g.D * size,
            ),
        }[name]  # fmt: skip

    def _attend(self, rank: int = 0):
        slot_rank = 0 if self.g.placement.colocated else rank
        return self.attention_forward(self.attention_params, self.bias, self.h[rank], slot_rank)

    def _expert_inputs(self):
        return self.packed_experts, self.inbox

    def _expert_params(self, packed):
        """The expert layer's parameters, as views of its packed row; to be called in a program."""
        rows, post_norm = packed
        return {**self.layouts.read(rows, Role.EXPERT, jnp.int32(0)), POST_NORM: post_norm}

    def _attention_backward(self):
        g = self.g
        cotangent = Cotangent(_draw(g, 1, g.R, g.C, g.D), jnp.ones((g.R, g.C, g.K), g.wide_dtype))
        scales = jnp.ones((2,), g.wide_dtype)

        def backward(params, kept, cotangent):
            dparams, dh_TD = self.attention.backward(params, kept, cotangent, 0, scales)
            return dparams, dh_TD, ()

        arguments = (self.attention_params, self.kept, cotangent)
        return self._accumulating(Role.ATTENTION, backward, arguments)

    def _expert_backward(self):
        def backward(packed, kept, dy):
            dparams, cotangent = self.expert.backward(self._expert_params(packed), kept, dy)
            dnorm = dparams.pop(POST_NORM)
            return dparams, cotangent, dnorm

        arguments = (self.packed_experts, self.expert_kept, self.dy)
        return self._accumulating(Role.EXPERT, backward, arguments)

    def _accumulating(self, role: Role, backward, arguments):
        """A call that runs a backward unit and adds its gradients to a layer's sums in place."""
        sums = jnp.zeros((2, self.layouts.num_columns(role)), self.g.wide_dtype)

        def run(sums, layer_row, arguments):
            dparams, *others = backward(*arguments)
            return self.layouts.add(sums, role, layer_row, dparams), others

        program = jax.jit(run, donate_argnums=0)

        def call():
            nonlocal sums
            sums, others = program(sums, jnp.int32(1), arguments)
            return others

        return call


def loss_call(geometry: Geometry):
    """A call that runs an owner's part of a micro-batch's loss, forward and backward."""
    g, loss = geometry, SharedLoss(geometry)
    tokens, vocab_size = loss.own_tokens, g.config.model.vocab_size
    weights = 0.02 * _draw(g, 2, vocab_size, g.D)
    head = HeadParams(jnp.ones((g.D,), g.compute_dtype), weights)
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, g.wide_dtype), head)
    labels = jnp.arange(tokens, dtype=jnp.int32) % vocab_size
    h_TD = _draw(g, 3, tokens, g.D)

    def run(sums, head, h_TD, labels):
        total, dh_TD, sums = loss.gradients(head, h_TD, labels, 1.0 / tokens, sums)
        return sums, (total, dh_TD)

    program = jax.jit(run, donate_argnums=0)

    def call():
        nonlocal sums
        sums, results = program(sums, head, h_TD, labels)
        return results

    return call


def _draw(geometry: Geometry, seed: int, *shape):
    return jax.random.normal(jax.random.key(seed), shape, geometry.compute_dtype)
