"""The check before training that a step fits the devices."""

import jax
import pytest

from disag_jax import memory
from disag_jax.config import ConfigError, PlacementKind, SplitConfig
from tests import support

PAIR = SplitConfig(attention_workers=1, expert_workers=1, bucket_factors=())
TWIN = SplitConfig(
    attention_workers=2, expert_workers=2, bucket_factors=(), placement=PlacementKind.COLOCATED
)


@pytest.mark.parametrize("split, kinds", [
    (PAIR, {"attention worker", "expert worker"}), (TWIN, {"worker"}),
])  # fmt: skip
def test_needed_bytes_are_those_of_the_arrays_and_the_program(split, kinds):
    stepper = support.make_stepper(support.small_config(split, 2))
    program = stepper.compiled_program(stepper.chooser.current)
    needed = memory.needed_bytes(stepper.manager, program)
    assert set(needed) == kinds == {stepper.meshes.placement.kind_of(w) for w in (0, 1)}
    state = stepper.init(0)
    held = {device: 0 for device in stepper.meshes.union.devices.flat}
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    analysis = program.memory_analysis()
    for worker, device in enumerate(stepper.meshes.union.devices.flat):
        of_program = needed[stepper.meshes.placement.kind_of(worker)] - held[device]
        assert of_program >= analysis.temp_size_in_bytes + analysis.argument_size_in_bytes


def test_missing_bytes_are_told_by_role():
    needed = {"attention worker": 3 << 30, "expert worker": 5 << 30}
    memory.check(needed, {})
    memory.check(needed, {kind: 5 << 30 for kind in needed})
    with pytest.raises(ConfigError) as error:
        memory.check(needed, {kind: 4 << 30 for kind in needed})
    assert "expert worker: 5.00 GiB needed, 4.00 GiB available, 1.00 GiB missing" in str(
        error.value
    )
    assert "attention worker" not in str(error.value)


def test_a_run_that_does_not_fit_ends_before_it_trains(monkeypatch):
    stepper = support.make_stepper(support.small_config(PAIR, 2))
    monkeypatch.setattr(memory, "available_bytes", lambda meshes: {"expert worker": 1000})
    with pytest.raises(ConfigError, match=r"memory of each device must hold a step .*missing"):
        stepper.check_memory()
