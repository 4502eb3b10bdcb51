"""What the compiler makes of the loop: large buffers are updated in place."""

import math
import re

import jax
import numpy as np
import pytest

from disag_jax.config import SplitConfig
from disag_jax.pipeline import make_phases
from mesh.roles import Role
from tests import support

COPY = re.compile(r"= (\w+\[[\d,]*\])\S* copy\(")


def compile_program(num_layers):
    split = SplitConfig(stages=2, attention_workers=1, expert_workers=3)
    config = support.small_config(
        split, 8, num_layers=num_layers, vocab_size=512, expert_width=96, num_shared_experts=1
    )
    stepper = support.make_stepper(config)
    program = stepper.gradient_program(stepper.chooser.current)
    return stepper, program.lower(*stepper.abstract_arguments()).compile()


@pytest.fixture(scope="module")
def compiled():
    return compile_program(num_layers=4)


def loop_buffers(stepper):
    """Shapes in HLO of what lives in the loop's carry for the whole step."""
    config, layouts = stepper.config, stepper.manager.layouts
    geometry = stepper.manager.geometry
    pool = make_phases(geometry, stepper.schedule).pool
    wide = f"f{8 * np.dtype(geometry.wide_dtype).itemsize}"
    widths = {"row gradients": layouts.worker_columns}
    if config.split.colocated:
        widths = {f"{role.label} row gradients": layouts.num_columns(role) for role in Role}
    return {
        **{name: f"{wide}[{config.layers_per_stage},{width}]" for name, width in widths.items()},
        "stash": f"u{8 * geometry.compute_dtype.itemsize}[{pool.num_blocks},1024]",
        "head gradients": f"{wide}[{config.model.vocab_size},{config.model.d_model}]",
    }


def test_gradients_and_state_are_made_where_the_last_ones_were(compiled):
    stepper, program = compiled
    gradients = stepper.manager.abstract_gradients()
    assert program.memory_analysis().alias_size_in_bytes >= shard_bytes(gradients)
    state = stepper.manager.abstract_state()
    for name, lowered in stepper.manager.lower_updates().items():
        updated = (state.params[name], state.opt_state[name])
        analysis = lowered.compile().memory_analysis()
        copies = analysis.output_size_in_bytes - shard_bytes(updated)
        assert copies > 0
        assert analysis.alias_size_in_bytes >= shard_bytes(updated) + 0.99 * copies, name


def shard_bytes(tree) -> int:
    """Bytes of a tree of ShapeDtypeStructs on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def test_no_whole_buffer_is_copied_in_the_loop(compiled):
    stepper, program = compiled
    inside, in_loop, anywhere = False, [], []
    for line in program.as_text().splitlines():
        if line and not line.startswith(" "):
            inside = not line.startswith("ENTRY")  # loops and conditionals are functions of ENTRY
        found = COPY.search(line)
        if found:
            (in_loop if inside else anywhere).append(found.group(1))
    buffers = loop_buffers(stepper)
    text = program.as_text()
    for name, shape in buffers.items():
        assert shape in text, (
            f"{name} {shape} must be in the program for this test to mean anything"
        )
        assert shape not in in_loop, f"{name} {shape} is copied in the loop"
    assert buffers["row gradients"] not in anywhere, "row gradients are copied at the step's end"


def test_more_layers_need_temporary_memory_for_their_stash_alone(compiled):
    """A copy of the weights or their gradients would grow with the layers too."""
    few, many = compiled, compile_program(num_layers=12)

    def stash(stepper):
        return make_phases(stepper.manager.geometry, stepper.schedule).pool.num_bytes

    def temporary(program):
        return program.memory_analysis().temp_size_in_bytes

    def row_gradients(stepper):
        wide = np.dtype(stepper.manager.geometry.wide_dtype).itemsize
        return stepper.config.layers_per_stage * stepper.manager.layouts.worker_columns * wide

    grown = temporary(many[1]) - temporary(few[1]) - (stash(many[0]) - stash(few[0]))
    layers = row_gradients(many[0]) - row_gradients(few[0])
    print(f"{grown} bytes more beside the stash, for {layers} bytes more of row gradients")
    assert grown < 0.25 * layers


def test_transfers_are_outside_of_divergent_conditionals(compiled):
    """A permute in a branch that only some workers take would deadlock."""
    _, program = compiled
    permutes = [line for line in program.as_text().splitlines() if " collective-permute" in line]
    assert permutes
    scopes = [re.search(r'op_name="([^"]*)"', line).group(1) for line in permutes]
    for scope in scopes:
        if "m2n_" in scope:
            assert "cond" not in scope, scope
        else:
            assert "loss" in scope, scope
