"""What a run says of itself at its start, after an evaluation and when it stops, as text."""

import math
import os

import jax
import numpy as np

from disag_jax import memory
from disag_jax.config import Config, SplitConfig
from disag_jax.flops import model_flops, peak_flops
from disag_jax.logical import LeafMap, state_maps
from disag_jax.pipeline import make_phases
from disag_jax.state import GROUPS, StateManager
from disag_jax.step import Stepper
from layers import target
from mesh import runtime
from mesh.roles import Role


def start_up(stepper: Stepper, data: str) -> str:
    """The split, the parameters and bytes of each role, the batch and the schedule."""
    config = stepper.config
    sections = [
        f"{config.name}: {config.run.num_steps} steps, {config.run.compute_dtype.value}",
        f"data      {data}",
        *_split(stepper),
        *_parameters(stepper),
        *_memory(stepper),
        *_batch(config),
        *_work(stepper),
        *_schedule(stepper),
        *_queues(),
    ]
    return "\n".join(sections)


def resumed(step: int, changed: list[tuple[str, object, object]]) -> str:
    """Where a resumed run goes on from, and a line for each field of its config that changed."""
    lines = [f"resumed   from step {step}"]
    lines += [f"          {name}: {before!r} -> {now!r}" for name, before, now in changed]
    return "\n".join(lines)


def stopped(step: int) -> str:
    """One line for a run that was told to stop before its end."""
    return f"step {step:>5}  stopped as told, and saved; --resume goes on from here"


def evaluation(result: dict) -> str:
    """One line: the model's held-out loss beside the baseline's."""
    loss, baseline = result["held_out_loss"], result["bigram_loss"]
    verdict = "below" if loss < baseline else "not below"
    parts = [
        f"step {result['step']:>5}  held-out loss {loss:.4f} nats per token, {verdict} the bigram "
        f"model's {baseline:.4f}",
        f"perplexity {result['perplexity']:.2f}",
    ]
    if "bits_per_byte" in result:
        parts.append(f"{result['bits_per_byte']:.3f} bits per byte")
    return "  ".join(parts)


def parameter_counts(manager: StateManager) -> dict[str, int]:
    """Parameters of the model by group; padding does not count."""
    maps = state_maps(manager)["params"]
    is_map = lambda leaf: isinstance(leaf, LeafMap)  # noqa: E731
    return {
        name: sum(
            math.prod(leaf.logical_shape) for leaf in jax.tree.leaves(maps[name], is_leaf=is_map)
        )
        for name in GROUPS
    }


def _split(stepper: Stepper) -> list[str]:
    placement = stepper.meshes.placement
    sizes = (
        f"{placement.attention_workers} workers of both roles in {placement.expert_copies} groups "
        "that hold all experts"
        if placement.colocated
        else f"{placement.attention_workers} attention + {placement.expert_workers} expert workers"
    )
    lines = [
        f"split     {stepper.config.split.placement}: {placement.replicas} replicas x "
        f"{placement.stages} stages x ({sizes}) = {placement.num_devices} devices, "
        f"hop {stepper.schedule.hop}{_overlap(stepper.config.split)}"
    ]
    for replica, devices in enumerate(stepper.meshes.union.devices):
        for stage in range(placement.stages):
            layers = list(range(stage, stepper.config.model.num_layers, placement.stages))
            roles = "; ".join(
                f"{name} {', '.join(_players(stepper, devices, stage, role))}"
                for role, name in ((Role.ATTENTION, "attention"), (Role.EXPERT, "experts"))
            )
            lines.append(
                f"          replica {replica} stage {stage}, layers {_ranges(layers)}: {roles}"
            )
    return lines


def _overlap(split: SplitConfig) -> str:
    return f", overlap {split.overlap_in_words}" if split.colocated else ""


def _players(stepper: Stepper, devices, stage: int, role: Role) -> list[str]:
    """The devices of a replica's stage that play a role, each with the experts it holds."""
    placement, places = stepper.meshes.placement, stepper.manager.geometry.places
    names = []
    for worker, device in enumerate(devices):
        rank = placement.rank_of(worker, role)
        if placement.stage_of(worker) != stage or rank is None:
            continue
        share = places.share(rank) if role is Role.EXPERT else None
        names.append(f"{device} (experts {share.start}-{share.stop - 1})" if share else str(device))
    return names


def _parameters(stepper: Stepper) -> list[str]:
    counts = parameter_counts(stepper.manager)
    model = stepper.config.model
    routed = model.num_layers * model.num_experts * 3 * model.d_model * model.expert_width
    active = sum(counts.values()) - routed * (1 - model.top_k / model.num_experts)
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return [f"model     {sum(counts.values()):,} parameters ({active:,.0f} per token): {parts}"]


