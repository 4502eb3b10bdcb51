"""The profile command on simulated devices, and the fits that it makes."""

import copy
import dataclasses
import json

import numpy as np
import pytest

from configs import balanced
from disag_jax import bench_phases, bench_transfer, profile, timing
from disag_jax.bench_units import Rates
from disag_jax.config import BatchConfig, ConfigError, Dtype, SplitConfig
from disag_jax.errors import RunError
from disag_jax.geometry import buckets
from disag_jax.planner import hardware
from disag_jax.planner.costs import Work, expert_work
from disag_jax.planner.fits import fit_transfer, fit_unit, fit_update
from disag_jax.planner.prediction import predict
from disag_jax.planner.sizes import Sizes
from tests import support


@pytest.mark.slow  # compiles a dozen programs, half a minute
def test_a_profile_is_measured_written_and_read_back(tmp_path, capsys, monkeypatch):
    for sizes in ("SLOT_MIB", "SUM_MIB"):
        monkeypatch.setattr(bench_transfer, sizes, (0.01, 4))
    monkeypatch.setattr(timing, "MANY", 4)
    monkeypatch.setattr(timing, "MOST", 4)
    all_variants = profile.variants
    monkeypatch.setattr(profile, "variants", lambda config: all_variants(config)[:1])
    monkeypatch.setattr(profile, "UPDATE_LAYERS", (1,))
    config = support.small_config(SplitConfig(), top_k=4, num_shared_experts=1)
    config.run.compute_dtype = Dtype.BFLOAT16
    config.batch = BatchConfig(sequence_length=16, tokens_per_worker=32, micro_batches=2)
    out = str(tmp_path / "here.json")
    profile.main(config, out)
    printed = capsys.readouterr().out
    measured = hardware.load(out)
    assert measured.source == "measured" and measured.name == "here"
    assert set(measured.unit_fits) == set(hardware.UNITS)
    assert all(fit.num_points == 1 for fit in measured.unit_fits.values())
    assert set(measured.lost_beside_transfers) <= set(hardware.UNITS)
    for name in (*hardware.UNITS, "lost beside", "many_to_many", "all_to_all", "all_reduce"):
        assert name in printed
    points = json.loads((tmp_path / "here.points.json").read_text())
    assert all(p["milliseconds"] > 0 for found in points.values() for p in found)
    # What was measured is enough for a prediction on as many devices.
    two = copy.deepcopy(config)
    assert predict(two, measured).step_seconds > 0
    two.split.stages, two.split.attention_workers = 2, 4
    with pytest.raises(ConfigError, match="inter_node = None must be a link"):
        predict(two, measured)
    # Over another network only the transfers are measured again.
    other = str(tmp_path / "other.json")
    profile.main(config, other, "default", out)
    units_kept = dict(name="other", comment="", intra_node=None)
    again = hardware.load(other)
    assert out in again.comment and again.intra_node != measured.intra_node
    assert dataclasses.replace(again, **units_kept) == dataclasses.replace(measured, **units_kept)
    points = json.loads((tmp_path / "other.points.json").read_text())
    assert set(points) == {"many_to_many", "all_to_all", "all_reduce"}


def pretend_times(monkeypatch, noise):
    """The calls of `time_iterations` are milliseconds of that noise: their counts, as they come."""
    counts = []

    def time_calls(name, call, **_):
        return timing.Figure(name, call(), noise)

    def call_of(milliseconds):
        def call(count):
            counts.append(count)
            return milliseconds(count)

        return call

    monkeypatch.setattr(timing, "time_calls", time_calls)
    return counts, call_of


@pytest.mark.parametrize(("once", "each"), [(5.0, 2.0), (1.0, 0.1)])
def test_what_is_done_once_per_call_drops_out(monkeypatch, once, each):
    counts, call_of = pretend_times(monkeypatch, 0.01)
    figure = timing.time_iterations("x", call_of(lambda count: once + count * each))
    assert counts == [2, 10]
    assert figure.milliseconds == pytest.approx(each)
    # Each of the two times may be off by its own noise.
    spread = 0.01 * (2 * once + 12 * each) / 8
    assert figure.noise * figure.milliseconds == pytest.approx(spread)


def test_a_loop_is_made_longer_where_its_time_is_lost_in_noise(monkeypatch):
    counts, call_of = pretend_times(monkeypatch, 0.1)
    figure = timing.time_iterations("x", call_of(lambda count: 30 + count))
    assert counts == [2, 10, 40, 160]
    assert figure.milliseconds == pytest.approx(1)
    # Not where a call would take long.
    counts.clear()
    timing.time_iterations("x", call_of(lambda count: 1000 + count))
    assert counts == [2, 10]
    # A loop that seems to take no longer for more iterations takes at most the whole call.
    assert timing.time_iterations("x", call_of(lambda count: 3.0)).milliseconds == 3.0 / 160


