"""The check that transfers run under compute sees programs and traces in which they do not."""

import pytest

from configs import balanced
from disag_jax import overlap
from disag_jax.config import Overlap, PlacementKind, SplitConfig
from disag_jax.errors import ConfigError, RunError
from disag_jax.trace import DeviceTime

LOOP = """\
HloModule jit_training_pipeline, is_scheduled=true

%inner (arg: u16[8]) -> u16[8] {{
  %x = u16[8] negate(%arg), metadata={{op_name="x/cond/branch_1_fun/attention_backward/neg"}}
}}

%f (arg: u16[8]) -> u16[8] {{
  %y = u16[8] fusion(%arg), kind=kLoop, calls=%inner
}}

%g (arg: u16[8]) -> u16[8] {{
  %z = u16[8] negate(%arg), metadata={{op_name="x/embed/neg"}}
}}

%steady (arg: (u16[8])) -> (u16[8]) {{
  %start.1 = (u16[8], u16[8]) collective-permute-start(%a), metadata={{op_name="x/m2n_backward/p"}}
  {before}
  %done.1 = u16[8] collective-permute-done(%start.1), metadata={{op_name="x/m2n_backward/p"}}
  %start.2 = (u16[8], u16[8]) collective-permute-start(%b), metadata={{op_name="x/m2n_forward/p"}}
  %conditional.2 = u16[8] conditional(%p, %b, %c), branch_computations={{%f, %g}}
  %done.2 = u16[8] collective-permute-done(%start.2), metadata={{op_name="x/m2n_forward/p"}}
}}
"""
# The same with the exchanges of the twin.
TWIN_LOOP = LOOP.replace("collective-permute", "all-to-all").replace("m2n", "all_to_all")
BARE = """\
  %{name} = ((u16[8]), u16[8]) all-to-all-start(%a), metadata={{op_name="x/all_to_all_backward/p"}}
  %done.{name} = u16[8] all-to-all-done(%{name}), metadata={{op_name="x/all_to_all_backward/p"}}"""
APART = SplitConfig()
INTERLEAVED = SplitConfig(placement=PlacementKind.COLOCATED, overlap=Overlap.INTERLEAVED)
CHUNKED = SplitConfig(
    placement=PlacementKind.COLOCATED, overlap=Overlap.CHUNKED, forward_chunks=2, backward_chunks=4
)
UNIT = "%conditional.1 = u16[8] conditional(%p, %b, %c), branch_computations={%g, %f}"
OTHER = UNIT.replace("%f", "%g")


@pytest.mark.parametrize(
    "loop, split, kind", [(LOOP, APART, "m2n"), (TWIN_LOOP, INTERLEAVED, "all_to_all")]
)
def test_transfers_over_a_phase_pass(loop, split, kind):
    steady = overlap.check_program(loop.format(before=UNIT), split)
    assert [(t.scope, t.conditionals) for t in steady] == [
        (f"{kind}_backward", 1), (f"{kind}_forward", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("before", ["%x = u16[8] add(%a, %b)", OTHER])
@pytest.mark.parametrize("loop, split", [(LOOP, APART), (TWIN_LOOP, INTERLEAVED)])
def test_a_transfer_over_no_unit_is_found(loop, split, before):
    with pytest.raises(RunError, match=r"must span a conditional: (m2n|all_to_all)_backward$"):
        overlap.check_program(loop.format(before=before), split)


def test_branches_may_be_named_one_by_one():
    named = UNIT.replace(
        "branch_computations={%g, %f}", "true_computation=%f, false_computation=%g"
    )
    assert overlap.check_program(LOOP.format(before=named), APART)


def test_chunks_leave_two_transfers_bare_and_no_more():
    def program(num_bare):
        pairs = [BARE.format(name=f"bare.{i}") for i in range(num_bare)]
        return TWIN_LOOP.format(before="\n".join([UNIT, *pairs]))

    assert len(overlap.check_program(program(2), CHUNKED)) == 4
    with pytest.raises(RunError, match=r"all_to_all_backward \(all but 2\)"):
        overlap.check_program(program(3), CHUNKED)


def test_the_twin_is_not_excused_by_transfers_between_stages():
    with pytest.raises(RunError, match=r"must have transfers in both directions"):
        overlap.check_program(LOOP.format(before=UNIT), INTERLEAVED)


def test_synchronous_transfers_are_found():
    text = LOOP.format(before=UNIT).replace("-start(", "(").replace("-done(", "-other(")
    with pytest.raises(RunError, match=r"conditional: m2n_forward, m2n_backward$"):
        overlap.check_program(text, APART)


def test_an_unscheduled_program_is_refused():
    with pytest.raises(RunError, match=r"order of execution"):
        overlap.check_program(LOOP.format(before=UNIT).replace("is_scheduled=true", ""), APART)


def test_a_trace_passes_if_compute_hides_what_it_could():
    # Communication takes twice the compute: half could be hidden, and 40% were.
    overlap.check_trace({"gpu": DeviceTime(2.0, 1.0, 2.0, 1.2)}, APART)
    with pytest.raises(
        RunError, match=r"10% of the transfers were hidden, and 25% must be, of the 50%"
    ):
        overlap.check_trace({"gpu": DeviceTime(2.0, 1.0, 2.0, 1.8)}, APART)
    # Of 2 and 4 chunks on the way there and back, half and a quarter are at the ends.
    with pytest.raises(
        RunError, match=r"15% of the transfers were hidden, and 16% must be, of the 31%"
    ):
        overlap.check_trace({"gpu": DeviceTime(2.0, 1.0, 2.0, 1.7)}, CHUNKED)


def test_a_trace_without_transfers_proves_nothing():
    with pytest.raises(RunError, match="gpu 1: the trace must hold transfers"):
        times = {"gpu 0": DeviceTime(2.0, 1.0, 2.0, 1.2), "gpu 1": DeviceTime(1.0, 1.0, 0.0, 0.0)}
        overlap.check_trace(times, APART)


def test_a_directory_with_another_trace_is_refused(tmp_path):
    (tmp_path / "old").touch()
    for workdir in (tmp_path, tmp_path / "old"):
        with pytest.raises(ConfigError, match=r"workdir = .* must be a new or empty directory"):
            overlap.main(balanced.get_config(), str(workdir), "default")


def test_half_micro_batches_must_hide_four_fifths_where_compute_is_longer():
    overlap.check_trace({"gpu": DeviceTime(3.0, 2.0, 1.0, 0.2)}, INTERLEAVED)
    with pytest.raises(RunError, match=r"75% of the transfers were hidden, and 80% must be"):
        overlap.check_trace({"gpu": DeviceTime(3.0, 2.0, 1.0, 0.25)}, INTERLEAVED)
    overlap.check_trace({"gpu": DeviceTime(3.0, 1.0, 1.5, 0.9)}, INTERLEAVED)
