"""The sections of a config and what their fields may be.

`disag_jax.config` puts them together, and is where they are imported from.
"""

import dataclasses
import enum


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
      keep_checkpoints: newest checkpoints that stay; 2 at least, to go back from a bad one.
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
