"""What a run shows, also where nothing can be shown."""

import errno

import pytest

from disag_jax.display import PlainDisplay


@pytest.mark.parametrize(
    "error, is_raised",
    [(OSError(errno.ENOSPC, "No space left on device"), False), (BrokenPipeError(), True)],
)
def test_a_full_disk_costs_lines_and_a_closed_pipe_the_run(error, is_raised, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("builtins.print", fail)
    if is_raised:
        with pytest.raises(BrokenPipeError):
            PlainDisplay(1).say("a line")
    else:
        PlainDisplay(1).say("a line")