def test_variants_are_valid_and_vary_what_units_depend_on():
    config = support.small_config(SplitConfig(), top_k=4, num_experts=16)
    config.batch = BatchConfig(sequence_length=64, tokens_per_worker=128, micro_batches=1)
    found = [variant.validate() for _, variant in profile.variants(config)]
    assert len(found) == 9
    for values in (
        {(v.batch.tokens_per_worker, v.batch.sequence_length) for v in found},
        {v.model.top_k for v in found},
        {v.model.num_experts for v in found},
        {v.model.vocab_size for v in found},
        {v.model.expert_width for v in found},
    ):
        assert len(values) > 1


def test_variants_tell_products_bytes_and_overhead_apart():
    variants = [variant for _, variant in profile.variants(balanced.get_config())]
    for unit in ("expert_forward", "expert_backward"):
        work = [expert_work(Sizes.of(variant))[unit] for variant in variants]
        columns = np.array([(1, one.products, one.num_bytes) for one in work])
        assert np.linalg.cond(columns / columns.max(axis=0)) < 25


def bfloat16(config):
    config.run.compute_dtype = Dtype.BFLOAT16
    return config


def test_an_odd_number_of_devices_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(profile.jax, "devices", lambda: [None] * 3)
    config = support.small_config(SplitConfig())
    with pytest.raises(ConfigError, match="devices = 3 must be an even number"):
        profile._one_stage(config)
    with pytest.raises(ConfigError, match=r"--out = .* must be in a directory that exists"):
        profile.main(bfloat16(config), str(tmp_path / "none" / "x.json"))
    with pytest.raises(ConfigError, match=r"compute_dtype = float64 must be bfloat16 for a pre"):
        profile.main(support.small_config(SplitConfig()), str(tmp_path / "x.json"))


def test_units_of_other_devices_are_not_taken():
    config = bfloat16(support.small_config(SplitConfig()))
    config.run.peak_tflops_per_device = 100
    with pytest.raises(ConfigError, match="--units = 'h100': peak_tflops = 989 must be 100, that"):
        profile.profile(config, "x.json", "default", "h100")
    config.run.peak_tflops_per_device = None
    with pytest.raises(
        ConfigError, match="--units = 'h100': source = 'datasheet' must be 'measure"
    ):
        profile.profile(config, "x.json", "default", "h100")


def test_a_link_that_no_line_fits_ends_a_profile_but_keeps_its_points(monkeypatch, tmp_path):
    faster = [{"rounds": 1, "num_bytes": size, "milliseconds": 1e5 / size} for size in (1e5, 1e8)]
    config = bfloat16(support.small_config(SplitConfig()))
    times = bench_phases.PhaseTimes(
        buckets(config)[0], 8, {unit: timing.Figure(unit, 1.0, 0.0) for unit in hardware.UNITS}
    )
    monkeypatch.setattr(profile, "measure_rates", lambda _: (Rates(1e12, 1e12), []))
    monkeypatch.setattr(bench_phases, "measure", lambda configs, *_: ([times] * len(configs), {}))
    kinds = ("many_to_many", "all_to_all", "all_reduce")
    monkeypatch.setattr(profile, "measure_transfers", lambda _: dict.fromkeys(kinds, faster))
    update = [{"parameters": 1e6, "milliseconds": 1}]
    monkeypatch.setattr(profile, "measure_updates", lambda *_: update)
    out = tmp_path / "noisy.json"
    with pytest.raises(RunError, match="the largest transfer took no longer than the smallest"):
        profile.main(config, str(out))
    points = json.loads((tmp_path / "noisy.points.json").read_text())
    assert points["all_reduce"] == faster and points["update"] == update
    assert not out.exists()


def test_fits_find_the_coefficients_that_made_the_times():
    rng = np.random.default_rng(0)
    work = [Work(*(10.0 ** rng.uniform((11, 11, 8), (12.5, 12.5, 9.5)))) for _ in range(8)]
    truth = np.array([0.2, 1.4, 2.0, 0.4])
    times = [
        1e-3 * truth @ (1, w.products / 1e12, w.scores / 1e12, w.num_bytes / 1e9) for w in work
    ]
    fit = fit_unit(list(zip(work, times, strict=True)), 800)
    assert fit.overhead_microseconds == pytest.approx(200, rel=1e-6)
    assert fit.milliseconds_per_product_tflop == pytest.approx(1.4)
    assert fit.milliseconds_per_score_tflop == pytest.approx(2.0)
    assert fit.milliseconds_per_gigabyte == pytest.approx(0.4)
    assert fit.r_squared == pytest.approx(1) and fit.num_points == 8
    for w, seconds in zip(work, times, strict=True):
        assert fit.seconds(w.products, w.scores, w.num_bytes) == pytest.approx(seconds)
    transfer = fit_transfer([(2, b, 2 * 1e-5 + b / 3e11) for b in (1e5, 1e6, 1e8)])
    assert transfer.latency_microseconds == pytest.approx(10)
    assert transfer.gigabytes_per_second == pytest.approx(300)
    assert transfer.seconds(1e6, 2) == pytest.approx(2e-5 + 1e6 / 3e11)
    line = [{"parameters": 1e9 * x, "milliseconds": 2 * x} for x in (1, 2)]
    assert fit_update({"update": line}) == pytest.approx(2)


