"""Gradients of several batches add up on each rank: what they come to goes over the network once a step."""

import pytest
import torch
from torch import Tensor

from minillm.distributed import Message, simulate_ranks
from minillm.models import Transformer, TransformerConfig
from minillm.training import Trainer, TrainingConfig
from minillm.training.parallel import ParallelPlan


class Rows:
    n_tokens = n_bytes = 100

    def next_batch(self) -> tuple[Tensor, Tensor]:
        ids = torch.arange(32).view(8, 4) % 11
        return ids, ids.roll(-1, 1)

    def state_dict(self) -> dict[str, int]:
        return {}


def gradients_sent(plan: ParallelPlan, accumulation: int) -> dict[str, int]:
    """Bytes of one step, by label."""

    def ranks() -> None:
        torch.manual_seed(0)
        model = Transformer(TransformerConfig(vocab_size=11, context_length=4, d_model=8, n_layers=2, n_heads=2))
        config = TrainingConfig(
            max_steps=1, warmup_steps=0, gradient_accumulation_steps=accumulation, eval_every=None, device="cpu"
        )
        Trainer(model, Rows(), None, config, progress=False, parallel=plan).train()

    messages: list[Message] = simulate_ranks(ranks, plan.n_ranks).messages
    labels = ("gradients", "gradients of copies")
    return {label: sum(message.n_bytes for message in messages if message.label == label) for label in labels}


@pytest.mark.parametrize("plan", [ParallelPlan(pp=2, dp=2, micro_batches=2), ParallelPlan(pp=2, schedule="chimera")])
def test_accumulated_gradients_are_sent_once_a_step(plan: ParallelPlan) -> None:
    once = gradients_sent(plan, 1)
    assert gradients_sent(plan, 3) == once
    assert once["gradients of copies"] > 0
    assert (once["gradients"] > 0) == (plan.dp > 1)
