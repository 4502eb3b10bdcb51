"""What a twin may overlap, and the choice at start-up: against trying every way and degree."""

import dataclasses
import itertools
import json
import subprocess
import sys

import pytest

from configs import balanced
from disag_jax import auto_placement
from disag_jax.config import Overlap, PlacementKind, Recompute, SplitConfig
from disag_jax.errors import ConfigError
from disag_jax.planner import hardware, overlaps
from disag_jax.planner.prediction import predict, step_seconds

H100 = hardware.load("h100")


def twin(recompute=Recompute.SELECTIVE, **split):
    config = balanced.get_config()
    config.split = SplitConfig(
        **{"attention_workers": 4, "expert_workers": 4, "placement": PlacementKind.COLOCATED}
        | split
    )
    config.run.recompute = recompute
    return config


def slower(factor):
    return dataclasses.replace(H100, intra_node=H100.intra_node.scaled(1 / factor))


def with_overlap(config, *way):
    fields = dict(zip(("overlap", "forward_chunks", "backward_chunks"), way, strict=False))
    return dataclasses.replace(config, split=dataclasses.replace(config.split, **fields)).validate()


@pytest.mark.parametrize("factor", [1, 4, 20, 100])
@pytest.mark.parametrize("recompute", [Recompute.NONE, Recompute.SELECTIVE])
def test_the_choice_is_that_of_trying_every_way(factor, recompute):
    config, device = twin(recompute), slower(factor)
    degrees = overlaps.degrees_of(config)
    assert degrees == [1, 2, 4, 8, 16]
    pairs = [
        pair for pair in itertools.product(degrees, degrees)
        if pair != (1, 1) and (recompute is not Recompute.NONE or pair[0] == pair[1])
    ]  # fmt: skip
    every = [(Overlap.NONE,), (Overlap.INTERLEAVED,), *((Overlap.CHUNKED, *p) for p in pairs)]
    times = [step_seconds(with_overlap(config, *way), device) for way in every]
    chosen = overlaps.choose(config, device)
    assert chosen.config.validate() and chosen.fits
    assert chosen.step_seconds == pytest.approx(min(times), rel=1e-3)


def test_of_ways_that_do_not_fit_none_is_chosen():
    config, device = twin(), slower(20)
    free = overlaps.choose(config, device)
    assert free.config.split.overlap is Overlap.INTERLEAVED
    needs = {
        overlap: max(
            memory.total
            for memory in predict(with_overlap(config, overlap), device).memory.values()
        )
        for overlap in (Overlap.NONE, Overlap.INTERLEAVED)
    }
    assert needs[Overlap.NONE] < needs[Overlap.INTERLEAVED]
    between = sum(needs.values()) / 2 / 2**30
    small = dataclasses.replace(device, memory_gibibytes=between, usable_memory_share=1.0)
    chosen = overlaps.choose(config, small)
    assert chosen.fits and chosen.config.split.overlap is not Overlap.INTERLEAVED
    none = dataclasses.replace(device, memory_gibibytes=1.0)
    with pytest.raises(ConfigError, match=r"split.overlap = 'auto' must .* with none, worker .* o"):
        overlaps.choose(config, none)


@pytest.mark.parametrize(
    "split, tokens, micro_batches, expected",
    [
        (dict(placement=PlacementKind.DISAGGREGATED), 16_384, 4, "none"),
        (dict(expert_workers=1), 16_384, 4, "none"),
        (dict(), 16_384, 1, "none chunked"),
        (dict(), 17, 4, "none interleaved"),
        (dict(), 34, 4, "none chunked interleaved"),
    ],
)
def test_ways_are_those_that_are_valid(split, tokens, micro_batches, expected):
    config = twin(**split)
    config.batch.sequence_length = config.batch.tokens_per_worker = tokens
    config.batch.micro_batches = micro_batches
    found = overlaps.ways(config)
    assert " ".join(one.validate().split.overlap for one in found) == expected
    for one in found:
        in_twos = one.split.overlap is Overlap.CHUNKED
        assert one.split.forward_chunks == one.split.backward_chunks == (2 if in_twos else 1)


