"""A byte-level model small enough for a laptop, split over 8 simulated CPU devices.

Two stages of one attention and three expert workers; trains on the Python standard library's own
sources. A few minutes on two cores; ends below a byte-bigram model's held-out loss.

  python train.py --config configs/tiny.py --cpu_devices 8 --workdir runs/tiny
"""

from disag_jax.config import (
    BatchConfig,
    Config,
    Dtype,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SplitConfig,
)


def get_config() -> Config:
    return Config(
        name="tiny",
        model=ModelConfig(
            vocab_size=256,
            num_layers=4,
            d_model=64,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            num_experts=12,
            top_k=2,
            expert_width=96,
            balance_loss_weight=0.01,
            z_loss_weight=1e-4,
        ),
        split=SplitConfig(stages=2, attention_workers=1, expert_workers=3),
        batch=BatchConfig(sequence_length=128, tokens_per_worker=256, micro_batches=8),
        optimizer=OptimizerConfig(
            peak_learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=20
        ),
        run=RunConfig(
            num_steps=300,
            compute_dtype=Dtype.FLOAT32,
            log_every=10,
            eval_every=100,
            checkpoint_every=100,
        ),
    )
