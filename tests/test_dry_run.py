"""The dry run, and a placement that the planner chooses at start-up."""

import copy
import dataclasses

import jax
import numpy as np
import pytest

from configs import qwen3_235b
from disag_jax import auto_placement, bench, dry_run, memory
from disag_jax.config import (
    BatchConfig,
    ConfigError,
    Dtype,
    MuDtype,
    PlacementKind,
    SplitConfig,
)
from disag_jax.geometry import placement_of
from disag_jax.planner import hardware
from disag_jax.planner.costs import Costs
from disag_jax.planner.memory_model import resident_bytes
from disag_jax.planner.sizes import Sizes
from disag_jax.schedule import schedule_of
from disag_jax.state import StateManager
from mesh.m2n import forward_pairs
from mesh.placement import Meshes
from tests import support

H100 = hardware.load("h100")


def make_config(split: SplitConfig, **model):
    sizes = dict(vocab_size=256, d_model=64, expert_width=64, num_experts=8) | model
    config = support.small_config(split, 8, **sizes)
    config.run = dataclasses.replace(config.run, compute_dtype=Dtype.BFLOAT16)
    config.batch = BatchConfig(sequence_length=64, tokens_per_worker=128, micro_batches=8)
    return config.validate()


def test_a_dry_run_counts_what_the_planner_counts_and_refuses_what_does_not_fit(capsys):
    config = make_config(SplitConfig(stages=2, attention_workers=1, expert_workers=3))
    found = dry_run.dry_run(config, H100)
    memory = found.prediction.memory["expert worker"]
    vocabulary = 2 * 256 * 64 + 64
    planned = memory.weights + memory.gradients - (2 + 4) * vocabulary
    # What is left are the selection bias and the step's metrics.
    assert found.arguments_and_outputs == pytest.approx(planned, abs=4096)
    text = dry_run.report(found)
    for words in ("schedule valid", "attention worker: planner", "many-to-many forward: "):
        assert words in text
    tiny = dataclasses.replace(H100, memory_gibibytes=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dry_run, "dry_run", lambda *_: found)
        dry_run.main(config, H100)
        with pytest.raises(ConfigError, match=r"must hold a step: attention worker .* over"):
            dry_run.main(config, tiny)
    assert capsys.readouterr().out.count("schedule valid") == 2


@pytest.mark.parametrize("mu_dtype", list(MuDtype))
@pytest.mark.parametrize("sharded", [False, True])
def test_state_is_as_large_as_planned(mu_dtype, sharded):
    split = SplitConfig(replicas=2, stages=1, attention_workers=1, expert_workers=1)
    config = make_config(split, num_shared_experts=1)
    config.optimizer.mu_dtype, config.optimizer.sharded = mu_dtype, sharded
    manager = StateManager(config, Meshes.make(placement_of(config), jax.devices()[:4]))
    sizes = Sizes.of(config)
    for kind, groups in memory.role_groups(colocated=False).items():
        planned = resident_bytes(sizes)[kind]["state"]
        # The last norm is whole on every device, and steps are counted.
        assert memory.state_bytes(manager, groups) == pytest.approx(planned, abs=1024)
    as_masters = copy.deepcopy(config)
    as_masters.optimizer.mu_dtype = MuDtype.MASTER
    costs, of_masters = Costs(sizes, H100), Costs(Sizes.of(as_masters), H100)
    gathering = costs.update - Costs(sizes, dataclasses.replace(H100, intra_node=instant())).update
    assert (gathering > 0) == sharded
    share = (costs.update - gathering) / (of_masters.update - gathering)
    assert share == pytest.approx(1 if mu_dtype is MuDtype.MASTER else 26 / 30)


def instant() -> hardware.Link:
    """A link that takes no time."""
    transfer = hardware.Transfer(gigabytes_per_second=1e30, latency_microseconds=0)
    return hardware.Link(transfer, transfer, transfer)


@pytest.mark.parametrize("hop", [1, 2])
def test_bytes_of_a_pair_are_those_of_its_messages(hop):
    config = make_config(SplitConfig(stages=1, attention_workers=2, expert_workers=2, hop=hop))
    schedule = schedule_of(config)
    found = dry_run.pair_bytes(config, schedule)
    # Each attention worker meets each expert worker in one round of a transfer.
    rounds = forward_pairs(dry_run.placement_of(config))
    assert sum(pairs.count((0, 2)) for pairs in rounds) == 1
    sizes = dry_run.Sizes.of(config)
    forward = [s for s in schedule.segments if s.has_forward or hop == 2]
    periods = sum(s.num_periods for s in forward)
    assert found["many-to-many forward"] == periods * sizes.message_bytes