def test_chunks_of_a_config_stay_where_they_divide_its_tokens():
    config = with_overlap(twin(), Overlap.CHUNKED, 4, 8)
    assert config in overlaps.ways(config)
    config.batch.sequence_length = config.batch.tokens_per_worker = 6
    (_, chunked, _) = overlaps.ways(config)
    assert (chunked.split.forward_chunks, chunked.split.backward_chunks) == (2, 2)


def auto(**split):
    return twin(overlap=Overlap.AUTO, **split)


def test_auto_sets_the_overlap_and_nothing_else(capsys):
    config = auto()
    chosen = auto_placement.resolve(config, "h100")
    assert chosen.validate().split.overlap is not Overlap.AUTO
    assert config.split.overlap is Overlap.AUTO
    fields = ("overlap", "forward_chunks", "backward_chunks")
    same = {field: getattr(chosen.split, field) for field in fields}
    expected = dataclasses.replace(config, split=dataclasses.replace(config.split, **same))
    assert chosen == expected
    assert "split.overlap = auto: " in capsys.readouterr().out
    assert auto_placement.resolve(auto(expert_workers=1), "h100").split.overlap is Overlap.NONE


def test_an_auto_placement_chooses_the_overlap_too():
    for overlap in (dict(overlap=Overlap.AUTO), dict(overlap=Overlap.CHUNKED, forward_chunks=2)):
        config = twin(placement=PlacementKind.AUTO, **overlap)
        config.model.num_experts = 256  # more than a GPU can hold: there are exchanges
        chosen = auto_placement.resolve(config, "h100").validate()
        assert chosen.tokens_per_step == config.tokens_per_step
        # With fast links and many micro-batches the interleaved twin is the fastest of all.
        assert chosen.split.overlap is Overlap.INTERLEAVED


def test_auto_is_refused_where_it_cannot_choose():
    with pytest.raises(ConfigError, match=r"split.overlap = 'auto' must know the devices: cpu is"):
        auto_placement.resolve(auto())
    with pytest.raises(ConfigError, match=r"'auto' must be none with split.placement = disaggreg"):
        auto_placement.resolve(auto(placement=PlacementKind.DISAGGREGATED), "h100")
    with pytest.raises(ConfigError, match=r"'auto' must be none, chunked or interleaved here: on"):
        auto().validate()
    with pytest.raises(ConfigError, match=r"split.forward_chunks = 2 must be 1 unless"):
        auto_placement.resolve(auto(forward_chunks=2), "h100")


def test_a_run_says_and_keeps_what_was_chosen(tmp_path):
    overrides = {
        "split.placement": "colocated", "split.stages": 1, "split.attention_workers": 2,
        "split.expert_workers": 2, "split.overlap": "auto", "run.compute_dtype": "bfloat16",
        "run.num_steps": 1, "run.eval_batches": 1, "run.checkpoint_every": 0,
        "model.num_layers": 1, "batch.micro_batches": 2, "batch.tokens_per_worker": 128,
    }  # fmt: skip
    command = [
        sys.executable, "train.py", "--config=configs/tiny.py", "--cpu_devices=2",
        f"--workdir={tmp_path}", *(f"--config.{field}={x}" for field, x in overrides.items()),
    ]  # fmt: skip
    bare = subprocess.run(command, capture_output=True, text=True)
    assert bare.returncode == 2 and bare.stderr.count("\n") == 1
    assert bare.stderr.startswith("error: split.overlap = 'auto' must know the devices: cpu is non")
    run = subprocess.run([*command, "--hardware=h100"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kept = json.loads((tmp_path / "config.json").read_text())
    split = kept.get("config", kept)["split"]
    assert split["overlap"] in ("none", "chunked", "interleaved")
    line = next(one for one in run.stdout.splitlines() if one.startswith("split.overlap = auto: "))
    assert split["overlap"] == "chunked" or f"auto: {split['overlap']}; " in line
