"""Stage 3: what happens at a block's door, against FSDP2, one process and the virtual clock."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from minillm.distributed import Network, RankError, Zero, compute, count_traffic, run_ranks, simulate_ranks
from minillm.models import Transformer, TransformerConfig


def transformer(positions: str = "rope", **settings: Any) -> Transformer:
    torch.manual_seed(2)
    config = TransformerConfig(
        vocab_size=24, d_model=16, n_layers=3, n_heads=2, d_ff=24, context_length=8, positions=positions, **settings
    )
    return Transformer(config)


def tokens_of(rank: int, step: int) -> Tensor:
    return torch.randint(24, (2, 7), generator=torch.Generator().manual_seed(10 * step + rank))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())


# -- FSDP2


def fsdp_and_zero(reshard: bool, dtype: torch.dtype | None, kind: str, positions: str) -> tuple[float, float, float]:
    """Three steps of both side by side; the largest difference of losses, gradients and parameters."""

    def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
        if kind == "sgd":
            return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return torch.optim.AdamW(model.parameters(), lr=0.01)

    theirs, ours = transformer(positions), transformer(positions)
    for module in [*theirs.blocks, theirs]:
        policy = MixedPrecisionPolicy(param_dtype=dtype)
        fully_shard(module, reshard_after_forward=reshard, mp_policy=policy)
    their_optimizer = optimizer_for(theirs)
    zero = Zero(ours, optimizer_for(ours), stage=3, reshard_after_forward=reshard, parameter_dtype=dtype)
    losses, gradients = [], []
    for step in range(3):
        tokens = tokens_of(dist.get_rank(), step)
        pair = loss_of(theirs, tokens), loss_of(ours, tokens)
        losses.append(float((pair[0] - pair[1]).detach()))
        pair[0].backward()
        pair[1].backward()
        found = zero.gradients()
        gradients.extend(
            float((parameter.grad.full_tensor() - found[name].float()).abs().max())
            for name, parameter in theirs.named_parameters()
        )
        # Ours scales gradients as they are, in bfloat16; theirs have been copied to float32.
        max_norm = 0.7 if dtype is None else torch.inf
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm).full_tensor()
        gradients.append(float(norm - zero.clip_grad_norm_(max_norm)))
        their_optimizer.step()
        their_optimizer.zero_grad()
        zero.step()
        zero.zero_grad()
    whole = zero.state_dict(everywhere=True)["model"]
    parameters = [
        float((parameter.detach().full_tensor() - whole[name]).abs().max())
        for name, parameter in theirs.named_parameters()
    ]
    return max(map(abs, losses)), max(map(abs, gradients)), max(parameters)


@pytest.mark.parametrize(
    ("reshard", "kind", "positions"), [(True, "sgd", "alibi"), (False, "adamw", "rope")], ids=["resharded", "kept"]
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_losses_gradients_and_parameters_are_fsdp2s(
    reshard: bool, dtype: torch.dtype | None, kind: str, positions: str
) -> None:
    for differences in simulate_ranks(fsdp_and_zero, 2, reshard, dtype, kind, positions).results:
        assert max(differences) < 3e-6


def test_real_processes_agree_with_fsdp2_too() -> None:
    for differences in run_ranks(fsdp_and_zero, 2, True, torch.bfloat16, "sgd", "learned"):
        assert max(differences) < 3e-6


# -- models of other kinds


class Twice(nn.Module):
    """One block that is run twice, and one of which a part is not used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(nn.ModuleDict({"used": nn.Linear(6, 6), "idle": nn.Linear(6, 2)}) for _ in range(2))
        for block in self.blocks:
            block.forward = partial(self._run, block)  # type: ignore[method-assign]
        self.double()

    @staticmethod
    def _run(block: nn.ModuleDict, x: Tensor) -> Tensor:
        return torch.tanh(block["used"](x)) + x

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = self.blocks[1](self.blocks[0](self.blocks[1](self.blocks[0](x))))
        return out


