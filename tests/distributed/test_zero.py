"""Stages 1 to 3: the training of one process, in float64; PyTorch's own; and bytes and traffic to the closed forms."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minillm.costs.zero import zero_bytes_per_rank, zero_communication_bytes
from minillm.distributed import RankError, count_traffic, run_ranks, simulate_ranks
from minillm.distributed.zero import Zero
from minillm.models import Transformer, TransformerConfig
from minillm.optim import AdamW, parameter_groups

with warnings.catch_warnings():  # it compiles functions in a way that PyTorch itself calls outdated
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer

STEPS, MICRO_BATCHES, MAX_NORM = 20, 2, 0.5


def small_transformer(dtype: torch.dtype = torch.float64) -> Transformer:
    torch.manual_seed(3)
    # Sizes that 3 and 4 do not divide; the embedding is the head too.
    config = TransformerConfig(vocab_size=29, d_model=14, n_layers=2, n_heads=2, d_ff=22, context_length=8)
    assert config.tied_embeddings
    return Transformer(config).to(dtype)


def optimizer_for(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    groups = parameter_groups(model, weight_decay=0.1)
    groups[1]["lr"] = 0.03
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    return AdamW(groups, lr=0.01)


def batch(step: int, micro: int, rank: int) -> tuple[Tensor, Tensor]:
    """Ranks have one to three rows, in another order in each step."""
    draw = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    tokens = torch.randint(29, (1 + (rank + step) % 3, 7), generator=draw)
    return tokens[:, :-1], tokens[:, 1:]


def share_of_loss(model: nn.Module, tokens: Tensor, targets: Tensor, n_targets: int) -> Tensor:
    logits = model(tokens).flatten(0, 1).double()
    return nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum") / n_targets


def n_targets(step: int, n_ranks: int) -> int:
    return sum(batch(step, micro, rank)[1].numel() for micro in range(MICRO_BATCHES) for rank in range(n_ranks))


def one_process(kind: str, n_ranks: int) -> tuple[dict[str, Tensor], list[float]]:
    """What the ranks should come to: the parameters after all steps, and each step's norm of the gradients."""
    model = small_transformer()
    optimizer = optimizer_for(kind, model)
    norms = []
    for step in range(STEPS):
        for micro in range(MICRO_BATCHES):
            for rank in range(n_ranks):
                share_of_loss(model, *batch(step, micro, rank), n_targets(step, n_ranks)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), norms


def zero_ranks(kind: str, stage: int, settings: dict[str, Any]) -> tuple[dict[str, Tensor], list[float]]:
    model = small_transformer()
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    if rank > 0:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(rank)  # ranks that were seeded differently: the first one counts
    zero = Zero(model, optimizer_for(kind, model), stage=stage, reduction="sum", **settings)
    norms = []
    for step in range(STEPS):
        for micro in range(MICRO_BATCHES):
            with zero.no_sync() if micro < MICRO_BATCHES - 1 else nullcontext():
                share_of_loss(model, *batch(step, micro, rank), n_targets(step, n_ranks)).backward()
        norms.append(float(zero.clip_grad_norm_(MAX_NORM)))
        zero.step()
        zero.zero_grad()
    with zero.gathered():
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}, norms


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("stage", "settings"),
    [(1, {}), (1, {"bucket_bytes": 4000}), (2, {"bucket_bytes": 4000}), (3, {}), (3, {"reshard_after_forward": False})],
)
def test_twenty_steps_are_those_of_one_process(kind: str, stage: int, settings: dict[str, Any]) -> None:
    for n_ranks in (1, 2, 3, 4):
        expected, expected_norms = one_process(kind, n_ranks)
        for found, norms in simulate_ranks(zero_ranks, n_ranks, kind, stage, settings).results:
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
            assert norms == pytest.approx(expected_norms, rel=1e-9)
