"""Metrics of a run: JSON lines in the workdir and a line of progress on the terminal."""

import json
import pathlib

import numpy as np

from disag_jax.config import Config

MEANS = ("loss", "total_loss", "balance_loss", "z_loss", "gradient_norm", "learning_rate")


class MetricsLog:
    """Appends records to a file, one JSON object a line."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    def write(self, record: dict):
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class Progress:
    """Averages steps between two log lines."""

    def __init__(self, config: Config):
        self._config = config
        self._steps = []

    def add(self, metrics: dict):
        """Takes one step's metrics, with `step_seconds`."""
        self._steps.append(metrics)

    def record(self, step: int) -> dict:
        """Means over the steps since the last line; expert load per layer over the same steps.

        expert_load is the largest expert's tokens over the mean, dead_experts those without a
        token, dropped_pairs the pairs that capacity_factor dropped.
        """
        steps = self._steps
        counts = np.sum([m["expert_counts"] for m in steps], axis=0)
        seconds = float(np.mean([m["step_seconds"] for m in steps]))
        record = {name: float(np.mean([m[name] for m in steps])) for name in MEANS}
        return {
            "step": step,
            **record,
            "step_seconds": seconds,
            "tokens_per_second": self._config.tokens_per_step / seconds,
            "expert_load": (counts.max(axis=1) / counts.mean(axis=1)).tolist(),
            "dead_experts": (counts == 0).sum(axis=1).tolist(),
            "dropped_pairs": np.sum([m["dropped_pairs"] for m in steps], axis=0).tolist(),
            "bucket_reruns": sum(m["bucket_reruns"] for m in steps),
            "bucket_rows": steps[-1]["bucket"].rows,
        }

    def line(self, step: int) -> str:
        """The record as one line, after which a new average begins."""
        record = self.record(step)
        self._steps = []
        load = " ".join(f"{value:.2f}" for value in record["expert_load"])
        parts = [
            f"step {step:>5}/{self._config.run.num_steps}",
            f"loss {record['loss']:.4f}",
            f"grad norm {record['gradient_norm']:.3f}",
            f"{record['tokens_per_second']:,.0f} tokens/s",
            f"load max/mean by layer {load}",
            f"dead experts {' '.join(map(str, record['dead_experts']))}",
            f"dropped {' '.join(map(str, record['dropped_pairs']))}",
        ]
        if record["bucket_reruns"]:
            parts.append(f"re-runs {record['bucket_reruns']}")
        return "  ".join(parts)
