"""What the twin computes while its all-to-all is under way, by the dependences of its program."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from disag_jax import overlap
from disag_jax.chunks import Chunks
from disag_jax.config import Overlap, PlacementKind, SplitConfig
from disag_jax.dispatch import Message, message_template
from disag_jax.errors import RunError
from disag_jax.geometry import make_geometry
from tests import reference, support
from tests.test_compiled import COPY, loop_buffers


def config_of(**overlap):
    split = SplitConfig(
        attention_workers=2, expert_workers=2, placement=PlacementKind.COLOCATED,
        bucket_factors=(), **overlap,
    )  # fmt: skip
    return support.small_config(split, vocab_size=512, expert_width=96)


# GPUs keep optimization barriers until a program is scheduled, after copies are inserted; the CPU
# takes them out before.
KEEP_BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}

COLLECTIVES = ("all_to_all", "psum")
# Of the steady loop, which has both phases.
EXCHANGES = {"all_to_all_forward", "all_to_all_backward"}

BLOCKING = config_of()
CHUNKED = config_of(overlap=Overlap.CHUNKED, forward_chunks=4, backward_chunks=2)
REGROUPED = config_of(overlap=Overlap.CHUNKED, forward_chunks=2, backward_chunks=1)
INTERLEAVED = config_of(overlap=Overlap.INTERLEAVED)


def loop_with(config, scopes):
    """The body of the one loop whose collectives are in all these scopes, and no others'."""
    stepper = support.make_stepper(config)
    program = stepper.gradient_program(stepper.chooser.current)
    whole = program.trace(*stepper.abstract_arguments()).jaxpr.jaxpr
    (body,) = [
        jaxpr
        for jaxpr in support.subprograms(whole)
        if {scope(e) for e in jaxpr.eqns if e.primitive.name in COLLECTIVES} == scopes
    ]
    return body


def scope(equation) -> str:
    return str(equation.source_info.name_stack)


def piece(conditional) -> str:
    """The name of the piece of compute that a conditional holds, "" for none."""
    inside = {scope(e).split("/")[0] for b in conditional.params["branches"] for e in b.jaxpr.eqns}
    (name,) = inside - {""} or {""}
    return name


def free_pieces(config, scopes=EXCHANGES) -> list[tuple[str, list[str]]]:
    """Each collective of the loop, with the compute that neither feeds nor needs it."""
    equations = loop_with(config, scopes).eqns
    made_by = {id(var): i for i, e in enumerate(equations) for var in e.outvars}
    needs = []
    for equation in equations:
        inputs = {made_by[id(var)] for var in equation.invars if id(var) in made_by}
        needs.append(inputs.union(*(needs[i] for i in inputs)))
    found = []
    for collective, equation in enumerate(equations):
        if equation.primitive.name in COLLECTIVES:
            free = [
                piece(other)
                for i, other in enumerate(equations)
                if other.primitive.name == "cond"
                and i not in needs[collective]
                and collective not in needs[i]
            ]
            found.append((scope(equation).removeprefix("all_to_all_"), free))
    return found


def test_the_blocking_twin_waits_for_each_exchange_to_its_experts():
    *_, last = forward = [free for name, free in free_pieces(BLOCKING) if name == "forward"]
    backward = [free for name, free in free_pieces(BLOCKING) if name == "backward"]
    assert len(forward) == len(backward) == 2
    assert forward[0] == backward[0] == backward[1] == []
    # What the forward phase ends with is not used before the next period.
    assert "expert_backward" in last


def test_each_interleaved_exchange_has_a_piece_of_the_other_phase():
    assert free_pieces(INTERLEAVED) == [
        ("backward", ["attention_forward"]),
        ("forward", ["expert_backward"]),
        ("backward", ["expert_forward"]),
        ("forward", ["attention_backward"]),
    ]


def test_each_exchange_between_chunks_has_the_work_on_one():
    forward, backward = (
        [free for name, free in free_pieces(CHUNKED) if name == way]
        for way in ("forward", "backward")
    )
    assert len(forward) == 2 + 4 and len(backward) == 2 + 2
    assert forward[0] == [] and all("expert_forward" in free for free in forward[1:-1])
    assert backward[0] == backward[-1] == []
    assert all(free == ["expert_backward"] for free in backward[1:-1])


def test_attention_gradients_are_summed_under_the_attention_of_the_layer_below():
    *exchanges, (name, free) = free_pieces(INTERLEAVED, {"all_to_all_backward", "reduce_gradients"})
    assert [way for way, _ in exchanges] == ["backward", "backward"]
    assert name == "reduce_gradients" and free == ["attention_backward"]


@pytest.mark.parametrize(
    "config, synchronous",
    [(REGROUPED, "all_to_all_forward (all but 2)"),
     (INTERLEAVED, "all_to_all_forward, all_to_all_backward")],
    ids=["chunked", "interleaved"],
)  # fmt: skip
def test_no_whole_buffer_is_copied_in_the_loop(config, synchronous):
    stepper = support.make_stepper(config)
    program = stepper.gradient_program(stepper.chooser.current)
    lowered = program.lower(*stepper.abstract_arguments())
    text = lowered.compile(compiler_options=KEEP_BARRIERS).as_text()
    assert "opt-barrier" in text
    loops, _ = text.split("\nENTRY ")
    copied = {found.group(1) for found in COPY.finditer(loops)}
    for name, shape in loop_buffers(stepper).items():
        assert shape in loops, f"{name} {shape} must be in the loop for this to mean anything"
        assert shape not in copied, f"{name} {shape} is copied in the loop"
    # On the CPU collectives are synchronous, which the check of GPU programs sees.
    with pytest.raises(RunError, match=re.escape(f"must span a conditional: {synchronous}") + "$"):
        overlap.check_program(text, config.split)


@pytest.mark.parametrize("overlapping", [CHUNKED, INTERLEAVED], ids=["chunked", "interleaved"])
def test_an_evaluation_that_overflows_is_run_again_in_a_larger_bucket(overlapping):
    split = dataclasses.replace(overlapping.split, bucket_factors=(1.0,))
    config = support.small_config(split, 2, top_k=1)
    stepper, params = support.make_stepper(config), support.oracle_params(config)
    bias = np.zeros((config.model.num_layers, config.model.num_experts))
    bias[:, 4] = 10.0  # every token's only choice
    sequences = support.random_sequences(config)
    metrics = stepper.evaluate(support.place_state(stepper, params, bias), sequences)
    assert metrics["bucket_reruns"] == 1 and metrics["bucket"] == stepper.chooser.options[-1]
    _, aux = reference.loss(config, params, bias, sequences)
    assert support.relative_error(metrics["loss"], aux["cross_entropy"]) < 1e-10


@pytest.mark.parametrize("count", [1, 2, 8])
def test_chunks_are_dealt_and_joined_again(count):
    geometry = make_geometry(CHUNKED)
    rng = np.random.default_rng(0)
    template = message_template(geometry)
    message = Message(
        *(rng.integers(1, 99, (geometry.R, *leaf.shape)).astype(leaf.dtype) for leaf in template)
    )
    chunks = Chunks(geometry, message_template, count)
    words = chunks.encode(message)
    assert len(words) == count
    jax.tree.map(np.testing.assert_array_equal, chunks.decode(words), message)
    last = chunks.codec.decode(words[-1]).origin
    np.testing.assert_array_equal(last, message.origin[:, count - 1 :: count])
