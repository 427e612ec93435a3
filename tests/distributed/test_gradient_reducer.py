"""Backward passes of every kind under data parallelism: DDP as a guest where it can, plain autograd and sums else."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from minillm.distributed import DataParallel, simulate_ranks
from minillm.distributed.memory import measure_memory
from minillm.distributed.processes import run_ranks
from minillm.distributed.traffic import count_traffic

EXACT = {"rtol": 0.0, "atol": 0.0}
NEAR = {"rtol": 1e-6, "atol": 1e-7}
OVERLAP = pytest.mark.parametrize("overlap", [True, False])


def simulated(fn: Callable[..., Any], n_ranks: int, *args: Any) -> list[Any]:
    return simulate_ranks(fn, n_ranks, *args).results


def row(seed: int, rank: int | None = None) -> Tensor:
    """Numbers of a rank, this one's unless said otherwise."""
    rank = dist.get_rank() if rank is None else rank
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(100 * seed + rank))


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]


def by_hand(n_ranks: int, loss: Callable[[nn.Module, int], Tensor], *, mean: bool = True) -> list[Tensor | None]:
    """The gradients of the sum or mean over ranks of `loss(model, rank)`, in one process."""
    model = net()
    total = torch.stack([loss(model, rank) for rank in range(n_ranks)])
    (total.mean() if mean else total.sum()).backward()
    return gradients(model)


# Parameters that a backward leaves out


class Branches(nn.Module):
    """Uses only the branches that it is told to."""

    def __init__(self, n_branches: int = 4) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.branches = nn.ModuleList(nn.Linear(4, 4) for _ in range(n_branches))

    def forward(self, x: Tensor, used: Sequence[int]) -> Tensor:
        out = x * x.new_ones((), requires_grad=True)
        for number in used:
            out = out + self.branches[number](x)
        return out


@OVERLAP
def test_a_parameter_left_out_is_named_there_and_nobody_waits(overlap: bool) -> None:
    def ranks() -> tuple[str, list[Any]]:
        wrapped = DataParallel(Branches(), bucket_bytes=100, overlap=overlap)
        said = ""
        loss = wrapped(row(0), [0, 3] if dist.get_rank() == 1 else [0, 1, 2, 3]).sum()
        try:
            loss.backward()
        except RuntimeError as error:
            said = str(error)
        kept = gradients(wrapped)
        wrapped.zero_grad()
        wrapped(row(1), [3, 2, 1, 0]).sum().backward()  # and goes on, if one wants
        dist.barrier()
        return said, kept

    for run in (simulated, run_ranks) if overlap else (simulated,):
        results = run(ranks, 3)
        assert [said[:30] for said, _ in results] == ["", "rank 1 computed no gradient fo", ""]
        assert (
            "'branches.1.weight', 'branches.1.bias', 'branches.2.weight', 'branches.2.bias', and the other"
            in results[1][0]
        )
        torch.testing.assert_close(results[0][1], results[1][1], **EXACT)
        expected = (row(0, 0).sum(0) + row(0, 2).sum(0)).expand(4, 4) / 3
        torch.testing.assert_close(results[2][1][2], expected, **NEAR)


@settings(deadline=None, max_examples=25)
@given(
    n_ranks=st.integers(1, 4),
    used=st.lists(st.lists(st.permutations(range(4)).map(tuple), min_size=4, max_size=4), min_size=1, max_size=3),
    kept=st.lists(st.integers(0, 4), min_size=12, max_size=12),
    bucket_bytes=st.sampled_from([None, 70, 150, 10**6]),
    overlap=st.booleans(),
    mean=st.booleans(),
)
def test_any_use_of_branches_is_the_mean_or_sum_with_zeros_where_unused(
    n_ranks: int,
    used: list[list[tuple[int, ...]]],
    kept: list[int],
    bucket_bytes: int | None,
    overlap: bool,
    mean: bool,
) -> None:
    """used[step][rank], of which the first few: those that the rank's backward reaches. Gradients are not zeroed."""

    def branches(step: int, rank: int) -> tuple[int, ...]:
        return used[step][rank][: kept[4 * step + rank]]

    def ranks() -> list[list[Any]]:
        wrapped = DataParallel(
            Branches().double(),
            bucket_bytes=bucket_bytes,
            overlap=overlap,
            reduction="mean" if mean else "sum",
            find_unused_parameters=True,
        )
        seen = []
        for step in range(len(used)):
            wrapped(row(step).double(), branches(step, dist.get_rank())).square().sum().backward()
            seen.append(gradients(wrapped))
        return seen

    results = simulated(ranks, n_ranks)
    model = Branches().double()
    for step in range(len(used)):
        for rank in range(n_ranks):
            loss = model(row(step, rank).double(), branches(step, rank)).square().sum()
            (loss / n_ranks if mean else loss).backward()
        expected = gradients(model)
        for seen in results:
            torch.testing.assert_close(seen[step], expected, rtol=1e-11, atol=1e-12)