@pytest.mark.parametrize(
    "split",
    [
        # Two shares for each of two owners, the last not full, and one worker without any.
        SplitConfig(stages=1, attention_workers=2, expert_workers=3),
        SplitConfig(
            stages=3, attention_workers=2, expert_workers=2, placement=PlacementKind.COLOCATED
        ),
    ],
)
def test_bytes_of_losses_are_those_that_the_program_permutes(split):
    config = make_config(split, num_layers=3)
    config.batch.sequence_length = config.batch.tokens_per_worker = 63
    stepper = support.make_stepper(config.validate())
    program = stepper.gradient_program(stepper.chooser.current)
    whole = program.trace(*stepper.abstract_arguments()).jaxpr.jaxpr
    found = dry_run.pair_bytes(config, stepper.schedule)
    owner = 0  # of stage 3 mod the number of stages
    for scope, kind in (
        ("scatter_loss_tokens", "loss tokens"), ("gather_loss_gradient", "loss gradients"),
    ):  # fmt: skip
        sent = []
        for jaxpr in support.subprograms(whole):
            permutes = [
                e for e in jaxpr.eqns
                if e.primitive.name == "ppermute" and scope in str(e.source_info.name_stack)
            ]  # fmt: skip
            # What a worker exchanges with one owner, in one loss.
            pairs = [(e.params["perm"], e.invars[0].aval) for e in permutes]
            met = [aval for perm, aval in pairs for a, b in perm if {a, b} == {owner, 2}]
            sent += [sum(aval.size * aval.dtype.itemsize for aval in met)] * bool(permutes)
        assert sent and set(sent) == {found[kind] / config.batch.micro_batches} != {0}


def test_a_twin_of_one_stage_keeps_its_losses_to_itself():
    split = SplitConfig(attention_workers=2, expert_workers=2, placement=PlacementKind.COLOCATED)
    config = make_config(split)
    found = dry_run.pair_bytes(config, schedule_of(config))
    assert not [name for name in found if "loss" in name]


def test_auto_chooses_a_split_of_the_devices_and_keeps_the_tokens(capsys):
    config = auto_config()
    before = copy.deepcopy(config)
    chosen = auto_placement.resolve(config, "h100").validate()
    assert chosen.split.num_devices == len(jax.devices())
    assert chosen.split.placement is not PlacementKind.AUTO
    assert chosen.tokens_per_step == before.tokens_per_step
    assert chosen.model == before.model and config == before
    assert "split.placement = auto: " in capsys.readouterr().out
    assert auto_placement.resolve(chosen) is chosen


def auto_config():
    config = make_config(SplitConfig())
    config.split.placement = PlacementKind.AUTO
    return config


KINDS = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA H800": "h800",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
    "NVIDIA H100 PCIe": None,
    "NVIDIA H100 NVL": None,
    "NVIDIA A100-PCIE-40GB": None,
    "NVIDIA A100-SXM4-40GB": None,
    "NVIDIA A100 80GB PCIe": None,
    "NVIDIA GH200 480GB": None,
    "NVIDIA H20": None,
}


@pytest.mark.parametrize("kind", KINDS)
def test_auto_knows_the_devices_that_its_data_sheets_are_of(kind):
    if KINDS[kind]:
        assert auto_placement._hardware_of(kind, "split.placement").name == KINDS[kind]
        return
    with pytest.raises(ConfigError, match=f"{kind} is none of a100, .* and --hardware names no"):
        auto_placement._hardware_of(kind, "split.placement")


def test_auto_plans_for_the_hosts_and_the_memory_that_are_there(monkeypatch):
    class Device:
        device_kind = "NVIDIA H100 80GB HBM3"

        def memory_stats(self):
            return {"bytes_limit": 60 * 2**30}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()] * 2)
    found = auto_placement._hardware_here("split.placement")
    assert (found.devices_per_node, found.nics_per_node) == (2, 2)
    assert found.usable_bytes == 60 * 2**30 and found.intra_node == H100.intra_node
    unknown = auto_placement._as_found(H100, 4, 0)
    assert unknown.usable_bytes == H100.usable_bytes and unknown.nics_per_node == 4
    # Two hosts with a process for each of four devices, and one with a process for two.
    hosts, counts = np.array([5] * 4 + [7] * 4 + [9]), np.array([1] * 8 + [2])
    assert auto_placement._fewest_on_a_host(hosts[:8], counts[:8]) == 4
    assert auto_placement._fewest_on_a_host(hosts, counts) == 2


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.FLOAT64])
def test_only_bfloat16_is_predicted(dtype):
    config = auto_config()
    config.run.compute_dtype = dtype
    message = f"run.compute_dtype = {dtype} must be bfloat16 for a prediction"
    with pytest.raises(ConfigError, match=message):
        auto_placement.resolve(config, "h100")
    config.split.placement = PlacementKind.DISAGGREGATED
    with pytest.raises(ConfigError, match=message):
        dry_run.dry_run(config, H100)
    with pytest.raises(ConfigError, match=message):
        bench.main("step", config, None, None, "h100")


def test_auto_is_refused_where_nothing_can_be_chosen():
    with pytest.raises(ConfigError, match=r"'auto' must know the devices: cpu is none of a100"):
        auto_placement.resolve(auto_config())
    with pytest.raises(ConfigError, match=r"split.placement = 'auto' must be disaggregated or"):
        auto_config().validate()
    large = qwen3_235b.get_config()
    large.split.placement = PlacementKind.AUTO
    with pytest.raises(ConfigError, match=r"num_devices = 8 of h100 must hold qwen3_235b with tok"):
        auto_placement.resolve(large, "h100")
