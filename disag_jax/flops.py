"""Arithmetic of the model, counted from its config, and the peak that a device could do.

FLOPs are those of the model's matrix products, a multiply and an add counting two. What an
implementation does more often than the mathematics needs is not counted: recomputed activations,
padding, the masked half of the attention scores. Nor are norms, softmax, RoPE, activations and the
lookup of embeddings, which are no matrix products. A token counts with its top_k experts also where
`capacity_factor` dropped some, and attends to all earlier ones of its sequence also where
`data.attend_across_documents` keeps it to its document.
"""

import dataclasses

from disag_jax.config import Config, Dtype, ModelConfig
from mesh import runtime

# Gradients of a product a @ b are two more products of the same size.
FORWARD_AND_BACKWARD = 3

# Dense bfloat16 TFLOP/s by NVIDIA's data sheets, half of the figure "with sparsity". The first name
# that a device's kind contains counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200 NVL": 835,
    "H200": 989,  # also GH200
    "H800 PCIe": 756,
    "H800": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "GB200": 2500,
    "B200": 2250,
}


@dataclasses.dataclass(frozen=True)
class ModelFlops:
    """FLOPs per token of the forward and the backward pass, by who does them.

    Attributes:
      attention: projections, scores and router of all layers.
      expert: routed and shared experts of all layers.
      head: logits; shared by all workers (disag_jax/shared_loss.py).
    """

    attention: float
    expert: float
    head: float

    @property
    def total(self) -> float:
        return self.attention + self.expert + self.head


def model_flops(config: Config) -> ModelFlops:
    """Counts a token's share of training on sequences of `batch.sequence_length`.

    Forward, with D d_model, H heads and G key/value heads of width A, S sequence length, E experts,
    K choices and s shared experts of width F, V vocabulary, L layers:

      attention  L * (4 D H A + 4 D G A + 2 (S + 1) H A + 2 D E)
      expert     L * (K + s) * 6 D F
      head       2 D V
    """
    model = config.model
    forward = {
        "attention": model.num_layers * sum(attention_layer(model, config.batch.sequence_length)),
        "expert": model.num_layers * _expert_layer(model),
        "head": 2 * model.d_model * model.vocab_size,
    }
    return ModelFlops(**{role: FORWARD_AND_BACKWARD * flops for role, flops in forward.items()})


def flops_per_device(config: Config, tokens_per_second: float) -> float:
    """Model FLOP/s of each device at this speed of all of them together."""
    return model_flops(config).total * tokens_per_second / config.split.num_devices


def peak_flops(config: Config, device_kind: str) -> float | None:
    """FLOP/s that one device could do at most, or None where nobody has stated it.

    `run.peak_tflops_per_device` goes first; the table is for GPUs, or this process's share of one,
    and bfloat16.
    """
    if config.run.peak_tflops_per_device is not None:
        return config.run.peak_tflops_per_device * 1e12
    if config.run.compute_dtype is not Dtype.BFLOAT16 or "MIG" in device_kind:
        return None
    of_whole = (peak * 1e12 for name, peak in PEAK_TFLOPS.items() if name in device_kind)
    peak = next(of_whole, None)
    return peak and peak * runtime.gpu_share()


def attention_layer(model: ModelConfig, sequence_length: int) -> tuple[float, float]:
    """A token's forward FLOPs in one layer: (projections and router, attention scores)."""
    query_and_out = 4 * model.d_model * model.num_heads * model.head_dim
    key_and_value = 4 * model.d_model * model.num_kv_heads * model.head_dim
    # q k^T and the weighted sum of v, over the (S + 1) / 2 positions that a token sees on average.
    seen = (sequence_length + 1) / 2
    scores = 4 * seen * model.num_heads * model.head_dim
    router = 2 * model.d_model * model.num_experts
    return query_and_out + key_and_value + router, scores


def _expert_layer(model: ModelConfig) -> float:
    # Gate, up and down.
    return (model.top_k + model.num_shared_experts) * 6 * model.d_model * model.expert_width