@OVERLAP
def test_finding_unused_parameters_is_ddps(overlap: bool) -> None:
    uses = [([0], [0, 1]), ([0, 1, 3], [3]), ([2], [2])]

    def ranks(ours: bool, to_none: bool) -> list[Any]:
        model = Branches()
        wrapped: nn.Module
        if ours:
            wrapped = DataParallel(model, bucket_bytes=70, overlap=overlap, find_unused_parameters=True)
        else:
            wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        seen = []
        for step, used in enumerate(uses):
            wrapped.zero_grad(set_to_none=to_none)
            wrapped(row(step), used[dist.get_rank()]).square().sum().backward()
            seen.append(gradients(model))
        return seen

    for to_none in (True, False):
        torch.testing.assert_close(simulated(ranks, 2, True, to_none), simulated(ranks, 2, False, to_none), **EXACT)


def test_what_was_used_while_accumulating_counts_as_used() -> None:
    def ranks() -> list[Any]:
        wrapped = DataParallel(Branches(2), bucket_bytes=70)
        with wrapped.no_sync(), count_traffic() as traffic:
            with wrapped.no_sync():
                pass
            wrapped(row(0), [0]).sum().backward()
        assert traffic.bytes_sent == 0
        wrapped(row(1), [1]).sum().backward()
        return gradients(wrapped)

    for seen in simulated(ranks, 2):
        for step in (0, 1):
            expected = sum(row(step, rank).sum(0) for rank in (0, 1)).expand(4, 4) / 2
            torch.testing.assert_close(seen[2 * step], expected, **NEAR)


def test_a_rank_may_use_nothing_where_unused_parameters_are_found() -> None:
    def ranks() -> list[Any]:
        wrapped = DataParallel(Branches(1), find_unused_parameters=True)
        wrapped(row(0), [0] if dist.get_rank() else []).sum().backward()
        return gradients(wrapped)

    for seen in simulated(ranks, 2):
        torch.testing.assert_close(seen[0], row(0, 1).sum(0).expand(4, 4) / 2, **NEAR)


# Forward and backward passes in other numbers and orders


@OVERLAP
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_several_forwards_one_backward_and_backwards_twice(overlap: bool, reduction: str) -> None:
    mean = reduction == "mean"

    def ranks() -> list[Any]:
        wrapped = DataParallel(net(), bucket_bytes=100, overlap=overlap, reduction=reduction)  # type: ignore[arg-type]
        (wrapped(row(0)).square().sum() + wrapped(row(1)).square().sum()).backward()
        seen = [gradients(wrapped)]
        wrapped.zero_grad()
        loss = wrapped(row(0)).square().sum()
        loss.backward(retain_graph=True)
        with wrapped.no_sync():
            loss.backward(retain_graph=True)
        loss.backward()
        seen.append(gradients(wrapped))
        wrapped.zero_grad(set_to_none=False)
        first, second = wrapped(row(0)), wrapped(row(1))
        second.square().sum().backward()
        first.square().sum().backward()
        seen.append(gradients(wrapped))
        return seen

    def both(model: nn.Module, rank: int) -> Tensor:
        return model(row(0, rank)).square().sum() + model(row(1, rank)).square().sum()

    expected = [
        by_hand(3, both, mean=mean),
        by_hand(3, lambda model, rank: 3 * model(row(0, rank)).square().sum(), mean=mean),
        by_hand(3, both, mean=mean),
    ]
    for seen in simulated(ranks, 3):
        torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)


