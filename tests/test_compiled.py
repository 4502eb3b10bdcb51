"""What the compiler makes of the loop: large buffers are updated in place."""

import re

import numpy as np
import pytest

from disag_jax.config import SplitConfig
from disag_jax.phases import Phases
from tests import support

COPY = re.compile(r"= (\w+\[[\d,]*\])\S* copy\(")


@pytest.fixture(scope="module")
def compiled():
    split = SplitConfig(stages=2, attention_workers=1, expert_workers=3)
    config = support.small_config(split, 8, num_layers=4, vocab_size=512)
    stepper = support.make_stepper(config)
    program = stepper.gradient_program(stepper.chooser.current)
    state = stepper.init(0)
    batch = stepper.place_batch(support.random_sequences(config))
    return stepper, program.lower(state.rows, state.vocabulary, state.router_bias, batch).compile()


def loop_buffers(stepper):
    """Shapes in HLO of what lives in the loop's carry for the whole step."""
    config, layouts = stepper.config, stepper.manager.layouts
    geometry = stepper.manager.geometry
    pool = Phases(geometry, stepper.schedule).pool
    wide = f"f{8 * np.dtype(geometry.wide_dtype).itemsize}"
    return {
        "row gradients": f"{wide}[{config.layers_per_stage},{layouts.num_columns}]",
        "stash": f"u{8 * geometry.compute_dtype.itemsize}[{pool.num_blocks},1024]",
        "head gradients": f"{wide}[{config.model.vocab_size},{config.model.d_model}]",
    }


def test_no_whole_buffer_is_copied_in_the_loop(compiled):
    stepper, program = compiled
    inside, copied = False, []
    for line in program.as_text().splitlines():
        if line and not line.startswith(" "):
            inside = not line.startswith("ENTRY")  # loops and conditionals are functions of ENTRY
        found = COPY.search(line)
        if inside and found:
            copied.append(found.group(1))
    buffers = loop_buffers(stepper)
    text = program.as_text()
    for name, shape in buffers.items():
        assert shape in text, (
            f"{name} {shape} must be in the program for this test to mean anything"
        )
        assert shape not in copied, f"{name} {shape} is copied"


def test_temporary_memory_is_the_carry_and_a_little_more(compiled):
    stepper, program = compiled
    geometry = stepper.manager.geometry
    phases = Phases(geometry, stepper.schedule)
    wide, compute = np.dtype(geometry.wide_dtype).itemsize, geometry.compute_dtype.itemsize
    rows = stepper.config.layers_per_stage * stepper.manager.layouts.num_columns
    vocabulary = 2 * stepper.config.model.vocab_size * stepper.config.model.d_model
    boxes = (phases.message.num_words + phases.cotangent.num_words) * geometry.R * compute
    carry = (rows + vocabulary) * (wide + compute) + phases.pool.num_bytes + 4 * boxes
    temporary = program.memory_analysis().temp_size_in_bytes
    assert temporary < 1.5 * carry, (temporary, carry)


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
