"""The shapes of DeepSeek-MoE 16B on 16 devices of 80 GB.

Four stages of one attention and three expert workers: a token's experts take 2.7 times the
arithmetic of its attention at 4,096 tokens per sequence. 524,288 tokens per step.

  python train.py --config configs/deepseek_moe_16b.py --workdir runs/deepseek_moe_16b

By its shapes an expert worker keeps 30 GiB for the whole run in the largest transport bucket, and
needs room for a unit's work beside it. Only traced for its 16 devices (tests/test_lowering.py),
never run.
Unlike the original (Dai et al., "DeepSeekMoE"):

  - The first layer's feed-forward part is dense there (width 10,944); here every layer has experts.
  - All weights start with a standard deviation of 0.006 there; here what is added to the residual
    stream starts smaller, by 1 / sqrt(2 * num_layers).
  - The learning rate falls in two steps there (times 0.316 after 80% and 90% of the tokens), here
    along a cosine to a tenth.
  - 4,608 sequences per step and two trillion tokens of a byte-pair tokenizer there. Here text is
    read as bytes: most of the vocabulary never occurs.
"""

from disag_jax.config import (
    BatchConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SplitConfig,
)


def get_config() -> Config:
    return Config(
        name="deepseek_moe_16b",
        model=ModelConfig(
            vocab_size=102_400,
            num_layers=28,
            d_model=2048,
            num_heads=16,
            num_kv_heads=16,
            head_dim=128,
            rope_theta=10_000.0,
            norm_eps=1e-6,
            num_experts=64,
            top_k=6,
            expert_width=1408,
            num_shared_experts=2,
            normalize_gates=False,
            balance_loss_weight=0.001,
            init_std=0.006,
        ),
        split=SplitConfig(stages=4, attention_workers=1, expert_workers=3),
        batch=BatchConfig(sequence_length=4096, tokens_per_worker=8192, micro_batches=64),
        optimizer=OptimizerConfig(
            peak_learning_rate=4.2e-4, final_learning_rate=4.2e-5, warmup_steps=2000
        ),
        run=RunConfig(num_steps=100_000, eval_every=1000, checkpoint_every=1000),
    )
