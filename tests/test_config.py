"""Each rule of a config names field, value and rule; every config in configs/ obeys them all."""

import dataclasses
import enum
import importlib.util
import math
from pathlib import Path

import pytest

from disag_jax.config import (
    Config,
    ConfigError,
    Dtype,
    Overlap,
    PlacementKind,
    Recompute,
    RouterScore,
)

CONFIGS = sorted(
    path for path in (Path(__file__).parents[1] / "configs").glob("*.py") if path.stem != "__init__"
)
NAN, INF = math.nan, math.inf


def changed(**fields) -> Config:
    """A small valid config with some fields changed, named `section__field`."""
    config = Config()
    for name, value in fields.items():
        section, field = name.split("__")
        assert hasattr(getattr(config, section), field), name
        setattr(getattr(config, section), field, value)
    return config


def check_refused(field: str, value, rule: str, **others):
    """The error is one sentence: the field, the value and the rule."""
    name = field.replace(".", "__")
    with pytest.raises(ConfigError) as refused:
        changed(**{name: value}, **others).validate()
    sentence = str(refused.value)
    shown = value.value if isinstance(value, enum.Enum) else value
    assert sentence.startswith(f"{field} = {shown!r} must be "), sentence
    assert rule in sentence and "\n" not in sentence, sentence


def fields(section: str, names: str) -> list[str]:
    return [f"{section}.{name}" for name in names.split()]


POSITIVE = [
    *fields("model", "vocab_size num_layers d_model num_heads num_kv_heads head_dim rope_theta"),
    *fields("model", "norm_eps num_experts top_k expert_width gate_scale"),
    *fields("model", "init_std embedding_init_std"),
    *fields("split", "replicas stages attention_workers expert_workers"),
    *fields("split", "forward_chunks backward_chunks"),
    *fields("batch", "sequence_length tokens_per_worker micro_batches"),
    *fields("optimizer", "peak_learning_rate eps max_grad_norm"),
    *fields("run", "num_steps loss_chunk log_every keep_checkpoints"),
    *fields("run", "start_timeout_seconds heartbeat_timeout_seconds stall_timeout_seconds"),
    *fields("run", "max_skipped_steps max_failed_checkpoints"),
]


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("field", POSITIVE)
def test_must_be_positive(field, value):
    check_refused(field, value, "greater than 0")


NOT_NEGATIVE = [
    *fields("model", "num_shared_experts balance_loss_weight z_loss_weight bias_update_rate"),
    *fields("data", "prefetch_steps"),
    *fields("optimizer", "final_learning_rate warmup_steps weight_decay"),
    *fields("run", "seed eval_every eval_batches checkpoint_every keep_checkpoint_every"),
]


@pytest.mark.parametrize("field", NOT_NEGATIVE)
def test_must_not_be_negative(field):
    check_refused(field, -1, "0 or more")
    changed(**{field.replace(".", "__"): 0}).validate()


RANGES = [
    ("model.capacity_factor", 0.0, "greater than 0"),
    ("model.capacity_factor", -1.25, "greater than 0"),
    ("run.peak_tflops_per_device", 0.0, "greater than 0"),
    ("run.straggler_factor", 1.0, "greater than 1"),
    ("split.hop", 0, "1 or 2"),
    ("split.hop", 3, "1 or 2"),
    ("split.bucket_factors", (1.25, 0.5), "at least 1"),
    ("split.loss_share", 0.0, "above 0 and at most 1"),
    ("split.loss_share", 1.01, "above 0 and at most 1"),
    ("data.held_out_fraction", 0.0, "between 0 and 1"),
    ("data.held_out_fraction", 1.0, "between 0 and 1"),
    ("data.weights", (1.0,), "empty without data.sources"),
    ("optimizer.b1", 1.0, "below 1"),
    ("optimizer.b2", -0.5, "at least 0"),
    ("run.seed", 2**32, "below 2**32"),
]


@pytest.mark.parametrize("field, value, rule", RANGES)
def test_must_be_in_range(field, value, rule):
    check_refused(field, value, rule)


def test_every_number_has_a_range():
    ranged = {*POSITIVE, *NOT_NEGATIVE, *(field for field, _, _ in RANGES)}
    for section in dataclasses.fields(Config):
        if section.name == "name":
            continue
        for field in dataclasses.fields(section.type):
            if field.type in (int, float, float | None, tuple[float, ...]):
                assert f"{section.name}.{field.name}" in ranged


TWIN = {"split__placement": PlacementKind.COLOCATED}
SHARING = {**TWIN, "split__attention_workers": 2, "split__expert_workers": 2}
CHUNKED = {**SHARING, "split__overlap": Overlap.CHUNKED, "split__backward_chunks": 2}
SOURCES = {"data__sources": ("a.bin", "b.npy")}

