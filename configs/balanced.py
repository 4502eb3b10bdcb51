"""A shape whose attention and experts take about the same time on one GPU each: for benchmarks.

One attention and one expert worker. Attention and experts are equal at this sequence length, so
neither role waits for the other; the model is no published one.

  python train.py --config configs/balanced.py --workdir runs/balanced
"""

from disag_jax.config import (
    BatchConfig,
    Config,
    Dtype,
    ModelConfig,
    OptimizerConfig,
    Recompute,
    RunConfig,
    SplitConfig,
)


def get_config() -> Config:
    return Config(
        name="balanced",
        model=ModelConfig(
            vocab_size=32_000,
            num_layers=6,
            d_model=2048,
            num_heads=16,
            num_kv_heads=16,
            head_dim=128,
            num_experts=64,
            top_k=4,
            expert_width=1408,
            balance_loss_weight=0.01,
            embedding_init_std=1.0,
        ),
        split=SplitConfig(stages=1, attention_workers=1, expert_workers=1),
        # A faster start collapses the router, and then nothing is routed any more.
        optimizer=OptimizerConfig(peak_learning_rate=2e-4, final_learning_rate=2e-5),
        batch=BatchConfig(sequence_length=8192, tokens_per_worker=16_384, micro_batches=16),
        run=RunConfig(
            num_steps=20,
            compute_dtype=Dtype.BFLOAT16,
            recompute=Recompute.NONE,
            loss_chunk=2048,
            log_every=1,
            eval_batches=1,
        ),
    )
