"""Traces of steps: which steps, what is in the files, and that programs carry the code's names."""

import dataclasses
import re
import time

import jax
import jax.numpy as jnp
import pytest

from disag_jax import profiling
from disag_jax.config import ConfigError, SplitConfig
from tests import support


@pytest.mark.parametrize("text, steps", [(None, None), ("3:5", range(3, 5)), ("0:1", range(1))])
def test_steps_to_profile(text, steps):
    assert profiling.parse_steps(text, num_steps=4) == steps


@pytest.mark.parametrize("text", ["", "3", "5:3", "4:4", "-1:2", "a:b", "1:2:3", "1:", "9:10"])
def test_steps_that_name_none_are_refused(text):
    with pytest.raises(ConfigError, match=r"--profile_steps = .* must be begin:end"):
        profiling.parse_steps(text, num_steps=9)


def test_stopwatch_adds_up_parts_of_one_name():
    watch = profiling.Stopwatch()
    for _ in range(2):
        with watch("pipeline"):
            time.sleep(0.01)
    with watch("update"):
        pass
    seconds = watch.seconds
    assert set(seconds) == {"pipeline_seconds", "update_seconds"}
    assert 0.02 <= seconds["pipeline_seconds"] < 1 and seconds["update_seconds"] < 0.01


@dataclasses.dataclass
class FakeState:
    """As much of a training state as the profiler looks at."""

    step: int

    def wait(self):
        pass


def test_trace_has_the_steps_and_the_named_scopes(tmp_path):
    @jax.jit
    def double(x):
        with jax.named_scope("scope_of_the_test"):
            return jnp.sin(x) * 2

    profiler = profiling.Profiler(tmp_path, range(2, 4))
    changed = []
    for step in range(6):
        changed.append(profiler.before_step(FakeState(step)))
        with jax.profiler.StepTraceAnnotation("step", step_num=step):
            double(jnp.ones(8)).block_until_ready()
    profiler.close()
    assert changed == [False, False, True, False, True, False]
    (trace,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    assert b"scope_of_the_test" in trace.read_bytes()
    steps = [
        dict(event.stats)["step_num"]
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "step"
    ]
    assert sorted(steps) == [2, 3]
    assert list(tmp_path.glob("plugins/profile/*/*.trace.json.gz"))  # what Perfetto opens


def test_a_trace_ends_with_the_run(tmp_path):
    written = []
    profiler = profiling.Profiler(tmp_path, range(1, 100), written.append)
    profiler.before_step(FakeState(1))
    assert not written
    profiler.close()
    profiler.close()
    assert written == [tmp_path]
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))


def test_a_trace_that_cannot_be_written_is_lost_and_said(tmp_path):
    said, written = [], []
    profiler = profiling.Profiler(tmp_path / "trace", range(1, 2), written.append, said.append)
    profiler.before_step(FakeState(1))
    (tmp_path / "trace").write_text("in the way")
    assert profiler.before_step(FakeState(2))
    profiler.close()
    assert not written
    assert len(said) == 1 and said[0].startswith(f"warning: the trace in {tmp_path}/trace is lost")


def test_programs_carry_the_names_of_the_code():
    split = SplitConfig(stages=1, attention_workers=1, expert_workers=2)
    stepper = support.make_stepper(support.small_config(split))
    program = stepper.gradient_program(stepper.chooser.current)
    text = program.lower(*stepper.abstract_arguments()).as_text(debug_info=True)
    for scope in (
        "gather_weights", "attention_forward", "attention_backward", "expert_forward", "combine",
        "expert_backward", "attention_block", "causal_attention", "router", "choose_experts",
        "dispatch", "order_by_expert", "gate_up", "swiglu", "down", "sum_experts", "loss",
        "m2n_forward", "m2n_backward", "add_gradients", "reduce_gradients", "reduce_metrics",
    ):  # fmt: skip
        assert re.search(rf'["/]{scope}["/]', text), scope
    for segment in stepper.schedule.segments:
        assert re.search(rf'["/]{segment.name}/while', text)
    assert "jit_training_pipeline" in text
    for name, lowered in stepper.manager.lower_updates().items():
        assert f"jit_update_{name}" in lowered.as_text()
