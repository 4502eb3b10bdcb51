"""The benchmark of splits: which cases there are, and what its checks notice."""

import copy

import pytest

from benchmarks import splits
from configs import balanced
from disag_jax.config import PlacementKind
from disag_jax.planner import hardware

H100 = hardware.load("h100")


def test_cases_are_every_split_of_one_and_two_stages_and_one_twin():
    cases = splits.split_cases(balanced.get_config(), H100, 4, [4096, 8192])
    for length in (4096, 8192):
        ours = [case for case in cases if case.group == f"sequence {length}"]
        apart = [c.config.split for c in ours if c.placement == PlacementKind.DISAGGREGATED]
        found = {(s.stages, s.attention_workers, s.expert_workers) for s in apart}
        assert found == {(1, 1, 3), (1, 2, 2), (1, 3, 1), (2, 1, 1)}
        assert len(ours) == len(apart) + 1
        assert sum(case.is_pick for case in ours) == 1
        assert {case.config.batch.sequence_length for case in ours} == {length}
        assert len({case.config.tokens_per_step for case in ours}) == 1
        assert len({case.config.batch.tokens_per_worker for case in ours}) == 1


def test_growth_keeps_the_tokens_of_a_device():
    cases = splits.scaling_cases(balanced.get_config(), H100, 8)
    devices = [case.config.split.num_devices for case in cases]
    assert devices == [2, 4, 8]
    each = [c.config.tokens_per_step / d for c, d in zip(cases, devices, strict=True)]
    assert each == pytest.approx([each[0]] * 3, rel=0.05)


def result(length, share, speed, **more):
    return {
        "group": f"sequence {length}", "name": f"split {share}", "placement": "disaggregated",
        "is_pick": False, "attention_share": share, "sequence_length": length,
        "tokens_per_step": 1000, "tokens_per_second": speed, "losses": [3.0, 2.0],
        "predicted_tokens_per_second": 100.0, "devices": 4, **more,
    }  # fmt: skip


GOOD = [
    result(4096, 0.25, 100.0, is_pick=True),
    result(4096, 0.5, 90.0),
    result(8192, 0.25, 80.0),
    result(8192, 0.5, 81.0),
    result(8192, 0.75, 78.0, is_pick=True),
]


def changed(number, **fields):
    results = copy.deepcopy(GOOD)
    results[number] |= fields
    return results


def test_good_results_pass_in_any_order():
    assert splits.check(GOOD, 1e-2) == splits.check(GOOD[::-1], 1e-2) == []
    twin = result(16_384, 0.5, 70.0, placement="colocated")
    assert splits.check([*GOOD, twin], 1e-2) == []


@pytest.mark.parametrize(
    "number, fields, words",
    [
        (1, {"losses": [3.0, 2.1]}, "losses of split 0.25 and split 0.5 differ"),
        (1, {"losses": [3.0, float("nan")]}, "losses of split 0.25 and split 0.5 differ"),
        (4, {"tokens_per_second": 76.0}, "sequence 8192: the pick, split 0.75, is slower than"),
        (2, {"tokens_per_second": 82.0}, "must move toward attention"),
    ],
)
def test_what_does_not_hold_is_said(number, fields, words):
    (wrong,) = splits.check(changed(number, **fields), 1e-2)
    assert words in wrong


def test_growth_is_held_against_the_prediction():
    grown = result(8192, 0.5, 91.0, group=splits.SCALING)
    assert "91 tokens/s of 100 predicted" in splits.check([grown], 1e-2)[0]
    assert splits.check([grown | {"tokens_per_second": 93.0}], 1e-2) == []
