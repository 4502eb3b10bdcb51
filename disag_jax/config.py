"""The experiment configuration: what to train, and on which split of the devices.

A file in `configs/` returns a `Config`; `train.py --config configs/tiny.py --config.model.top_k=2`
overrides single fields with type conversion. Overrides are set after construction, so derived
values are properties and `Config.validate` runs once after parsing.
"""

import dataclasses
import enum

from disag_jax.config_rules import require, type_rule
from disag_jax.errors import ConfigError as ConfigError


class RouterScore(enum.StrEnum):
    """How router logits become scores."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


class PlacementKind(enum.StrEnum):
    """Which devices attention and experts live on."""

    DISAGGREGATED = "disaggregated"
    COLOCATED = "colocated"
    # Of train.py alone: the planner chooses one of the others, and the whole split with it.
    AUTO = "auto"


class Overlap(enum.StrEnum):
    """What the co-located twin computes while an all-to-all is under way.

    NONE: nothing. CHUNKED: the experts' work on one chunk of a micro-batch while others travel.
    INTERLEAVED: the backward phase of one micro-batch while the forward phase of another exchanges
    its tokens, and the other way round. AUTO, of train.py alone: the planner chooses one of them.
    """

    NONE = "none"
    CHUNKED = "chunked"
    INTERLEAVED = "interleaved"
    AUTO = "auto"


class Recompute(enum.StrEnum):
    """What backward units compute again instead of finding it in the stash.

    FULL: everything from a unit's input on. SELECTIVE: all but attention itself, whose output and
    log-sum-exp are kept. NONE: norms, gates and activations alone; queries, keys, values and the
    experts' gate and up products are kept too.
    """

    FULL = "full"
    SELECTIVE = "selective"
    NONE = "none"


class Dtype(enum.StrEnum):
    """Type of the weights and activations that the units compute with."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FLOAT64 = "float64"


class MuDtype(enum.StrEnum):
    """Type of Adam's first moment: the masters', or half of float32's bytes."""

    MASTER = "master"
    BFLOAT16 = "bfloat16"


@dataclasses.dataclass
class ModelConfig:
    """A decoder-only Mixture-of-Experts language model.

    Attributes:
      head_dim: width of one attention head; num_heads * head_dim need not equal d_model.
      expert_width: hidden width of one SwiGLU expert.
      num_shared_experts: experts that every token visits, merged into one of this many widths.
      normalize_gates: divide a token's top_k scores by their sum.
      gate_scale: constant factor on the routed gates.
      balance_loss_weight: weight of the per-sequence balance loss, summed over layers.
      z_loss_weight: weight of the router z-loss, summed over layers.
      bias_update_rate: step of the aux-loss-free selection bias; 0 leaves the bias at zero.
      capacity_factor: keep at most ceil(capacity_factor * S * top_k / num_experts) tokens per
        sequence and expert, earlier tokens first; None drops nothing.
      embedding_init_std: of fresh embeddings; `init_std` is that of all other weights. If wide
        models begin with small embeddings, the first attention layer's average over a sequence
        hides which token it is, and all tokens are routed to the same experts.
    """

    vocab_size: int = 256
    num_layers: int = 4
    d_model: int = 64
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 16
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    num_experts: int = 8
    top_k: int = 2
    expert_width: int = 128
    num_shared_experts: int = 0
    router_score: RouterScore = RouterScore.SOFTMAX
    normalize_gates: bool = True
    gate_scale: float = 1.0
    balance_loss_weight: float = 0.0
    z_loss_weight: float = 0.0
    bias_update_rate: float = 0.0
    capacity_factor: float | None = None
    init_std: float = 0.02
    embedding_init_std: float = 0.02


@dataclasses.dataclass
class SplitConfig:
    """How the devices are split (docs/design.md, "Words").

    Attributes:
      replicas: D, data-parallel copies of the whole pipeline.
      stages: p, groups per role; stage g holds layers g, g+p, g+2p, ...
      attention_workers: M, devices per attention stage; each holds its own tokens. Co-located, all
        devices of a stage.
      expert_workers: N, devices per expert stage; each holds its own experts. Co-located, the M
        devices form M / N groups that each hold all experts of the stage.
      hop: periods from a message's making to its use (1, or 2 for slower networks).
      bucket_factors: row capacities of the transport, as multiples of the expected load. The worst
        case always follows the last one. A step that overflows a bucket is run again in the next.
      placement: attention and experts on devices of their own, or (the twin) both on each device;
        auto has the planner choose the split for the devices at start-up.
      overlap: co-located, what runs under the all-to-all; auto has the planner choose it, and the
        chunks, at start-up.
      forward_chunks, backward_chunks: with overlap = chunked, into how many parts a micro-batch's
        tokens are cut in the forward and in the backward phase.
      loss_share: the part of its tokens' loss that an attention worker of the last stage computes;
        other workers of the pipeline compute the rest. None divides it equally. Where experts set
        the pace, more than that ends sooner.
    """

    replicas: int = 1
    stages: int = 1
    attention_workers: int = 1
    expert_workers: int = 1
    hop: int = 1
    bucket_factors: tuple[float, ...] = (1.25, 2.0)
    placement: PlacementKind = PlacementKind.DISAGGREGATED
    overlap: Overlap = Overlap.NONE
    forward_chunks: int = 1
    backward_chunks: int = 1
    loss_share: float | None = None

    @property
    def colocated(self) -> bool:
        return self.placement is PlacementKind.COLOCATED

    @property
    def overlap_in_words(self) -> str:
        """What runs under the all-to-all, with the chunks if there are any."""
        if self.overlap is Overlap.CHUNKED:
            return f"in {self.forward_chunks} forward and {self.backward_chunks} backward chunks"
        return self.overlap.value

    @property
    def num_devices(self) -> int:
        """D p (M + N), or D p M co-located."""
        experts = 0 if self.colocated else self.expert_workers
        return self.replicas * self.stages * (self.attention_workers + experts)

    @property
    def expert_holders(self) -> int:
        """Devices that hold the same routed experts."""
        groups = self.attention_workers // self.expert_workers if self.colocated else 1
        return self.replicas * groups