def _memory(stepper: Stepper) -> list[str]:
    """Bytes that each worker holds for the whole run, by role and use."""
    manager, config = stepper.manager, stepper.config
    phases = make_phases(manager.geometry, stepper.schedule)
    compute = manager.geometry.compute_dtype.itemsize
    wide = np.dtype(manager.geometry.wide_dtype).itemsize
    rows = config.layers_per_stage * manager.layouts.worker_columns
    vocabulary = 2 * config.model.vocab_size * config.model.d_model
    boxes = 2 * (phases.message.num_words + phases.cotangent.num_words) * manager.geometry.R
    shared = {
        "weights": (rows + vocabulary) * compute,
        "gradients": (rows + vocabulary) * wide,
        "stash": phases.pool.num_bytes,
        "messages": boxes * compute,
    }
    lines = []
    for name, groups in memory.role_groups(config.split.colocated).items():
        state = memory.state_bytes(manager, groups)
        parts = {"master and optimizer": state} | shared
        uses = ", ".join(f"{use} {memory.in_words(size)}" for use, size in parts.items())
        lines.append(f"memory    {name} {memory.in_words(sum(parts.values()))}: {uses}")
    return lines


def _batch(config: Config) -> list[str]:
    batch = config.batch
    return [
        f"batch     {config.tokens_per_step:,} tokens a step: {batch.micro_batches} micro-batches "
        f"of {batch.tokens_per_worker:,} tokens on each of "
        f"{config.split.replicas * config.split.attention_workers} attention workers, "
        f"sequences of {batch.sequence_length}"
    ]


def _work(stepper: Stepper) -> list[str]:
    """The arithmetic of the model, and what MFU is measured against."""
    config, kind = stepper.config, stepper.meshes.union.devices.flat[0].device_kind
    flops, split, peak = model_flops(config), config.split, peak_flops(config, kind)
    shares = ", ".join(
        f"{name} {getattr(flops, name) / flops.total:.0%}"
        for name in ("attention", "expert", "head")
    )
    tokens_per_stage = config.tokens_per_step / (split.replicas * split.stages)
    attention = _flops(tokens_per_stage * flops.attention / split.attention_workers)
    num_sharing = split.attention_workers if split.colocated else split.expert_workers
    expert = _flops(tokens_per_stage * flops.expert / num_sharing)
    measure = (
        f"no MFU: the peak of {kind!r} is not known, run.peak_tflops_per_device may say it"
        if peak is None
        else f"MFU is measured against {peak / 1e12:g} TFLOP/s per device"
    )
    return [
        f"work      {_flops(flops.total)} a token, forward and backward: {shares}",
        f"          a step: each attention worker {attention}, each expert worker {expert}, and a "
        "share of the head",
        f"          {measure}",
    ]


def _schedule(stepper: Stepper) -> list[str]:
    schedule, config = stepper.schedule, stepper.config
    capacities = ", ".join(
        f"{bucket.rows} rows a slot and {bucket.sorted_rows} sorted rows"
        for bucket in stepper.chooser.options
    )
    lines = [
        f"schedule  {schedule.num_periods} periods a step, idle share {schedule.idle_share:.3f}, "
        f"{schedule.in_flight} micro-batches in flight, stash slots {schedule.stash_slots[0]} "
        f"attention and {schedule.stash_slots[1]} expert",
        f"buckets   {capacities}",
    ]
    rule = "split.stages" if schedule.colocated else "2 * split.stages * split.hop"
    wave = schedule.stages * (1 if schedule.colocated else 2 * schedule.hop)
    if config.batch.micro_batches % wave:
        lines.append(
            f"warning   batch.micro_batches = {config.batch.micro_batches} should be a multiple of "
            f"{rule} = {wave}: the idle share is {schedule.idle_share:.3f}"
        )
    return lines


def _queues() -> list[str]:
    """A warning where the environment has fewer queues, as Megatron's users set it."""
    given, best = os.environ.get(runtime.QUEUES), runtime.GPU_ENVIRONMENT[runtime.QUEUES]
    if not target.is_gpu() or given == best:
        return []
    return [
        f"warning   {runtime.QUEUES} = {given} of the environment should be {best}: with fewer, "
        "units can wait for the transfers that they should hide"
    ]


def _ranges(layers: list[int]) -> str:
    return (
        ",".join(map(str, layers)) if len(layers) <= 8 else f"{layers[0]},{layers[1]}..{layers[-1]}"
    )


def _flops(value: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.1f} {unit}FLOP"
        value /= 1000
    return f"{value:.1f} PFLOP"
