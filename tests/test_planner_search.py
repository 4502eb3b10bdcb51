"""Search and plan: against exhaustive enumeration, deterministic, quick, clear about bad input."""

import copy
import dataclasses
import math
import re
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import balanced, qwen3_235b
from disag_jax import plan
from disag_jax.config import Overlap, PlacementKind, Recompute, SplitConfig
from disag_jax.errors import ConfigError
from disag_jax.planner import hardware, loss_shares, search
from disag_jax.planner.advice import Advice, advise, uneven_roles
from disag_jax.planner.memory_model import predict_memory
from disag_jax.planner.overlaps import with_best_degrees
from disag_jax.planner.prediction import assumed_load_factor, predict, step_seconds
from disag_jax.planner.search import Fixed
from disag_jax.planner.sizes import Sizes

H100, H800 = hardware.load("h100"), hardware.load("h800")


def small(micro_batches=8, sequence_length=1024, **model):
    config = balanced.get_config()
    for name, value in model.items():
        setattr(config.model, name, value)
    config.batch.sequence_length = sequence_length
    config.batch.tokens_per_worker = 4 * sequence_length
    config.batch.micro_batches = micro_batches
    return config.validate()


@settings(max_examples=10)
@given(
    st.sampled_from((2, 3, 4, 6, 8, 12)),
    st.sampled_from((4, 8, 13)),
    st.sampled_from(search.PLACEMENTS),
    st.sampled_from((512, 2048)),
    st.sampled_from((2, 8)),
)
def test_the_search_finds_what_trying_everything_finds(devices, micro_batches, kind, length, top_k):
    config = small(micro_batches, length, top_k=top_k)
    times = {}
    for one in search.candidates(config, devices, kind):
        kept = [search.with_recompute(one, policy) for policy in search.LEAST_RECOMPUTE_FIRST]
        if one.split.overlap is Overlap.CHUNKED:
            kept = list(filter(None, (with_best_degrees(policy, H100) for policy in kept)))
        fitting = [policy for policy in kept if predict(policy, H100).fits]
        if fitting:
            name = search.in_words(fitting[0])
            times[name] = step_seconds(fitting[0], H100) / one.tokens_per_step
    found = search.search(config, H100, devices, kind)
    assert found.num_candidates == len(times)
    # The share of the loss is chosen last.
    equal = loss_shares.with_share(found.config, None)
    assert times[search.in_words(equal)] == pytest.approx(min(times.values()), rel=1e-12)
    assert found.seconds_per_token <= min(times.values()) * (1 + 1e-12)
    assert found.step_seconds == pytest.approx(step_seconds(found.config, H100), rel=1e-12)


def test_as_little_is_recomputed_as_fits():
    config, kind, policies = small(), PlacementKind.DISAGGREGATED, {}
    for gibibytes in (80, 68, 60):
        device = dataclasses.replace(H100, memory_gibibytes=gibibytes)
        found = search.search(config, device, 2, kind, Fixed(tokens_per_worker=16_384))
        policies[gibibytes] = found and found.config.run.recompute
    assert policies[80] is Recompute.NONE and policies[60] is None
    assert policies[68] in (Recompute.SELECTIVE, Recompute.FULL)
    fixed = Fixed(recompute=Recompute.FULL)
    assert search.search(config, H100, 2, kind, fixed).config.run.recompute is Recompute.FULL


