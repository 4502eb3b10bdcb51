"""The check that transfers run under compute sees programs and traces in which they do not."""

import pytest

from disag_jax import overlap
from disag_jax.errors import RunError
from disag_jax.trace import DeviceTime

LOOP = """\
HloModule jit_training_pipeline, is_scheduled=true

%steady (arg: (u16[8])) -> (u16[8]) {{
  %start.1 = (u16[8], u16[8]) collective-permute-start(%a), metadata={{op_name="x/m2n_backward/p"}}
  {before}
  %done.1 = u16[8] collective-permute-done(%start.1), metadata={{op_name="x/m2n_backward/p"}}
  %start.2 = (u16[8], u16[8]) collective-permute-start(%b), metadata={{op_name="x/m2n_forward/p"}}
  %conditional.2 = u16[8] conditional(%p, %b, %c), branch_computations={{%f, %g}}
  %done.2 = u16[8] collective-permute-done(%start.2), metadata={{op_name="x/m2n_forward/p"}}
}}
"""
UNIT = "%conditional.1 = u16[8] conditional(%p, %b, %c), branch_computations={%f, %g}"


def test_transfers_over_a_phase_pass():
    steady = overlap.check_program(LOOP.format(before=UNIT))
    assert [(t.scope, t.conditionals) for t in steady] == [("m2n_backward", 1), ("m2n_forward", 1)]


def test_a_bare_transfer_is_found():
    with pytest.raises(RunError, match=r"must span a conditional: m2n_backward"):
        overlap.check_program(LOOP.format(before="%x = u16[8] add(%a, %b)"))


def test_synchronous_transfers_are_found():
    text = LOOP.format(before=UNIT).replace("-start(", "(").replace("-done(", "-other(")
    with pytest.raises(RunError, match=r"must have asynchronous transfers in both directions"):
        overlap.check_program(text)


def test_an_unscheduled_program_is_refused():
    with pytest.raises(RunError, match=r"order of execution"):
        overlap.check_program(LOOP.format(before=UNIT).replace("is_scheduled=true", ""))


def test_a_trace_passes_if_compute_hides_what_it_could():
    # Communication takes twice the compute: half could be hidden, and 40% were.
    overlap.check_trace({"gpu": DeviceTime(2.0, 1.0, 2.0, 1.2)})
    with pytest.raises(RunError, match=r"10% of the communication was hidden, .* could hide 50%"):
        overlap.check_trace({"gpu": DeviceTime(2.0, 1.0, 2.0, 1.8)})
