"""Times of a device from the spans of its trace."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disag_jax import trace
from disag_jax.errors import ConfigError

spans = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=8)


@given(spans, spans)
def test_times_equal_a_count_of_nanoseconds(compute, communication):
    if not compute and not communication:
        return
    compute, communication = ([(b, b + n) for b, n in part] for part in (compute, communication))

    def covered(part):
        at = np.zeros(50, bool)
        for begin, end in part:
            at[begin:end] = True
        return at

    found = trace.device_time(compute, communication)
    ends = [end for _, end in compute + communication]
    begins = [begin for begin, _ in compute + communication]
    assert found.span * 1e9 == pytest.approx(max(ends) - min(begins))
    assert found.compute * 1e9 == pytest.approx(covered(compute).sum())
    assert found.communication * 1e9 == pytest.approx(covered(communication).sum())
    exposed = (covered(communication) & ~covered(compute)).sum()
    assert found.exposed * 1e9 == pytest.approx(exposed, abs=1e-6)


def test_hidden_share():
    assert trace.device_time([(0, 10)], [(5, 15)]).hidden_share == pytest.approx(0.5)
    assert trace.device_time([(0, 10)], []).hidden_share == 1


def test_a_directory_without_a_gpu_trace_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"must hold the trace of a GPU"):
        trace.device_times(tmp_path)