@pytest.mark.parametrize("kind", search.PLACEMENTS)
def test_candidates_are_valid_complete_and_distinct(kind):
    config = small()
    found = list(search.candidates(config, 12, kind))
    assert len({search.in_words(one) for one in found}) == len(found)
    for one in found:
        assert one.validate().split.num_devices == 12
        assert abs(one.tokens_per_step / config.tokens_per_step - 1) <= search.TOKEN_TOLERANCE
    by_hand = {
        (12 // (p * g), p, m, n)
        for g in range(1, 13) for p in range(1, 7) for m in range(1, 13) for n in range(1, 13)
        if 12 % (p * g) == 0
        and (m + n == g if kind is PlacementKind.DISAGGREGATED else m == g and m % n == 0)
    }  # fmt: skip
    splits = {search.split_key(one) for one in found}
    # Steps that an odd number of workers cannot make within the tolerance are left out.
    assert splits <= by_hand
    assert {key for key in by_hand if key[0] * key[2] in (1, 2, 4, 8)} <= splits


def test_fixed_parts_stay():
    fixed = Fixed(stages=2, expert_workers=3, hop=2)
    found = list(search.candidates(small(), 8, PlacementKind.DISAGGREGATED, fixed))
    assert found
    for one in found:
        assert (one.split.stages, one.split.expert_workers, one.split.hop) == (2, 3, 2)


def test_a_thousand_devices_take_seconds_advice_included():
    config = qwen3_235b.get_config()
    config.batch.micro_batches = 1024
    began = time.process_time()
    assert plan.make_plan(config, H800, 1024).best.fits
    assert time.process_time() - began < 10


def test_the_best_twin_is_found_among_all_overlaps():
    config = small(micro_batches=16, num_layers=4)
    slow = dataclasses.replace(H100, intra_node=H100.intra_node.scaled(1 / 20))
    best = {
        overlap: search.search(
            config, slow, 4, PlacementKind.COLOCATED, Fixed(expert_workers=4, overlap=overlap)
        )
        for overlap in (None, Overlap.NONE, Overlap.CHUNKED, Overlap.INTERLEAVED)
    }
    for overlap, found in best.items():
        assert overlap in (None, found.config.split.overlap)
        assert found.config.validate() and predict(found.config, slow).fits
    times = {overlap: found.seconds_per_token for overlap, found in best.items()}
    assert times[None] == min(times.values()) < times[Overlap.NONE]
    assert best[Overlap.CHUNKED].config.split.forward_chunks > 1


def test_the_answer_is_the_same_twice():
    found = [
        [search.search(small(), H100, 16, kind) for kind in search.PLACEMENTS] for _ in range(2)
    ]
    assert found[0] == found[1]


def test_every_split_that_fits_is_listed_with_its_best_micro_batch():
    config = small()
    listed = search.splits_that_fit(config, H100, 4, PlacementKind.DISAGGREGATED, stages=1)
    keys = [search.split_key(found.config) for found in listed]
    assert sorted(keys) == [(1, 1, 1, 3), (1, 1, 2, 2), (1, 1, 3, 1), (2, 1, 1, 1)]
    times = [found.seconds_per_token for found in listed]
    assert times == sorted(times)
    best = search.search(config, H100, 4, PlacementKind.DISAGGREGATED, Fixed(stages=1))
    assert times[0] == pytest.approx(best.seconds_per_token)


def test_neighbours_differ_in_one_thing():
    config = search.search(small(), H100, 8, PlacementKind.DISAGGREGATED).config
    found = search.neighbours(config, 8)
    assert found
    here = search._coordinates(config)
    for label, other in found:
        there = search._coordinates(other)
        changed = [name for name in here if here[name] != there[name]]
        assert len(changed) == 1 and label.split(" ", 1)[1] == changed[0]


def test_colocation_is_advised_for_short_sequences_on_one_node():
    config = small(micro_batches=16, sequence_length=512, num_layers=8)
    made = plan.make_plan(config, H100, 8)
    assert made.advice.placement is PlacementKind.COLOCATED
    assert made.advice.advantage > 1
    assert made.advice.sentence.startswith("co-locate")


def test_the_split_as_configured_is_beside_the_pick():
    config = small()
    own = config.split.num_devices
    label, prediction = plan.make_plan(config, H100, own).rows[-1]
    assert label == "as configured" and prediction.config == config
    auto = copy.deepcopy(config)
    auto.split.placement = PlacementKind.AUTO
    for other, num_devices in ((config, 2 * own), (auto, own)):
        labels = [label for label, _ in plan.make_plan(other, H100, num_devices).rows]
        assert "as configured" not in labels


def test_colocation_is_advised_for_shapes_too_lopsided_for_the_devices():
    # Experts have ten times the arithmetic of attention: with two devices half of them must wait.
    config = small(sequence_length=1024, top_k=16)
    made = plan.make_plan(config, H100, 2)
    assert made.advice.placement is PlacementKind.COLOCATED
    assert made.advice.advantage > 1.3
    # It says what would have to change: how uneven the roles are, and a division that is not.
    words = r"as 1 \+ 1 an attention worker has (\S+) times the work of an expert worker: "
    found = re.search(words + r"(\d+) \+ (\d+) \((\d+) devices\)", made.advice.sentence)
    ratio, attention, experts, devices = map(float, found.groups())
    apart = next(p for label, p in made.rows if "disaggregated" in label)
    attention_seconds, expert_seconds = (
        apart.unit_seconds[f"{role}_forward"] + apart.unit_seconds[f"{role}_backward"]
        for role in ("attention", "expert")
    )
    assert ratio == pytest.approx(attention_seconds / expert_seconds, rel=0.05)
    assert devices == attention + experts and ratio < 0.5
    # One worker's work of each role now, over that many.
    busy = attention_seconds / attention, expert_seconds / experts
    assert max(busy) <= 1.1 * (attention_seconds + expert_seconds) / devices


def test_even_roles_are_not_called_uneven():
    config = small(num_layers=8)
    config.split = SplitConfig(attention_workers=1, expert_workers=1)
    units = predict(config, H100, 1.0).unit_seconds
    parts = ("forward", "backward")
    attention, expert = (
        sum(units[f"{role}_{part}"] for part in parts) for role in ("attention", "expert")
    )

    def slower(role, factor):
        fits = {
            f"{role}_{part}": hardware.UnitFit(
                1e6 * factor * units[f"{role}_{part}"], 0, 0, 0, 1, 3
            )
            for part in parts
        }
        return dataclasses.replace(H100, unit_fits=fits)

    alike = slower("attention", expert / attention)
    assert uneven_roles(config, alike, 1.0) is None
    much = uneven_roles(config, slower("attention", 3 * expert / attention), 1.0)
    assert much.endswith(
        "has 3 times the work of an expert worker: 3 + 1 (4 devices) would be about even"
    )
    nearly = uneven_roles(config, slower("attention", 1.4 * expert / attention), 1.0)
    assert nearly is None


def test_advice_names_a_change_that_does_turn_it_around():
    config = small(micro_batches=16, sequence_length=2048)
    blocking = Fixed(overlap=Overlap.NONE)

    def best(device):
        return {
            kind: search.search(config, device, 4, kind, blocking) for kind in search.PLACEMENTS
        }

    found = best(H100)
    advice = advise(config, H100, 4, found, blocking, None)
    assert advice.placement is PlacementKind.COLOCATED
    (factor,) = re.findall(r"intra-node links (\d) times slower", advice.sentence)
    slow = dataclasses.replace(H100, intra_node=H100.intra_node.scaled(1 / int(factor)))
    times = {kind: one.seconds_per_token for kind, one in best(slow).items()}
    assert times[PlacementKind.DISAGGREGATED] < times[PlacementKind.COLOCATED]
    only = advise(config, H100, 4, {**found, PlacementKind.COLOCATED: None}, Fixed(), None)
    assert only.sentence == "disaggregate: the other placement fits on no split of these devices"


def test_what_is_fixed_holds_in_the_advice_too(monkeypatch):
    tried = []

    def spy(config, device, num_devices, placement, fixed, load_factor):
        found = search.search(config, device, num_devices, placement, fixed, load_factor)
        tried.append(found and found.config)
        return found

    monkeypatch.setattr("disag_jax.planner.advice.search", spy)
    config = small()
    fixed = Fixed(tokens_per_worker=4096, expert_workers=2, hop=1)
    made = plan.make_plan(config, H100, 4, fixed)
    assert any(tried) and all(fixed.allows(one) for one in tried if one)
    if not made.advice.changes:
        assert f"stages and replicas and {fixed}, neither" in made.advice.sentence


def test_a_placement_that_the_user_excludes_is_not_said_to_fit_nowhere():
    made = plan.make_plan(small(), H100, 4, Fixed(hop=2))
    assert made.advice.sentence == (
        "disaggregate: the other placement fits on no split of these devices with hop = 2"
    )


def test_a_refusal_counts_the_memory_of_the_load_that_was_given():
    config = search.with_recompute(small(), Recompute.FULL)
    config.split.attention_workers = config.split.expert_workers = 2
    fixed = Fixed(1, 1, 2, 2, 1, config.batch.tokens_per_worker, recompute=Recompute.FULL)
    even, skewed = (
        max(memory.total for memory in predict(config, H100, load).memory.values())
        for load in (1.0, 2.0)
    )
    between = (even + skewed) / 2 / 2**30
    device = dataclasses.replace(H100, memory_gibibytes=between, usable_memory_share=1.0)
    plan.make_plan(config, device, 4, fixed, 1.0)
    with pytest.raises(ConfigError, match=r"expert worker .* over"):
        plan.make_plan(config, device, 4, fixed, 2.0)


def test_no_worker_has_more_than_everything():
    config = small()
    config.split.expert_workers = 4
    most = predict(config, H100, 4.0)
    assert predict(config, H100, 1000.0).step_seconds == most.step_seconds
    assert step_seconds(config, H100, 1000.0) == most.step_seconds and most.load_factor == 4
    plans = [plan.make_plan(config, H100, 4, load_factor=load).best for load in (4.0, 1000.0)]
    assert plans[0].step_seconds == plans[1].step_seconds


def test_a_refusal_says_what_either_role_of_the_closest_split_is_over():
    """Also where a co-located split comes closer."""
    config, words = qwen3_235b.get_config(), r"(\S+) GiB over"
    with pytest.raises(ConfigError) as error:
        plan.make_plan(config, H800, 16)
    apart, together = str(error.value).split("; ")
    pattern = r"must hold qwen3_235b: disaggregated comes closest with (\d+) x (\d+) "
    pattern += rf"stages x \((\d+) \+ (\d+)\).*attention worker {words}, expert worker {words}$"
    *split, attention, expert = re.search(pattern, apart).groups()
    assert re.match(rf"colocated comes closest with .*: worker {words}$", together)
    over = {}
    for one in search.candidates(config, 16, PlacementKind.DISAGGREGATED):
        one = search.with_recompute(one, Recompute.FULL)
        memory = predict_memory(Sizes.of(one, assumed_load_factor(one, None)))
        missing = [worker.total - H800.usable_bytes for worker in memory.values()]
        over.setdefault(search.split_key(one), []).append(missing)
    least = min(sum(max(0, size) for size in sizes) for many in over.values() for sizes in many)
    sizes = min(over[tuple(map(int, split))], key=lambda sizes: sum(max(0, s) for s in sizes))
    assert sum(max(0, size) for size in sizes) == least
    for size, printed in zip(sizes, (attention, expert), strict=True):
        assert size / 2**30 == pytest.approx(float(printed), abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_devices=1), r"num_devices = 1 must be at least 2"),
        (dict(num_devices=2, config="qwen"),
         r"num_devices = 2 of h800 must hold qwen3_235b: .*worker .* GiB over"),
        (dict(num_devices=16, config="qwen", fixed=Fixed(stages=100)),
         r"^stages = 100 must be at most model.num_layers = 94$"),
        (dict(num_devices=128, fixed=Fixed(stages=1, expert_workers=100)),
         r"^expert_workers = 100 must be at most model.num_experts = \d\d$"),
        (dict(num_devices=8, fixed=Fixed(tokens_per_worker=2**20)),
         r"^tokens_per_worker = 1048576 must be at most about 32768, the tokens of a step$"),
        (dict(num_devices=8, fixed=Fixed(stages=3)),
         r"num_devices = 8 must divide into replicas x stages x workers .* with stages = 3"),
        (dict(num_devices=8, fixed=Fixed(overlap=Overlap.AUTO)), r"overlap = auto must be none"),
        (dict(num_devices=8, fixed=Fixed(stages=2, replicas=3)), r"with replicas = 3, stages = 2"),
        (dict(num_devices=8, fixed=Fixed(hop=3)), r"^hop = 3 must be 1 or 2$"),
        *[(dict(num_devices=8, load_factor=bad), rf"load_factor = {bad} must be finite and at l")
          for bad in (0.5, math.nan, math.inf)],
        *[(dict(num_devices=8, fixed=Fixed(tokens_per_worker=bad)),
           rf"tokens_per_worker = {bad} must be a positive multiple of batch.sequence_length = 10")
          for bad in (1000, 1536, 0)],
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(change, message):
    options = dict(change)
    config = qwen3_235b.get_config() if options.pop("config", None) else small()
    with pytest.raises(ConfigError, match=message):
        plan.make_plan(config, H800, **options)


