"""The shapes of Qwen3-235B-A22B on 128 devices of 141 GB.

Sixteen stages of three attention and five expert workers: a token's experts take 1.4 times the
arithmetic of its attention at 4,096 tokens per sequence. 1,572,864 tokens per step. On 128 devices
of 80 GB, with attention as the slower half and a third of the tokens per step:

  --config.split.stages=32 --config.split.attention_workers=1 --config.split.expert_workers=3

  python train.py --config configs/qwen3_235b.py --workdir runs/qwen3_235b

By its shapes an expert worker keeps 78 GiB for the whole run in the largest transport bucket, and
needs room for a unit's work beside it. Only traced for its 128 devices (tests/test_lowering.py),
never run.
Unlike the original ("Qwen3 Technical Report" and the published configuration):

  - Queries and keys are normalised per head before RoPE there.
  - The balance loss is over the global batch there, per sequence here. Its weight is the published
    configuration's; the report names none.
  - The published RoPE base of 1,000,000 is used here from the start; there it is 10,000 until the
    long-context stage.
  - 36 trillion tokens in three stages of a byte-level byte-pair tokenizer there. Here text is read
    as bytes: most of the vocabulary never occurs.
  - Its optimizer and initialisation are not published: those below are ours.
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
        name="qwen3_235b",
        model=ModelConfig(
            vocab_size=151_936,
            num_layers=94,
            d_model=4096,
            num_heads=64,
            num_kv_heads=4,
            head_dim=128,
            rope_theta=1_000_000.0,
            norm_eps=1e-6,
            num_experts=128,
            top_k=8,
            expert_width=1536,
            normalize_gates=True,
            balance_loss_weight=0.001,
        ),
        split=SplitConfig(stages=16, attention_workers=3, expert_workers=5),
        batch=BatchConfig(sequence_length=4096, tokens_per_worker=4096, micro_batches=128),
        optimizer=OptimizerConfig(
            peak_learning_rate=2e-4, final_learning_rate=2e-5, warmup_steps=2000
        ),
        run=RunConfig(num_steps=100_000, eval_every=1000, checkpoint_every=1000),
    )