def test_no_flop_is_fitted_as_faster_than_a_large_product():
    # Bytes and products grow together: without the bound all of it could be bytes.
    work = [Work(x, 0, x / 100) for x in (1e12, 2e12, 4e12)]
    fit = fit_unit([(w, 2e-3 * w.products / 1e12) for w in work], 800)
    assert fit.milliseconds_per_product_tflop >= 1 / 0.8 * (1 - 1e-9)
    assert fit.milliseconds_per_score_tflop == 0
    assert fit.seconds(2e12, 0, 2e10) == pytest.approx(4e-3)


def test_noise_shows_in_r_squared():
    work = [Work(x, 0, 0) for x in (1e12, 2e12, 3e12)]
    straight = fit_unit(list(zip(work, (1e-3, 2e-3, 3e-3), strict=True)), 2000)
    bent = fit_unit(list(zip(work, (1e-3, 3e-3, 2e-3), strict=True)), 2000)
    assert straight.r_squared == pytest.approx(1)
    assert bent.r_squared < 0.7


class FakePhases(bench_phases._PhaseBench):
    """A bench whose times are told: milliseconds of a transfer's parts, alone and beside one.

    parts: by (direction, number of parts). alone: by unit. slower: what each later measurement
    beside a transfer adds to it, by unit.
    """

    def __init__(self, parts, alone, slower):
        self._parts, self._alone = parts, alone
        self._slower = {name: iter(times) for name, times in slower.items()}
        self.asked = []

    def _transfer_time(self, direction, parts):
        self.asked.append((direction, parts))
        return self._parts[direction](parts)

    def program(self, name, parts=1):
        return name, parts

    def time(self, name, program, role):
        milliseconds = self._alone[name]
        if "beside" in program[0]:
            milliseconds += next(self._slower[name])
        return timing.Figure(name, milliseconds, 0.0)

    def lost(self):
        figures = {name: timing.Figure(name, ms, 0.0) for name, ms in self._alone.items()}
        return self.lost_beside_transfers(bench_phases.PhaseTimes(None, 0, figures))


ALONE = {
    "attention_forward": 2.0, "expert_forward": 3.0,
    "attention_backward": 6.0, "expert_backward": 8.0,
}  # fmt: skip


def test_units_are_timed_beside_the_longest_part_that_they_hide(monkeypatch):
    monkeypatch.setattr(bench_phases, "_overlaps", lambda program: True)
    slower = {
        "attention_forward": (0.2, 0.1, 0.3), "expert_forward": (0.4, -0.1, 0.5),
        "attention_backward": (0.0, 0.0, 0.0), "expert_backward": (1.0, 1.0, 9.0),
    }  # fmt: skip
    # 0.3 ms of each message are not its words; a part is at most half of the shorter phase.
    parts = {"forward": lambda n: 0.3 + 16 / n, "backward": lambda n: 2.5}
    bench = FakePhases(parts, ALONE, slower)
    lost = bench.lost()
    assert bench.asked == [("forward", n) for n in (1, 32)] + [("backward", 1)]
    transfers = {"forward": 0.3 + 16 / 32, "backward": 2.5}
    assert lost == pytest.approx({
        "attention_forward": 0.2 / transfers["forward"],
        # Once it was faster: nothing but noise is known of it.
        "expert_forward": 0.0,
        "attention_backward": 0.0,
        "expert_backward": 1.0 / transfers["backward"],
    })  # fmt: skip


def test_a_direction_without_a_part_that_is_hidden_says_nothing_of_its_units(monkeypatch):
    slower = {name: (1.0,) * 3 for name in ALONE}
    # No part of the backward phase's transfer is short enough, of the forward phase's the whole.
    parts = {"forward": lambda n: 1.0 / n, "backward": lambda n: 5.0}
    monkeypatch.setattr(bench_phases, "_overlaps", lambda program: True)
    bench = FakePhases(parts, ALONE, slower)
    assert bench.lost() == pytest.approx({"attention_forward": 1.0, "expert_forward": 1.0})
    assert max(n for _, n in bench.asked) <= bench_phases.MOST_PARTS
    # Nor does one that XLA runs in turn with the phase.
    monkeypatch.setattr(bench_phases, "_overlaps", lambda program: "forward" not in program[0])
    assert FakePhases(parts, ALONE, slower).lost() == {}
