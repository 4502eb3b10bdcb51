"""The experiment configuration: what to train, and on which split of the devices.

A file in `configs/` returns a `Config`; `train.py --config configs/tiny.py --config.model.top_k=2`
overrides single fields with type conversion. Overrides are set after construction, so derived
values are properties and `Config.validate` runs once after parsing.
"""

import dataclasses

from disag_jax.config_rules import require, type_rule
from disag_jax.config_sections import (
    BatchConfig,
    DataConfig,
    Dtype,
    ModelConfig,
    MuDtype,
    OptimizerConfig,
    Overlap,
    PlacementKind,
    Recompute,
    RouterScore,
    RunConfig,
    SplitConfig,
)
from disag_jax.errors import ConfigError

__all__ = [
    "BatchConfig", "Config", "ConfigError", "DataConfig", "Dtype", "ModelConfig", "MuDtype",
    "OptimizerConfig", "Overlap", "PlacementKind", "Recompute", "RouterScore", "RunConfig",
    "SplitConfig",
]  # fmt: skip


@dataclasses.dataclass
class Config:
    """One experiment."""

    name: str = "unnamed"
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    split: SplitConfig = dataclasses.field(default_factory=SplitConfig)
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)

    @property
    def layers_per_stage(self) -> int:
        """v, rows of weights per worker: ceil(L / p)."""
        return -(-self.model.num_layers // self.split.stages)

    @property
    def fanout(self) -> int:
        """Copies of one token that travel at most: one per expert worker it needs."""
        return min(self.model.top_k, self.split.expert_workers)

    @property
    def sequences_per_step(self) -> int:
        split, batch = self.split, self.batch
        per_micro_batch = split.replicas * split.attention_workers * batch.sequences_per_worker
        return batch.micro_batches * per_micro_batch

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.batch.sequence_length

    def validate(self) -> "Config":
        """Returns itself, or raises ConfigError for the first broken rule."""
        self._check_types()
        self._check_ranges()
        require(
            self.split.placement is not PlacementKind.AUTO,
            "split.placement",
            self.split.placement.value,
            "disaggregated or colocated here: only train.py chooses one (disag_jax.plan shows it)",
        )
        model, batch, split, optimizer = self.model, self.batch, self.split, self.optimizer
        require(
            model.top_k <= model.num_experts,
            "model.top_k",
            model.top_k,
            f"at most model.num_experts ({model.num_experts})",
        )
        require(
            not model.normalize_gates or model.top_k > 1 or model.num_experts == 1,
            "model.normalize_gates",
            model.normalize_gates,
            "False with model.top_k = 1: a single normalized gate is always 1, and the router "
            "would learn nothing from the loss",
        )
        require(
            model.num_heads % model.num_kv_heads == 0,
            "model.num_heads",
            model.num_heads,
            f"a multiple of model.num_kv_heads ({model.num_kv_heads})",
        )
        require(model.head_dim % 2 == 0, "model.head_dim", model.head_dim, "even, for RoPE")
        require(
            batch.tokens_per_worker % batch.sequence_length == 0,
            "batch.tokens_per_worker",
            batch.tokens_per_worker,
            f"whole sequences, a multiple of batch.sequence_length ({batch.sequence_length})",
        )
        require(
            split.expert_workers <= model.num_experts,
            "split.expert_workers",
            split.expert_workers,
            f"at most model.num_experts ({model.num_experts}), so that each holds an expert",
        )
        require(
            not split.colocated or split.attention_workers % split.expert_workers == 0,
            "split.expert_workers",
            split.expert_workers,
            f"a divisor of split.attention_workers ({split.attention_workers}) with "
            "split.placement = colocated, where groups of that many devices share the experts",
        )
        per_worker = -(-model.num_experts // split.expert_workers)
        require(
            not self.optimizer.sharded or per_worker % split.expert_holders == 0,
            "optimizer.sharded",
            self.optimizer.sharded,
            f"False where the {per_worker} experts of a worker do not divide among the "
            f"{split.expert_holders} devices that hold them",
        )
        require(
            not split.colocated or split.hop == 1,
            "split.hop",
            split.hop,
            "1 with split.placement = colocated",
        )
        require(
            split.stages <= model.num_layers,
            "split.stages",
            split.stages,
            f"at most model.num_layers ({model.num_layers}), so that each holds a layer",
        )
        require(
            optimizer.final_learning_rate <= optimizer.peak_learning_rate,
            "optimizer.final_learning_rate",
            optimizer.final_learning_rate,
            f"at most optimizer.peak_learning_rate ({optimizer.peak_learning_rate})",
        )
        self._check_overlap()
        self._check_data()
        return self

    def _check_overlap(self):
        split, tokens = self.split, self.batch.tokens_per_worker
        overlaps, chunked = split.overlap is not Overlap.NONE, split.overlap is Overlap.CHUNKED
        degrees = {name: getattr(split, name) for name in ("forward_chunks", "backward_chunks")}
        for holds, rule in (
            (
                split.overlap is not Overlap.AUTO,
                "none, chunked or interleaved here: only a training run chooses one "
                "(disag_jax.plan shows it)",
            ),
            (
                not overlaps or split.colocated,
                "none with split.placement = disaggregated, whose transfers are always hidden",
            ),
            (
                not overlaps or split.expert_workers > 1,
                "none with split.expert_workers = 1, where nothing is exchanged",
            ),
            (
                not chunked or max(degrees.values()) > 1,
                "none where split.forward_chunks and split.backward_chunks are 1",
            ),
            (
                split.overlap is not Overlap.INTERLEAVED or self.batch.micro_batches > 1,
                "none or chunked with batch.micro_batches = 1, beside which no other is under way",
            ),
        ):
            require(holds, "split.overlap", split.overlap, rule)
        for name, degree in degrees.items():
            field = f"split.{name}"
            require(chunked or degree == 1, field, degree, "1 unless split.overlap = chunked")
            rule = f"a divisor of batch.tokens_per_worker ({tokens})"
            require(tokens % degree == 0, field, degree, rule)
        require(
            self.run.recompute is not Recompute.NONE or len(set(degrees.values())) == 1,
            "run.recompute",
            self.run.recompute,
            "full or selective where split.forward_chunks and split.backward_chunks differ: the "
            "products of one chunk are not those of another",
        )

    def _check_data(self):
        data = self.data
        require(
            not (data.sources and data.paths),
            "data.paths",
            data.paths,
            "empty where data.sources are given",
        )
        for name in ("weights", "held_out_sources"):
            value = getattr(data, name)
            require(data.sources or not value, f"data.{name}", value, "empty without data.sources")
        require(
            not data.weights or len(data.weights) == len(data.sources),
            "data.weights",
            data.weights,
            f"as many as data.sources ({len(data.sources)}), or empty",
        )
        require(
            all(weight >= 0 for weight in data.weights) and (any(data.weights) or not data.weights),
            "data.weights",
            data.weights,
            "0 or more each, and not all 0",
        )

    def _check_types(self):
        """Checks every field's type; NaN and infinity are no numbers here."""
        for section in dataclasses.fields(self):
            values = getattr(self, section.name)
            if not dataclasses.is_dataclass(values):
                continue
            for field in dataclasses.fields(values):
                value = getattr(values, field.name)
                holds, rule = type_rule(field.type)
                require(holds(value), f"{section.name}.{field.name}", value, rule)

    def _check_ranges(self):
        """Checks every field that is limited by itself alone."""
        for section, names in _POSITIVE.items():
            for name in names:
                value = getattr(getattr(self, section), name)
                require(value > 0, f"{section}.{name}", value, "greater than 0")
        for section, names in _NOT_NEGATIVE.items():
            for name in names:
                value = getattr(getattr(self, section), name)
                require(value >= 0, f"{section}.{name}", value, "0 or more")
        factor = self.model.capacity_factor
        if factor is not None:
            require(factor > 0, "model.capacity_factor", factor, "greater than 0, or None")
        peak = self.run.peak_tflops_per_device
        if peak is not None:
            require(peak > 0, "run.peak_tflops_per_device", peak, "greater than 0, or None")
        share = self.split.loss_share
        if share is not None:
            require(0 < share <= 1, "split.loss_share", share, "above 0 and at most 1, or None")
        factor = self.run.straggler_factor
        require(factor > 1, "run.straggler_factor", factor, "greater than 1")
        require(self.split.hop in (1, 2), "split.hop", self.split.hop, "1 or 2")
        require(
            all(factor >= 1 for factor in self.split.bucket_factors),
            "split.bucket_factors",
            self.split.bucket_factors,
            "numbers of at least 1",
        )
        fraction = self.data.held_out_fraction
        require(0 < fraction < 1, "data.held_out_fraction", fraction, "between 0 and 1")
        for name in ("b1", "b2"):
            value = getattr(self.optimizer, name)
            require(0 <= value < 1, f"optimizer.{name}", value, "at least 0 and below 1")
        # JAX drops the bits of a larger seed without a word.
        require(self.run.seed < 2**32, "run.seed", self.run.seed, "below 2**32")


_POSITIVE = {
    "model": (
        "vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim",
        "rope_theta", "norm_eps", "num_experts", "top_k", "expert_width", "gate_scale", "init_std",
        "embedding_init_std",
    ),
    "split": (
        "replicas", "stages", "attention_workers", "expert_workers", "forward_chunks",
        "backward_chunks",
    ),
    "batch": ("sequence_length", "tokens_per_worker", "micro_batches"),
    "optimizer": ("peak_learning_rate", "eps", "max_grad_norm"),
    "run": ("num_steps", "loss_chunk", "log_every", "keep_checkpoints",
        "max_skipped_steps", "max_failed_checkpoints", "start_timeout_seconds",
        "heartbeat_timeout_seconds", "stall_timeout_seconds",
    ),
}  # fmt: skip

_NOT_NEGATIVE = {
    "model": ("num_shared_experts", "balance_loss_weight", "z_loss_weight", "bias_update_rate"),
    "data": ("prefetch_steps",),
    "optimizer": ("final_learning_rate", "warmup_steps", "weight_decay"),
    "run": ("seed", "eval_every", "eval_batches", "checkpoint_every", "keep_checkpoint_every"),
}
