"""The shapes of GPT-OSS-120B on 64 devices of 80 GB.

Four stages of four attention and twelve expert workers. A token's experts take 2.3 times the
arithmetic of its attention at 4,096 tokens per sequence; the rest of the ratio is memory, for the
experts are 98% of the weights. 1,048,576 tokens per step.

  python train.py --config configs/gpt_oss_120b.py --workdir runs/gpt_oss_120b

By its shapes an expert worker keeps 64 GiB for the whole run in the largest transport bucket, and
needs room for a unit's work beside it. Only traced for its 64 devices (tests/test_lowering.py),
never run.
Unlike the original, whose model code is public and whose training is not:

  - Every second layer attends to the last 128 tokens only there; here every layer to all.
  - Attention there has a learned sink per head, one more logit in the softmax.
  - Biases there in the attention projections, the router and the experts; none here.
  - SwiGLU there is clipped at 7, has sigmoid(1.702 x) and one added to its linear half.
  - RoPE there is stretched 32 times from 4,096 positions by YaRN, which also changes short ones.
  - Expert weights there are released in MXFP4; here they are bfloat16 with float32 masters.
  - Its losses, optimizer and initialisation are not known: those below are ours.
  - Text here is read as bytes: most of the vocabulary never occurs.
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
        name="gpt_oss_120b",
        model=ModelConfig(
            vocab_size=201_088,
            num_layers=36,
            d_model=2880,
            num_heads=64,
            num_kv_heads=8,
            head_dim=64,
            rope_theta=150_000.0,
            norm_eps=1e-5,
            num_experts=128,
            top_k=4,
            expert_width=2880,
            # A softmax over the chosen logits is the softmax over all of them, normalised.
            normalize_gates=True,
            balance_loss_weight=0.001,
        ),
        split=SplitConfig(stages=4, attention_workers=4, expert_workers=12),
        batch=BatchConfig(sequence_length=4096, tokens_per_worker=8192, micro_batches=32),
        optimizer=OptimizerConfig(
            peak_learning_rate=3e-4, final_learning_rate=3e-5, warmup_steps=2000
        ),
        run=RunConfig(num_steps=100_000, eval_every=1000, checkpoint_every=1000),
    )