@OVERLAP
def test_checkpointing_changes_nothing(overlap: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, reentrant: bool | None) -> None:
            super().__init__()
            self.net, self.reentrant = net(), reentrant
            self.net.insert(2, nn.BatchNorm1d(6))  # whose buffers are sent once, not again for the recomputation

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.net:
                x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
            return x

    def ranks(reentrant: bool | None, outside: bool) -> list[Any]:
        wrapped = DataParallel(Checkpointed(None if outside else reentrant), bucket_bytes=100, overlap=overlap)
        seen = []
        for step in range(2):
            wrapped.zero_grad()
            x = row(step).requires_grad_()
            with count_traffic() as traffic:
                out = checkpoint(wrapped, x, use_reentrant=reentrant) if outside else wrapped(x)
                out.square().sum().backward()
            seen.append((gradients(wrapped), traffic.bytes_sent, x.grad))
        return seen

    expected = simulated(ranks, 3, None, False)
    for reentrant in (False, True):
        for outside in (False, True):
            torch.testing.assert_close(simulated(ranks, 3, reentrant, outside), expected, **EXACT)


def test_a_tied_weight_in_reentrant_checkpoints_needs_to_wait_for_the_end() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = checkpoint(lambda x: torch.tanh(x @ self.weight), x, use_reentrant=True)
            return x

    def ranks() -> list[Any]:
        overlapped = DataParallel(Tied())
        with pytest.raises(RuntimeError, match="second gradient of 'weight' came in one backward"):
            overlapped(row(0).requires_grad_()).sum().backward()
        waiting = DataParallel(Tied(), overlap=False)
        waiting(row(0).requires_grad_()).sum().backward()
        return gradients(waiting)

    model = Tied()
    (model(row(0, 0).requires_grad_()) + model(row(0, 1).requires_grad_())).sum().div(2).backward()
    for seen in simulated(ranks, 2):
        torch.testing.assert_close(seen, gradients(model), **NEAR)


@OVERLAP
def test_after_a_backward_that_raised_the_next_one_is_whole(overlap: bool) -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            raise ArithmeticError("half way")

    def ranks() -> list[Any]:
        wrapped = DataParallel(net(), bucket_bytes=100, overlap=overlap)
        broken = wrapped.module[2].register_forward_hook(lambda module, x, y: Broken.apply(y))
        with pytest.raises(ArithmeticError, match="half way"):
            wrapped(row(5)).sum().backward()
        broken.remove()
        wrapped.zero_grad()
        wrapped(row(0)).square().sum().backward()
        return gradients(wrapped)

    expected = by_hand(2, lambda model, rank: model(row(0, rank)).square().sum())
    for seen in simulated(ranks, 2):
        torch.testing.assert_close(seen, expected, **NEAR)


def test_autograd_grad_sends_nothing_and_a_graph_of_gradients_is_refused() -> None:
    def ranks() -> None:
        wrapped = DataParallel(net(), reduction="sum")
        x = row(0).requires_grad_()
        with count_traffic() as traffic:
            torch.autograd.grad(wrapped(x).sum(), x)
            wrapped(x).sum().backward(inputs=[x])
        assert traffic.bytes_sent == 0
        assert gradients(wrapped) == [None] * 6
        with pytest.raises(RuntimeError, match="create_graph=True"):
            wrapped(x).square().sum().backward(create_graph=True)

    simulated(ranks, 2)


def test_outputs_of_any_kind_and_calls_past_the_wrapper_are_reduced() -> None:
    class Opaque:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor, kind: str) -> Any:
            y = self.net(x)
            return {"dict": {"y": [y]}, "opaque": Opaque(y), "leaf": (self.net[0].weight, y)}[kind]

    def ranks() -> list[Any]:
        wrapped = DataParallel(Returns(), bucket_bytes=100, reduction="sum")
        seen = []
        for kind in ("dict", "opaque", "leaf", "past"):
            for _ in range(2):  # the second time onto the sums of the first
                output = wrapped.module.net(row(0)) if kind == "past" else wrapped(row(0), kind)
                y = {"dict": lambda o: o["y"][0], "opaque": lambda o: o.value, "leaf": lambda o: o[1]}.get(kind)
                (output if y is None else y(output)).square().sum().backward()
            seen.append(gradients(wrapped))
            wrapped.zero_grad()
        return seen

    expected = by_hand(3, lambda model, rank: 2 * model(row(0, rank)).square().sum(), mean=False)
    for seen in simulated(ranks, 3):
        torch.testing.assert_close(seen, [expected] * 4, rtol=1e-5, atol=1e-5)


