"""A shape whose exchanges over 2 GB/s each way take about as long as its compute: for benchmarks.

Where communication equals compute there is most to hide. Attention and experts are equal on one GPU
each, a message has a whole period to travel (hop 2), and the attention worker computes all of the
loss, so that none of its tokens cross. Micro-batches are small and many, so that the pipeline fills
soon. The model is no published one.

  python train.py --config configs/slow_network.py --workdir runs/one
  python -m disag_jax.compare --config configs/slow_network.py --workdir runs/slow --network=sockets
"""

import dataclasses

from configs import balanced
from disag_jax.config import Config


def get_config() -> Config:
    config = balanced.get_config()
    config.name = "slow_network"
    config.model = dataclasses.replace(
        config.model, num_layers=3, num_heads=176, num_kv_heads=8,
        num_experts=12, top_k=8, expert_width=8192,
    )  # fmt: skip
    config.split = dataclasses.replace(config.split, hop=2, loss_share=1.0)
    config.batch = dataclasses.replace(
        config.batch, sequence_length=8192, tokens_per_worker=8192, micro_batches=64
    )
    # A batch is 524,288 tokens, and one is held out.
    config.data.held_out_fraction = 0.2
    return config