@dataclass
class Both:
    out: Tensor
    extra: dict[str, Tensor]


class Branches(nn.Module):
    """Blocks that take two inputs and give a dataclass; the loss uses what is not handed on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.memory = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(Branch() for _ in range(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        memory, total = self.memory(x), x.new_zeros(())
        for block in self.blocks:
            both = block(x, memory=memory)
            x = both.out
            total = total + both.extra["size"]
        return total.expand(1, 1) if self.training else x


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, *, memory: Tensor) -> Both:
        out = x + torch.tanh(self.own(x)) * self.cross(memory)
        return Both(out, {"size": out.square().mean()})


class Leaves(nn.Module):
    """Blocks that are given a parameter of the model, whose gradient is whole before theirs are; in lists of lists."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.scale = nn.Parameter(torch.full((6,), 0.7))
        self.pairs = nn.ModuleList(nn.ModuleList(Leaf() for _ in range(2)) for _ in range(2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for block in (block for pair in self.pairs for block in pair):
            x = block(x, scale=self.scale)
        return x


class Leaf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x))) * scale


class Frozen(nn.Module):
    """Little that is trained beside much that is not: the frozen weights still lead to the gradient of the input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)) for _ in range(3))
        for block in self.blocks:
            block[0].requires_grad_(False)
            block[1].requires_grad_(False)
        for parameter in self.blocks[1].parameters():
            parameter.requires_grad_(False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return x


class Checkpointed(nn.Module):
    def __init__(self, span: int, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.first = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)) for _ in range(4))
        self.span, self.reentrant = span, reentrant
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for start in range(0, 4, self.span):
            x = checkpoint(self._some, start, x, use_reentrant=self.reentrant)
        return x

    def _some(self, start: int, x: Tensor) -> Tensor:
        for block in self.blocks[start : start + self.span]:
            x = block(x) + x
        return x


def input_of(rank: int, step: int) -> Tensor:
    draw = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(3, 6, generator=draw, dtype=torch.float64)


def train_blocks(make: Callable[[], nn.Module], settings: dict[str, Any]) -> tuple[dict[str, Tensor], Any, Any, int]:
    model = make()
    zero = Zero(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), stage=3, **settings)
    with count_traffic() as traffic:
        for step in range(3):
            zero.zero_grad()
            model(input_of(dist.get_rank(), step)).square().mean().backward()
            gradients = zero.gradients()
            zero.step()
    gathers = [event.label for event in traffic.events if event.operation == "all_gather" and event.label]
    left = sum(p.untyped_storage().nbytes() for p in model.parameters())
    with zero.gathered():
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}, gradients, gathers, left


@pytest.mark.parametrize(
    "make",
    [
        Twice,
        Branches,
        Leaves,
        Frozen,
        partial(Checkpointed, 1, False),
        partial(Checkpointed, 2, False),
        partial(Checkpointed, 1, True),
        partial(Checkpointed, 2, True),
    ],
    ids=[
        "run twice",
        "branches",
        "leaves",
        "frozen",
        "recomputed",
        "recomputed by twos",
        "reentrant",
        "reentrant by twos",
    ],
)
@pytest.mark.parametrize("settings", [{}, {"reshard_after_forward": False}, {"prefetch": False}])
def test_three_steps_are_those_of_one_process(make: Callable[[], nn.Module], settings: dict[str, Any]) -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        sum(model(input_of(rank, step)).square().mean() / 3 for rank in range(3)).backward()  # type: ignore[union-attr]
        optimizer.step()
    for found, gradients, _, left in simulate_ranks(train_blocks, 3, make, settings).results:
        torch.testing.assert_close(found, model.state_dict(), rtol=1e-10, atol=1e-13)
        for name, parameter in model.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert name not in gradients or torch.allclose(gradients[name], expected, rtol=1e-9, atol=1e-13)
            assert (name in gradients) == parameter.requires_grad
        assert left == 8 * len(gradients | found)  # one NaN for each parameter


@pytest.mark.parametrize("settings", [{}, {"reshard_after_forward": False}, {"prefetch": False}])
@pytest.mark.parametrize("make", [Leaves, partial(Checkpointed, 1, False)])
def test_a_retained_graph_is_gone_through_again(make: Callable[[], nn.Module], settings: dict[str, Any]) -> None:
    def ranks() -> dict[str, Tensor]:
        model = make()
        zero = Zero(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=3, **settings)
        x = input_of(dist.get_rank(), 0).requires_grad_()
        out = model(x)
        out.square().mean().backward(retain_graph=True)
        out.cos().mean().backward()
        assert x.grad is not None
        return zero.gradients() | {"x": x.grad}

    model = make()
    inputs = [input_of(rank, 0).requires_grad_() for rank in range(3)]
    for x in inputs:
        out = model(x)
        (out.square().mean() + out.cos().mean()).backward()
    expected = {name: parameter.grad / 3 for name, parameter in model.named_parameters() if parameter.grad is not None}
    for found, x in zip(simulate_ranks(ranks, 3).results, inputs, strict=True):
        torch.testing.assert_close(found, expected | {"x": x.grad}, rtol=1e-10, atol=1e-13)


def test_who_is_gathered_when() -> None:
    """The block that comes next is asked for before the work of this one; the first pass knows no next one."""

    def ranks(settings: dict[str, Any]) -> list[list[str]]:
        model = Checkpointed(4, False)  # recomputing all four at once is the hardest to follow
        model.forward = lambda x: model._some(0, model.first(x))  # type: ignore[method-assign]
        zero = Zero(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=3, **settings)
        log: list[list[str]] = []
        for step in range(2):
            zero.zero_grad()
            with count_traffic() as traffic:
                loss = model(input_of(0, step)).square().mean()
                traffic_of_forward = len(traffic.events)
                loss.backward()
                zero.step()
            labels = [event.label.replace("parameters of ", "").replace("blocks.", "") for event in traffic.events]
            log.append(labels[:traffic_of_forward])
            log.append(labels[traffic_of_forward:])
        return log

    root, g = "the model", "gradients of "
    forward = [root, "0", "1", "2", "3"]
    backward = [root, "3", "2", g + "3", "1", g + "2", "0", g + "1", g + "0", g + root]
    assert simulate_ranks(ranks, 2, {}).results[0] == [forward, backward, forward, backward]
    late = [root, "3", g + "3", "2", g + "2", "1", g + "1", "0", g + "0", g + root]
    assert simulate_ranks(ranks, 2, {"prefetch": False}).results[0] == [forward, late, forward, late]
    kept = [label for label in backward if label.startswith(g)]
    assert simulate_ranks(ranks, 2, {"reshard_after_forward": False}).results[0] == [forward, kept, forward, kept]


@pytest.mark.parametrize("make", [partial(Checkpointed, 1, False), partial(Checkpointed, 2, False)])
def test_recomputing_a_block_gathers_it_no_third_time(make: Callable[[], nn.Module]) -> None:
    for _, _, gathers, _ in simulate_ranks(train_blocks, 2, make, {}).results:
        assert gathers.count("parameters of blocks.1") == 2 * 3


def test_gathers_hide_behind_the_work_of_the_block_before() -> None:
    """On the virtual clock, where a block works for 10 ms and comes in 4 ms."""

    def ranks(prefetch: bool) -> None:
        model = nn.Sequential()
        model.blocks = nn.ModuleList(nn.Linear(100, 100, bias=False) for _ in range(6))
        model.forward = lambda x: [x := block(x) for block in model.blocks][-1]  # type: ignore[method-assign]
        for block in model.blocks:
            block.register_forward_hook(lambda *_: compute(10e-3))
            block.register_full_backward_hook(lambda *_: compute(20e-3))
        zero = Zero(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=3, prefetch=prefetch)
        for _ in range(2):
            model(torch.ones(1, 100, requires_grad=True)).sum().backward()
            zero.step()
            zero.zero_grad()

    # A rank sends half of each block: 20,000 bytes in 4 ms.
    network = Network(latency=0.0, bandwidth=5e6)
    hidden, seen = (simulate_ranks(ranks, 2, prefetch, network=network).makespan for prefetch in (True, False))

    work = 2 * 6 * 30e-3
    # At first the first rank's parameters go around, 40,000 bytes a block. In one step of n blocks that are not
    # prefetched the work waits for 2 n gathers, in backward each behind the gradients of the block before, and for the
    # last gradients; else for the first gather of either pass, but in the very first forward nobody knows what is next.
    start, work, n, move = 6 * 8e-3, 6 * 30e-3, 6, 4e-3
    assert seen == pytest.approx(start + 2 * (work + (2 * n + n - 1 + 1) * move))
    assert hidden == pytest.approx(start + 2 * (work + 3 * move) + (n - 1) * move)


def test_evaluation_leaves_nothing_gathered_and_gathered_holds_everything() -> None:
    def ranks() -> tuple[float, list[int], bool]:
        model = transformer().double()
        plain = transformer().double()
        zero = Zero(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=3, reshard_after_forward=False)
        tokens = tokens_of(0, 0)
        sizes = []
        with torch.no_grad():
            difference = (model(tokens) - plain(tokens)).abs().max()
        sizes.append(sum(parameter.untyped_storage().nbytes() for parameter in model.parameters()))
        with zero.gathered():
            sizes.append(len(model.attention_weights(tokens)))  # calls parts of blocks, past the blocks' own forward
            held = all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
            model(tokens)
            sizes.append(int(torch.isnan(model.blocks[0].attention.output.weight).sum()))
        sizes.append(sum(parameter.untyped_storage().nbytes() for parameter in model.parameters()))
        return float(difference), sizes, held

    n_parameters = len(list(transformer().parameters()))
    for difference, sizes, held in simulate_ranks(ranks, 2).results:
        assert difference == 0.0
        assert held
        assert sizes == [8 * n_parameters, 3, 0, 8 * n_parameters]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_is_written_to_gathered_parameters_stays(stage: int, dtype: torch.dtype | None) -> None:
    def ranks() -> bool:
        model, other = transformer(), transformer("alibi")
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)).bfloat16())
        zero = Zero(model, torch.optim.SGD(model.parameters(), lr=0.0), stage=stage, parameter_dtype=dtype)
        with zero.gathered(write=True):
            model.load_state_dict(other.state_dict())
        loss_of(model, tokens_of(0, 0)).backward()
        zero.step()
        found = zero.state_dict(everywhere=True)["model"]
        return all(torch.equal(found[name], value) for name, value in other.state_dict().items())

    assert simulate_ranks(ranks, 2).results == [True, True]


def freed_forward(model: Transformer, zero: Zero) -> object:
    return model.token_embedding(tokens_of(0, 0))


def freed_part_of_a_block(model: Transformer, zero: Zero) -> object:
    return model.attention_weights(tokens_of(0, 0))


def freed_state(model: Transformer, zero: Zero) -> object:
    return model.state_dict()


def freed_state_of_a_block(model: Transformer, zero: Zero) -> object:
    return model.blocks[0].state_dict()


def loading_freed(model: Transformer, zero: Zero) -> object:
    return model.load_state_dict(transformer().state_dict())


def stepping_gathered(model: Transformer, zero: Zero) -> object:
    with zero.gathered():
        return zero.step()


def gathering_twice(model: Transformer, zero: Zero) -> object:
    with zero.gathered(), zero.gathered():
        return None


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (
            freed_forward,
            r"parameters of token_embedding are freed \(stage 3\): they are there in the forward of the model",
        ),
        (freed_part_of_a_block, "there in the forward of the model"),
        (freed_state, "token_embedding.weight is freed"),
        (freed_state_of_a_block, "blocks.0.attention_norm.weight is freed"),
        (loading_freed, "or `with zero.gathered"),
        (stepping_gathered, "leave that before this"),
        (gathering_twice, "must not be entered twice"),
    ],
)
def test_what_freed_parameters_cannot_do_is_refused_in_words(
    use: Callable[[Transformer, Zero], object], words: str
) -> None:
    def ranks() -> None:
        model = transformer()
        use(model, Zero(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=3))

    with pytest.raises(RankError, match=words):
        simulate_ranks(ranks, 2)


def test_freed_parameters_show_nan() -> None:
    def ranks() -> bool:
        model = transformer()
        Zero(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=3)
        return all(bool(torch.isnan(parameter + 1).all()) for parameter in model.parameters())

    assert simulate_ranks(ranks, 2).results == [True, True]


def test_an_error_in_backward_is_over_with_zero_grad() -> None:
    def ranks() -> tuple[bool, bool]:
        model, plain = transformer(), transformer()
        zero = Zero(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=3)

        def fail(_: Tensor) -> None:
            raise ValueError("stop here")

        def broken_block(_: nn.Module, __: Any, output: Tensor) -> None:
            (output[0] if isinstance(output, tuple) else output).register_hook(fail)

        handle = model.blocks[1].register_forward_hook(broken_block)
        with pytest.raises(ValueError, match="stop here"):
            loss_of(model, tokens_of(0, 0)).backward()
        handle.remove()
        with pytest.raises(RuntimeError, match="did not come to its end"):
            zero.step()
        zero.zero_grad()
        loss_of(model, tokens_of(0, 0)).backward()
        loss_of(plain, tokens_of(0, 0)).backward()
        found = zero.gradients()
        same = all(torch.equal(found[name], parameter.grad) for name, parameter in plain.named_parameters())
        zero.step()
        return same, all(bool(torch.isnan(parameter).all()) for parameter in model.parameters())

    assert simulate_ranks(ranks, 2).results == [(True, True)] * 2


def test_a_changed_parameter_is_noticed_by_an_old_graph() -> None:
    def ranks() -> None:
        model = transformer()
        zero = Zero(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=3)
        old = loss_of(model, tokens_of(0, 0))
        loss_of(model, tokens_of(0, 1)).backward()
        zero.step()
        old.backward()

    with pytest.raises(RankError, match="modified by an inplace operation"):
        simulate_ranks(ranks, 2)


def test_blocks_are_modules_of_the_model_beside_each_other() -> None:
    model = transformer()

    def ranks(blocks: Any) -> None:
        fresh = transformer()
        chosen = blocks(fresh)
        Zero(fresh, torch.optim.SGD(fresh.parameters(), lr=0.1), stage=3, blocks=chosen)

    for blocks, words in [
        (lambda net: ["blocks"], "blocks must be modules, got str"),
        (lambda net: [model.blocks[0]], "blocks must be modules inside of the model"),
        (lambda net: [net], "blocks must be modules inside of the model"),
        (lambda net: [net.blocks[0], net.blocks[0].attention], "blocks must not lie in each other"),
    ]:
        with pytest.raises(RankError, match=words):
            simulate_ranks(ranks, 2, blocks)


def test_nothing_holds_the_model_when_it_is_gone() -> None:
    def ranks() -> "weakref.ref[nn.Module]":
        model = transformer()
        zero = Zero(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=3)
        loss_of(model, tokens_of(0, 0)).backward()
        zero.step()
        return weakref.ref(model)

    references = simulate_ranks(ranks, 2).results
    gc.collect()
    assert [reference() for reference in references] == [None, None]