# Parameters that change after wrapping


def test_freezing_afterwards_is_refused_and_wrapping_anew_is_right() -> None:
    def ranks() -> list[Any]:
        wrapped = DataParallel(net())
        wrapped.module[0].requires_grad_(False)
        with pytest.raises(RuntimeError, match=r"frozen or thawed .*: 0\.weight, 0\.bias\. On every rank"):
            wrapped(row(0))
        with torch.no_grad():
            wrapped(row(0))
        wrapped = DataParallel(wrapped.unwrap())
        wrapped(row(0)).square().sum().backward()
        wrapped.module[0].weight.requires_grad_()
        with pytest.raises(RuntimeError, match=r"thawed .*: 0\.weight\. On"):
            wrapped(row(0))
        return gradients(wrapped)

    expected = by_hand(2, lambda model, rank: model(row(0, rank)).square().sum())
    for seen in simulated(ranks, 2):
        torch.testing.assert_close(seen, [None, None, *expected[2:]], **NEAR)


def test_another_dtype_afterwards_is_followed() -> None:
    def ranks() -> list[Any]:
        wrapped = DataParallel(net()).double()
        wrapped(row(0).double()).square().sum().backward()
        return gradients(wrapped)

    model = net().double()
    sum(model(row(0, rank).double()).square().sum() / 2 for rank in range(2)).backward()  # type: ignore[union-attr]
    for seen in simulated(ranks, 2):
        torch.testing.assert_close(seen, gradients(model), rtol=1e-12, atol=1e-13)


def test_gradients_lie_in_buckets_that_live_as_long_as_they_do() -> None:
    def ranks() -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Conv2d(4, 5, 2)).to(memory_format=torch.channels_last)
        wrapped = DataParallel(model)
        wrapped(torch.randn(2, 3, 5, 5)).sum().backward()
        storages = {parameter.grad.untyped_storage().data_ptr() for parameter in model.parameters()}  # type: ignore[union-attr]
        assert len(storages) == 1
        for parameter in model.parameters():
            assert parameter.grad is not None
            assert parameter.grad.stride() == parameter.stride()
        held = model[0].weight.grad
        assert held is not None
        before = held.clone()
        wrapped.zero_grad()
        wrapped(torch.randn(2, 3, 5, 5)).sum().backward()
        assert torch.equal(held, before)  # the next step has buckets of its own
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        wrapped.zero_grad(set_to_none=False)
        assert not any(bool(grad.any()) for grad in gradients(model) if grad is not None)

    simulated(ranks, 2)


@OVERLAP
def test_gradients_are_held_once(overlap: bool) -> None:
    def ranks() -> tuple[int, int]:
        model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(16)])
        n_bytes = sum(parameter.nbytes for parameter in model.parameters())
        with measure_memory(model) as memory:
            wrapped = DataParallel(model, bucket_bytes=n_bytes // 8, overlap=overlap)
            dist.barrier()  # a backend keeps what it was given for a moment
            memory.reset_peak()
            wrapped(torch.ones(1, 64)).sum().backward()
            held = memory.live_bytes
            peak = memory.peak_bytes
            wrapped.zero_grad()
            dist.barrier()
            assert memory.live["gradients"] == 0
        return round(held / n_bytes, 1), round(peak / n_bytes, 1)

    held, peak = simulated(ranks, 2)[0]
    assert held == 2.0  # parameters and gradients
    assert peak <= 2.4  # and a bucket of 1/8 on top, with what the simulator needs to add it up


def test_what_other_groups_use_is_no_concern_of_this_one() -> None:
    def ranks() -> list[bool]:
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        rank = dist.get_rank()
        model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
        wrapped = DataParallel(model, group=groups[rank // 2], find_unused_parameters=True)
        sum(part(torch.ones(1, 3)).sum() for part in model[: 1 + rank // 2]).backward()  # type: ignore[union-attr]
        assert wrapped is not None
        return [parameter.grad is not None for parameter in model.parameters()]

    assert simulate_ranks(ranks, 4).results == [[True, True, False, False]] * 2 + [[True] * 4] * 2
