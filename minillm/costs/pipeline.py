"""What a pipeline of p stages waits for, keeps and sends, for m micro-batches a step.

Times are those of one micro-batch on one stage, which holds 1/p of the model: F of a forward pass, B = I + W of a
backward pass, I and W of its halves for the input and for the weights. Waiting is counted a stage and a step; the work
of a stage is ``m (F + B)``.

    schedule                  waits for                       micro-batches in flight on stage s (from 0)
    GPipe                     (p - 1) (F + B)                 m
    1F1B                      (p - 1) (F + B)                 min(p - s, m)
    interleaved, v chunks     (p - 1) (F + B) / v             ((v - 1) p + 2 (p - 1 - s) + 1) / v, not more than m
    ZB-H1                     (p - 1) (F + I - W)             min(p, m)
    ZB-H2                     (p - 1) (F + I - 2 W)           min(2 p - 1, m)
    PipeDream                 nothing but to fill once        min(p - s, m)

Sources: Huang et al. 2019, "GPipe", section 2.3; Narayanan et al. 2021, "Efficient Large-Scale Language Model Training
on GPU Clusters Using Megatron-LM", section 2.2; Qi et al. 2023, "Zero Bubble Pipeline Parallelism", table 1 and section
2; Narayanan et al. 2019, "PipeDream", section 3.3.
"""

from __future__ import annotations

from minillm.costs.arguments import at_least, one_of


def pipeline_bubble(n_stages: int, n_micro_batches: int, n_chunks: int = 1) -> float:
    """The idle part of all stages' time under GPipe or 1F1B, or interleaved 1F1B: (p - 1) / (v m + p - 1).

    Of the work alone, which papers also call the bubble, it is (p - 1) / (v m).

    Args:
        n_stages: p. n_micro_batches: m. n_chunks: v, the chunks of the model on each stage.

    Raises:
        ValueError: a value below 1.
    """
    at_least(1, n_stages=n_stages, n_micro_batches=n_micro_batches, n_chunks=n_chunks)
    return (n_stages - 1) / (n_chunks * n_micro_batches + n_stages - 1)


def zero_bubble_seconds(
    n_stages: int, forward: float, backward_input: float, backward_weight: float, *, variant: str = "h1"
) -> float:
    """Seconds that a stage waits in a step under ZB-H1 or ZB-H2, from its first pass to its last.

    (p - 1) (F + I - W) and (p - 1) (F + I - 2 W), not below 0; where W is not longer than F or I, and with at least p
    micro-batches for "h1", 2 p - 1 for "h2". (A longer W leaves waits that no formula of the paper counts.)

    Args:
        n_stages: p.
        forward, backward_input, backward_weight: seconds F, I and W of a micro-batch on a stage.
        variant: "h1" or "h2".

    Raises:
        ValueError: a value out of range.
    """
    at_least(1, n_stages=n_stages)
    at_least(0, forward=forward, backward_input=backward_input, backward_weight=backward_weight)
    one_of(("h1", "h2"), variant=variant)
    fills = backward_weight if variant == "h1" else 2 * backward_weight
    return (n_stages - 1) * max(0.0, forward + backward_input - fills)


_IN_FLIGHT = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "pipedream")


def pipeline_in_flight(
    schedule: str, n_stages: int, n_micro_batches: int, stage: int = 0, *, n_chunks: int = 1
) -> float:
    """The most micro-batches whose activations a stage keeps at once, each counted as a whole stage's (1/p of the
    model).

    On the first stage interleaving keeps 1 + (p - 1) / (p v) times what 1F1B does.

    Args:
        schedule: "gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2" or "pipedream".
        n_stages: p. n_micro_batches: m. stage: s, from 0. n_chunks: v, of "interleaved".

    Raises:
        ValueError: a value out of range.
    """
    one_of(_IN_FLIGHT, schedule=schedule)
    at_least(1, n_stages=n_stages, n_micro_batches=n_micro_batches, n_chunks=n_chunks)
    if not 0 <= stage < n_stages:
        raise ValueError(f"stage must be 0 to {n_stages - 1}, got {stage}")
    after = n_stages - 1 - stage
    if schedule == "interleaved" and n_chunks > 1:
        return min((n_chunks - 1) * n_stages + 2 * after + 1, n_chunks * n_micro_batches) / n_chunks
    most = {"gpipe": n_micro_batches, "zb-h1": n_stages, "zb-h2": 2 * n_stages - 1}.get(schedule, after + 1)
    return float(min(most, n_micro_batches))


def pipedream_versions(n_stages: int, stage: int, *, vertical_sync: bool = False) -> int:
    """Versions of its weights that a stage holds under PipeDream: p - s, with vertical sync p.

    Raises:
        ValueError: a stage that is not 0 to p - 1.
    """
    at_least(1, n_stages=n_stages)
    if not 0 <= stage < n_stages:
        raise ValueError(f"stage must be 0 to {n_stages - 1}, got {stage}")
    return n_stages if vertical_sync else n_stages - stage


def pipedream_staleness(n_stages: int, stage: int, *, vertical_sync: bool = False) -> int:
    """How many updates a stage's weights lie behind when a gradient for them is made: p - 1 - s, with vertical sync
    p - 1.

    Raises:
        ValueError: a stage that is not 0 to p - 1.
    """
    return pipedream_versions(n_stages, stage, vertical_sync=vertical_sync) - 1


def pipeline_bytes_sent(
    n_stages: int, n_micro_batches: int, activation_bytes: float, *, stage: int = 0, n_chunks: int = 1
) -> float:
    """Bytes that a stage sends in a step: the output of each of its chunks forward, its input's gradient back.

    Every boundary between two pieces carries ``activation_bytes`` each way for each micro-batch, if the pieces stand on
    different stages; the first piece sends nothing back, the last nothing on. For a transformer ``activation_bytes`` is
    2 b s h in bfloat16, with b sequences of s tokens in a micro-batch and h = d_model.

    Args:
        n_stages: p, at least 2 or nothing is sent.
        n_micro_batches: m.
        activation_bytes: of one micro-batch at one boundary.
        stage: s, from 0.
        n_chunks: v; the pieces go round the stages.

    Raises:
        ValueError: a value out of range.
    """
    at_least(1, n_stages=n_stages, n_micro_batches=n_micro_batches, n_chunks=n_chunks)
    at_least(0, activation_bytes=activation_bytes)
    if not 0 <= stage < n_stages:
        raise ValueError(f"stage must be 0 to {n_stages - 1}, got {stage}")
    if n_stages == 1:
        return 0.0
    ends = (stage == 0) + (stage == n_stages - 1)
    return (2 * n_chunks - ends) * n_micro_batches * activation_bytes