def test_the_command_prints_a_plan_and_refuses_in_one_sentence():
    command = [sys.executable, "-m", "disag_jax.plan", "--config=configs/balanced.py"]
    good = subprocess.run(
        [*command, "--hardware=h100", "--num_devices=4"], capture_output=True, text=True
    )
    assert good.returncode == 0, good.stderr
    for words in ("pick, ", "roofline", "best ", "advice", "memory", "assumed", "tokens/s"):
        assert words in good.stdout
    bad = subprocess.run(
        [*command, "--hardware=b300", "--num_devices=4"], capture_output=True, text=True
    )
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr.startswith("error: hardware = 'b300' must be one of a100, h100")
    assert bad.stderr.count("\n") == 1
    short = subprocess.run(
        [*command, "--hardware=h100", "--num_devices=4", "--tokens_per_worker=1000"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert short.returncode == 2 and short.stdout == ""
    assert short.stderr.startswith("error: tokens_per_worker = 1000 must be a positive multiple")


def test_idle_time_is_the_mean_of_all_stages():
    config = small(num_layers=5)  # of two stages one has three layers
    config.split.stages = 2
    best = predict(config.validate(), H100)
    advice = Advice(PlacementKind.DISAGGREGATED, None, [], Fixed())
    made = plan.Plan(best, [("pick", best)], advice)
    by_role = {
        role: [w for w in best.workers if w.name.endswith(role)] for role in ("attention", "expert")
    }
    step, means = best.step_seconds, []
    for role, workers in by_role.items():
        idle, busy = ([getattr(w, part) / step for w in workers] for part in ("idle", "busy"))
        assert len(idle) == 2 and idle[0] < idle[1]
        means.append(f"{sum(idle) / 2:.0%}")
        (line,) = [one for one in plan.report(made).split("\n") if one.startswith(f"{role} ")]
        assert f"busy {sum(busy) / 2:.0%} ({min(busy):.0%} to {max(busy):.0%}), exposed " in line
        assert f"idle {means[-1]} ({idle[0]:.0%} to {idle[1]:.0%}) of a step, mean of 2" in line
    (column,) = [c for c in plan.table(made).columns if c.header == "mean idle A, F"]
    assert list(column.cells) == [" ".join(means)]


def test_a_plan_does_not_change_its_config():
    config = small()
    before = copy.deepcopy(config)
    plan.make_plan(config, H100, 4)
    assert config == before