@dataclasses.dataclass
class BatchConfig:
    """The tokens of one optimizer step: D * K * M * T in sequences of S.

    Attributes:
      sequence_length: S, tokens per sequence.
      tokens_per_worker: T, tokens that one attention worker holds per micro-batch; whole sequences.
      micro_batches: K, micro-batches that cross the pipeline in one step.
    """

    sequence_length: int = 128
    tokens_per_worker: int = 512
    micro_batches: int = 4

    @property
    def sequences_per_worker(self) -> int:
        return self.tokens_per_worker // self.sequence_length


@dataclasses.dataclass
class DataConfig:
    """What to train on: text read as bytes, or token files (disag_jax/prepare.py) if any are named.

    Attributes:
      paths: text files or directories; empty means the Python standard library's own sources.
      held_out_fraction: share of the files (of each token file: of its tokens, the last) kept out
        of training for evaluation.
      sources: token files, .bin or .npy.
      weights: share of each source in the mixture, of any sum; empty takes them by their sizes.
      held_out_sources: token files to evaluate on instead of a fraction of the sources.
      attend_across_documents: whether a token attends to earlier documents of its sequence.
      prefetch_steps: batches made ahead of their step; 0 makes each when it is needed.
    """

    paths: tuple[str, ...] = ()
    held_out_fraction: float = 0.1
    sources: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    held_out_sources: tuple[str, ...] = ()
    attend_across_documents: bool = True
    prefetch_steps: int = 2


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW with decoupled weight decay, linear warm-up and cosine decay, global-norm clipping.

    Attributes:
      mu_dtype: of the first moment between steps, as optax names it. bfloat16 takes a sixth off
        masters and optimizer state; a run keeps it when it resumes.
      sharded: whether the devices that hold the same routed experts, in replicas and in co-located
        groups, divide their masters and moments (ZeRO, Rajbhandari et al., 2020, stage 1). Each
        updates its part, and all gather the weights. Nothing in the result depends on it.
    """

    peak_learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4
    warmup_steps: int = 20
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    mu_dtype: MuDtype = MuDtype.MASTER
    sharded: bool = False


@dataclasses.dataclass
class RunConfig:
    """Length and rhythm of a run.

    Attributes:
      compute_dtype: type of weights and activations in the units; masters, gradients and optimizer
        state are float32 (float64 with float64).
      recompute: what backward units compute again to save memory.
      loss_chunk: tokens whose logits a worker holds at once.
      eval_every, checkpoint_every: steps between; 0 means only at the end (checkpoints: never,
        except when the run is told to stop).
      eval_batches: steps' worth of held-out text per evaluation; 0 means none.
      keep_checkpoints: newest checkpoints that stay.
      keep_checkpoint_every: checkpoints of its multiples stay for ever; 0 means of no step.
      max_skipped_steps: the run stops after so many steps in a row whose loss or gradient is not
        finite; each of them leaves the parameters as they are.
      max_failed_checkpoints: the run stops after so many in a row that could not be saved.
      start_timeout_seconds: how long processes wait for each other at the start.
      heartbeat_timeout_seconds: silence after which a process counts as lost.
      stall_timeout_seconds: time at one place (a step, a checkpoint, compiling) after which a run
        counts as stuck.
      straggler_factor: a step, a worker or a process is reported as slow when it takes so many
        times what is expected, or what the others take.
      peak_tflops_per_device: what MFU is measured against, in TFLOP/s; None takes the data sheet's
        bfloat16 figure (disag_jax/flops.py), and leaves MFU out where there is none.
    """

    num_steps: int = 100
    seed: int = 0
    compute_dtype: Dtype = Dtype.BFLOAT16
    recompute: Recompute = Recompute.SELECTIVE
    loss_chunk: int = 1024
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 4
    checkpoint_every: int = 0
    keep_checkpoints: int = 3
    keep_checkpoint_every: int = 0
    max_skipped_steps: int = 10
    max_failed_checkpoints: int = 3
    start_timeout_seconds: int = 300
    heartbeat_timeout_seconds: int = 100
    stall_timeout_seconds: int = 1800
    straggler_factor: float = 1.5
    peak_tflops_per_device: float | None = None


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