RELATIONS = [
    ("model.top_k", 9, "at most model.num_experts (8)", {}),
    ("model.num_heads", 6, "a multiple of model.num_kv_heads (4)", {}),
    ("model.head_dim", 15, "even", {}),
    ("batch.tokens_per_worker", 200, "a multiple of batch.sequence_length (128)", {}),
    ("batch.tokens_per_worker", 64, "a multiple of batch.sequence_length (128)", {}),
    ("split.expert_workers", 9, "at most model.num_experts (8)", {}),
    ("split.stages", 5, "at most model.num_layers (4)", {}),
    (
        "split.expert_workers", 3, "a divisor of split.attention_workers (4)",
        {**TWIN, "split__attention_workers": 4},
    ),
    ("split.hop", 2, "1 with split.placement = colocated", TWIN),
    ("optimizer.sharded", True, "False where the 4 experts of a worker do not divide among the 3",
     {"split__replicas": 3, "split__expert_workers": 2}),
    ("split.overlap", Overlap.INTERLEAVED, "none with split.placement = disaggregated", {}),
    ("split.overlap", Overlap.CHUNKED, "none with split.expert_workers = 1", TWIN),
    ("split.overlap", Overlap.CHUNKED, "none where split.forward_chunks and", SHARING),
    (
        "split.overlap", Overlap.INTERLEAVED, "none or chunked with batch.micro_batches = 1",
        {**SHARING, "batch__micro_batches": 1},
    ),
    ("split.forward_chunks", 2, "1 unless split.overlap = chunked", SHARING),
    (
        "split.backward_chunks", 2, "1 unless split.overlap = chunked",
        {**SHARING, "split__overlap": Overlap.INTERLEAVED},
    ),
    ("split.forward_chunks", 3, "a divisor of batch.tokens_per_worker (512)", CHUNKED),
    ("split.forward_chunks", 1024, "a divisor of batch.tokens_per_worker (512)", CHUNKED),
    ("run.recompute", Recompute.NONE, "full or selective where split.forward_chunks", CHUNKED),
    (
        "optimizer.final_learning_rate", 1e-2, "at most optimizer.peak_learning_rate (0.001)",
        {},
    ),
    ("model.top_k", 2, "at most model.num_experts (1)", {"model__num_experts": 1}),
    ("data.paths", ("text",), "empty where data.sources are given", SOURCES),
    ("data.held_out_sources", ("c.bin",), "empty without data.sources", {}),
    ("data.weights", (1.0,), "as many as data.sources (2), or empty", SOURCES),
    ("data.weights", (1.0, 1.0, 1.0), "as many as data.sources (2), or empty", SOURCES),
    ("data.weights", (2.0, -1.0), "0 or more each, and not all 0", SOURCES),
    ("data.weights", (0.0, 0), "0 or more each, and not all 0", SOURCES),
    ("model.normalize_gates", True, "False with model.top_k = 1", {"model__top_k": 1}),
]  # fmt: skip


@pytest.mark.parametrize("field, value, rule, others", RELATIONS)
def test_must_fit_other_fields(field, value, rule, others):
    check_refused(field, value, rule, **others)


TYPES = [
    *[(field, value, "an int")
      for field in ("model.top_k", "split.stages", "batch.micro_batches", "run.seed")
      for value in (2.0, "2", None, True, NAN)],
    *[(field, value, "a finite number")
      for field in ("model.rope_theta", "optimizer.eps", "data.held_out_fraction")
      for value in (NAN, INF, -INF, "0.1", None, True)],
    *[("model.capacity_factor", value, "a finite number, or None") for value in (NAN, INF, "1")],
    *[("split.bucket_factors", value, "a tuple of finite numbers")
      for value in (1.25, [1.25], ("1.25",), (NAN,), (INF,))],
    *[("data.paths", value, "a tuple of strings") for value in ("text", ["text"], (1,))],
    ("model.normalize_gates", 1, "True or False"),
    ("model.router_score", "softmax", "one of RouterScore.SOFTMAX, RouterScore.SIGMOID"),
    ("split.placement", "colocated", "one of PlacementKind.DISAGGREGATED, PlacementKind.COLOCATED"),
    ("split.overlap", "both", "one of Overlap.NONE, Overlap.CHUNKED, Overlap.INTERLEAVED"),
    ("run.compute_dtype", "float16", "one of Dtype.BFLOAT16, Dtype.FLOAT32, Dtype.FLOAT64"),
]  # fmt: skip


@pytest.mark.parametrize("field, value, rule", TYPES)
def test_must_have_its_type(field, value, rule):
    check_refused(field, value, rule)


ALLOWED = [
    {"model__capacity_factor": None},
    {"model__capacity_factor": 1},
    {"model__top_k": 8},
    {"model__num_kv_heads": 1},
    {"model__router_score": RouterScore.SIGMOID},
    {"split__bucket_factors": ()},
    {"split__bucket_factors": (1, 3)},
    {"split__stages": 4, "split__expert_workers": 8, "split__hop": 2},
    {"batch__micro_batches": 1},
    {**CHUNKED, "split__forward_chunks": 512},
    {**CHUNKED, "split__forward_chunks": 2, "run__recompute": Recompute.NONE},
    {**SHARING, "split__overlap": Overlap.INTERLEAVED, "batch__micro_batches": 2},
    {"data__paths": ("a", "b")},
    {**SOURCES, "data__weights": (1, 0.0), "data__held_out_sources": ("c.bin",)},
    {"data__prefetch_steps": 0, "data__attend_across_documents": False},
    {"optimizer__b1": 0.0},
    {"optimizer__final_learning_rate": 1e-3},
    # A run may end within its warm-up: a trial of a long one does.
    {"optimizer__warmup_steps": 2000, "run__num_steps": 1},
    {"run__compute_dtype": Dtype.FLOAT64, "run__seed": 2**32 - 1},
]


@pytest.mark.parametrize("limits", ALLOWED, ids=str)
def test_limits_are_allowed(limits):
    config = changed(**limits)
    assert config.validate() is config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_file_is_valid(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    assert config.validate() is config
    assert config.name == path.stem
    assert f"python train.py --config configs/{path.name}" in module.__doc__
    # Every call is a new object: overrides of one run must not reach another.
    assert module.get_config().model is not config.model


def test_there_are_config_files():
    assert {"deepseek_moe_16b", "gpt_oss_120b", "qwen3_235b"} <= {path.stem for path in CONFIGS}
