"""Latency formulas of two inference systems, and an event simulation that they must agree with.

Both run micro-batches through L layers of attention, transfer, experts and transfer back, on four
resources that each do one thing at a time and in order: attention devices, expert devices, and a
link each way. Times are seconds of one micro-batch in one layer.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LayerTimes:
    """One micro-batch in one layer.

    Attributes:
      attention: t_a.
      shared: t_s, shared experts on the attention devices, after the attention of the micro-batch.
      transfer: of one chunk, either way (t_a2e = t_e2a).
      expert: t_e, of one chunk.
      chunks: r2, pieces of a micro-batch between attention and attention.
    """

    attention: float
    shared: float
    transfer: float
    expert: float
    chunks: int = 1


def megascale_infer_seconds(
    attention: float, expert: float, transfer: float, micro_batches: int, num_layers: int
) -> float:
    """A batch's latency by MegaScale-Infer (arXiv 2504.02263, equation 5).

    (T_a + T_e + 2 T_c) + T_f (m L - 1) with T_f = max(T_a, T_e). It holds where the pipeline is
    full: T_c < T_f and m T_f >= 2 (T_f + T_c) (equations 2 and 3), and T_a = T_e (equation 1).
    """
    slower = max(attention, expert)
    return attention + expert + 2 * transfer + slower * (micro_batches * num_layers - 1)


def fills_the_pipeline(
    attention: float, expert: float, transfer: float, micro_batches: int
) -> bool:
    """Whether MegaScale-Infer's conditions 2 and 3 hold."""
    slower = max(attention, expert)
    return transfer < slower and micro_batches * slower >= 2 * (slower + transfer)


def findep_seconds(times: LayerTimes, micro_batches: int, num_layers: int) -> float:
    """A batch's latency by FinDEP (arXiv 2512.21487), attention and shared experts alternating.

    (T - 1) max(G, r1 F) + max(X, G) + (r1 - 1) F, with X = t_a + t_s, Y = max(t_e, t_a2e),
    F = max(X, r2 Y) and G = t_a + 2 t_a2e + t_e + (r2 - 1) Y. The paper's equation 13 adds
    (r2 - 1) Y once more, which G has already; without it the formula is exact.
    """
    own = times.attention + times.shared
    chunk = max(times.expert, times.transfer)
    slowest = max(own, times.chunks * chunk)
    through = times.attention + 2 * times.transfer + times.expert + (times.chunks - 1) * chunk
    steady = (num_layers - 1) * max(through, micro_batches * slowest)
    return steady + max(own, through) + (micro_batches - 1) * slowest


def simulate_seconds(times: LayerTimes, micro_batches: int, num_layers: int) -> float:
    """The same by simulation: every task starts when its input and its resource are there."""
    attention_free = experts_free = there_free = back_free = 0.0
    ready = [0.0] * micro_batches
    for _ in range(num_layers):
        for i in range(micro_batches):
            attended = max(ready[i], attention_free) + times.attention
            # The shared experts follow at once and hold up the next attention, not the transfer.
            attention_free = attended + times.shared
            for _ in range(times.chunks):
                there_free = max(attended, there_free) + times.transfer
                experts_free = max(there_free, experts_free) + times.expert
                back_free = max(experts_free, back_free) + times.transfer
            ready[i] = max(back_free, attention_free)
    return max(ready)
