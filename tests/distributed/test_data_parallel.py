"""Data parallelism against DDP as a guest, one process in float64, bytes by hand and a chain's makespan by hand."""

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from minillm.distributed import DataParallel, Network, RankError, compute, now, simulate_ranks
from minillm.distributed.processes import run_ranks
from minillm.distributed.traffic import count_traffic
from minillm.models import Transformer, TransformerConfig

CONFIG = TransformerConfig(vocab_size=29, context_length=8, d_model=16, n_layers=2, n_heads=2, tied_embeddings=True)
WAYS: list[dict[str, Any]] = [
    {"bucket_bytes": None},
    {"bucket_bytes": None, "overlap": False},
    {"bucket_bytes": 3000},
    {"bucket_bytes": 3000, "overlap": False},
    {},
    {"find_unused_parameters": True},
]


def simulated(fn: Callable[..., Any], n_ranks: int, *args: Any) -> list[Any]:
    return simulate_ranks(fn, n_ranks, *args).results


def transformer(dtype: torch.dtype, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(CONFIG).to(dtype)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def inputs(step: int = 0, rows: int = 3) -> Tensor:
    """This rank's rows."""
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]


def assert_same(ours: Any, theirs: Any, **tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, **(tolerance or {"rtol": 0.0, "atol": 0.0}))


# Equal to DDP


def train(
    way: dict[str, Any] | None, dtype: torch.dtype, optimizer: str = "SGD", steps: int = 20
) -> tuple[list[Any], list[Tensor]]:
    """Steps with `way`, or with DDP for None: each step's gradients on this rank, and the last weights."""
    model = transformer(dtype)
    wrapped = DistributedDataParallel(model) if way is None else DataParallel(model, **way)
    step = getattr(torch.optim, optimizer)(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(7 + dist.get_rank())
    kept = []
    for _ in range(steps):
        tokens = torch.randint(29, (2, 9), generator=generator)
        logits = wrapped(tokens[:, :-1])
        step.zero_grad()
        F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
        kept.append(gradients(model))
        step.step()
    del wrapped
    return kept, [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_ranks", [1, 2, 3, 4])
def test_twenty_steps_are_ddps_to_the_bit(n_ranks: int, dtype: torch.dtype) -> None:
    expected = simulated(train, n_ranks, None, dtype)
    ways = WAYS if (n_ranks, dtype) == (3, torch.float32) else WAYS[2:3]
    for way in ways:
        assert_same(simulated(train, n_ranks, way, dtype), expected)


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_real_processes_give_ddps_gradients_and_the_simulators(n_ranks: int) -> None:
    dtypes = (torch.float32, torch.bfloat16)
    ways = (None, {"bucket_bytes": 3000}, {"bucket_bytes": None, "overlap": False})

    def ranks() -> list[list[Any]]:
        return [[train(way, dtype, "AdamW", 4)[0] for way in ways] for dtype in dtypes]

    results = run_ranks(ranks, n_ranks)
    for number, dtype in enumerate(dtypes):
        in_simulator = simulated(train, n_ranks, {}, dtype, "AdamW", 4)
        for rank in range(n_ranks):
            ddp, *ours = results[rank][number]
            for kept in (*ours, in_simulator[rank][0]):
                if n_ranks == 2:  # a + b is b + a
                    assert_same(kept, ddp)
                else:  # three numbers are added in another order in another bucket: the first gradients differ by that
                    loose = {"rtol": 1e-5, "atol": 1e-7} if dtype is torch.float32 else {"rtol": 5e-2, "atol": 1e-3}
                    assert_same(kept[0], ddp[0], **loose)


@pytest.mark.parametrize("way", [{}, {"bucket_bytes": None, "overlap": False}])
def test_accumulation_is_ddps(way: dict[str, Any]) -> None:
    def ranks(ours: bool, to_none: bool) -> list[Any]:
        model = net()
        wrapped = DataParallel(model, **way) if ours else DistributedDataParallel(model)
        kept = []
        for step in range(3):
            wrapped.zero_grad(set_to_none=to_none)
            for micro_batch in range(3):
                if micro_batch < 2:
                    with wrapped.no_sync(), count_traffic() as traffic:
                        wrapped(inputs(10 * step + micro_batch)).square().mean().backward()
                    assert traffic.bytes_sent == 0 or not ours  # DDP agrees on its buckets' order
                else:
                    wrapped(inputs(10 * step + micro_batch)).square().mean().backward()
                kept.append(gradients(model))
        return kept

    for to_none in (True, False):
        assert_same(simulated(ranks, 3, True, to_none), simulated(ranks, 3, False, to_none))


def test_batch_norm_follows_the_first_rank_as_in_ddp() -> None:
    def ranks(ours: bool) -> list[Any]:
        torch.manual_seed(dist.get_rank())  # the wrapper must make them alike
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
        model[1].running_mean += dist.get_rank()
        wrapped = DataParallel(model, bucket_bytes=50) if ours else DistributedDataParallel(model)
        kept = []
        for step in range(3):
            wrapped.zero_grad()
            wrapped(inputs(step)).square().mean().backward()
            kept.append((gradients(model), [buffer.clone() for buffer in model.buffers()]))
        return kept

    assert_same(simulated(ranks, 3, True), simulated(ranks, 3, False))


def test_mixed_dtypes_frozen_parameters_and_autocast_are_ddps() -> None:
    def ranks(ours: bool) -> list[Any]:
        model = net()
        model[2].requires_grad_(False)
        model[4].to(torch.bfloat16)
        model[0].bias.requires_grad_(False)
        wrapped = DataParallel(model, bucket_bytes=40) if ours else DistributedDataParallel(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = wrapped(inputs()).float().square().mean()
        loss.backward()
        return gradients(model)

    ours = simulated(ranks, 3, True)
    assert_same(ours, simulated(ranks, 3, False))
    assert [grad is None for grad in ours[0]] == [False, True, True, True, False, False]


# Equal to one process


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_uneven_batches_are_one_process_with_the_whole_batch(optimizer: str) -> None:
    def rows(step: int, rank: int, n_ranks: int) -> Tensor:
        """Rank 1 has none in every other step: its part of the last batch."""
        count = 0 if rank == 1 and step % 2 else rank + 1
        return torch.randint(29, (n_ranks, 9), generator=torch.Generator().manual_seed(100 * step + rank))[:count]

    def loss(model: nn.Module, tokens: Tensor, n_targets: int) -> Tensor:
        logits = model(tokens[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum") / n_targets

    def ranks(way: dict[str, Any]) -> list[Tensor]:
        wrapped = DataParallel(transformer(torch.float64, seed=dist.get_rank()), reduction="sum", **way)
        step = getattr(torch.optim, optimizer)(wrapped.parameters(), lr=0.01)
        for number in range(20):
            tokens = rows(number, dist.get_rank(), dist.get_world_size())
            n_targets = torch.tensor(8 * len(tokens))
            dist.all_reduce(n_targets)
            step.zero_grad()
            loss(wrapped, tokens, int(n_targets)).backward()
            step.step()
        return [parameter.detach() for parameter in wrapped.parameters()]

    for n_ranks in (1, 2, 3, 4):
        model = transformer(torch.float64)
        step = getattr(torch.optim, optimizer)(model.parameters(), lr=0.01)
        for number in range(20):
            tokens = torch.cat([rows(number, rank, n_ranks) for rank in range(n_ranks)])
            step.zero_grad()
            loss(model, tokens, 8 * len(tokens)).backward()
            step.step()
        expected = [parameter.detach() for parameter in model.parameters()]
        for way in WAYS[1:4] if (n_ranks, optimizer) == (3, "SGD") else WAYS[2:3]:
            for result in simulated(ranks, n_ranks, way):
                assert_same(result, expected, rtol=1e-9, atol=1e-12)
        if n_ranks == 3:
            for result in run_ranks(ranks, n_ranks, {"bucket_bytes": 3000}):
                assert_same(result, expected, rtol=1e-9, atol=1e-12)


def test_a_group_of_some_ranks_shares_among_themselves() -> None:
    def ranks() -> tuple[int, list[Any], list[Any]]:
        pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        model = net()
        model[0].weight.data += dist.get_rank() % 2  # the pairs have different models
        plain = copy.deepcopy(model)
        wrapped = DataParallel(model, group=pairs[dist.get_rank() % 2])
        wrapped(inputs()).square().mean().backward()
        plain(inputs()).square().mean().backward()
        with pytest.raises(ValueError, match="group must be one that this rank belongs to"):
            DataParallel(net(), group=pairs[1 - dist.get_rank() % 2])
        return dist.get_rank(), gradients(model), gradients(plain)

    results = simulated(ranks, 4)
    for rank, ours, _ in results:
        mine, partner = results[rank][2], results[(rank + 2) % 4][2]
        assert_same(ours, [(a + b) / 2 for a, b in zip(mine, partner, strict=True)], rtol=1e-6, atol=1e-8)


# Bytes and time


def test_every_way_sends_exactly_the_rings_bytes() -> None:
    def ranks(way: dict[str, Any]) -> tuple[int, int, int, list[str]]:
        model = transformer(torch.float32)
        wrapped = DataParallel(model, **way)
        with count_traffic() as traffic:
            wrapped(torch.zeros(2, 8, dtype=torch.int64)).sum().backward()
        n_bytes = sum(parameter.nbytes for parameter in model.parameters())
        return traffic.bytes_sent, n_bytes, traffic.calls["all_reduce"], sorted(traffic.by_label)

    for n_ranks in (2, 4):
        for way in WAYS:
            simulation = simulate_ranks(ranks, n_ranks, way)
            sent, n_bytes, calls, labels = zip(*simulation.results, strict=True)
            used_map = 28 if way.get("find_unused_parameters") else 0  # one byte a parameter
            assert sum(sent) == 2 * (n_ranks - 1) * (n_bytes[0] + used_map)
            if "bucket_bytes" in way and way["bucket_bytes"] is None:
                assert calls[0] == 28
                assert labels[0][0] == "gradients of blocks.0.attention.output.bias"
            if way == {"bucket_bytes": 3000}:
                assert labels[0][0].startswith("gradients of blocks.0.")
                assert " ... " in labels[0][0]
                assert 1 < calls[0] < 28
    assert simulate_ranks(ranks, 2, {}).results == run_ranks(ranks, 2, {})


def test_the_first_bucket_is_small_so_that_it_leaves_early() -> None:
    def ranks() -> list[int]:
        wrapped = DataParallel(
            nn.Sequential(*[nn.Linear(1024, 300) if i % 2 == 0 else nn.Linear(300, 1024) for i in range(4)])
        )
        with count_traffic() as traffic:
            wrapped(torch.ones(1, 1024)).sum().backward()
        return [event.n_bytes for event in traffic.events]

    layer = 4 * 1024 * 300  # a weight alone exceeds 1 MiB
    biases = [4 * 300, 4 * 1024]
    assert simulated(ranks, 2)[0] == [layer + biases[1], 3 * layer + sum(biases) + biases[0]]


class _Layer(torch.autograd.Function):
    """y = x + sum(w), in the given virtual times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds, ctx.like = backward, weight
        compute(forward, name="forward")
        return x + weight.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        compute(ctx.seconds, name=f"backward of {len(ctx.like)}")
        return gradient, torch.full_like(ctx.like, float(gradient.sum())), None, None


class _Chain(nn.Module):
    def __init__(self, sizes: list[int], backward: float) -> None:
        super().__init__()
        self.layers = nn.ParameterList(torch.zeros(n_elements) for n_elements in sizes)
        self.backward_seconds = backward

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.layers:
            x = _Layer.apply(x, weight, 1.0, self.backward_seconds)
        return x


@pytest.mark.parametrize("backward", [2.0, 40.0])  # of a layer: shorter and longer than its all-reduce
def test_overlap_hides_what_a_chain_of_equal_layers_can_hide(backward: float) -> None:
    n_layers, n_elements, n_ranks = 6, 100, 4
    network = Network(latency=1.0, bandwidth=100.0)

    def ranks(way: dict[str, Any]) -> tuple[float, list[Tensor | None]]:
        wrapped = DataParallel(_Chain([n_elements] * n_layers, backward), **way)
        dist.barrier()
        begin = now()
        wrapped(torch.ones(()) * (dist.get_rank() + 1)).backward()
        return now() - begin, gradients(wrapped)

    def seconds(way: dict[str, Any]) -> float:
        results = simulate_ranks(ranks, n_ranks, way, network=network).results
        for _, grads in results:
            assert_same(grads, [torch.ones(n_elements)] * n_layers)
        (taken,) = {taken for taken, _ in results}
        return float(taken)

    def all_reduce(layers: int) -> float:
        return 2 * (n_ranks - 1) * (1.0 + 4 * n_elements * layers / n_ranks / 100.0)

    def hidden(buckets: int) -> float:
        layers = n_layers // buckets
        each, message = layers * backward, all_reduce(layers)
        return n_layers * 1.0 + each + (buckets - 1) * max(each, message) + message

    work, bucket = n_layers * (1.0 + backward), 4 * n_elements * 2
    naive = seconds({"bucket_bytes": None, "overlap": False})
    bucketed = seconds({"bucket_bytes": bucket, "overlap": False})
    overlapped = seconds({"bucket_bytes": bucket})
    assert naive == pytest.approx(work + n_layers * all_reduce(1))
    assert bucketed == pytest.approx(work + 3 * all_reduce(2))
    assert overlapped == pytest.approx(hidden(3))
    assert seconds({"bucket_bytes": None}) == pytest.approx(hidden(6))
    assert seconds({}) == pytest.approx(work + all_reduce(n_layers))  # one bucket: nothing to hide behind
    assert work < overlapped < bucketed < naive
    if backward == 40.0:
        assert overlapped == pytest.approx(work + all_reduce(2))  # all but the last bucket is hidden


def test_the_timeline_shows_late_layers_travel_while_early_ones_compute() -> None:
    def ranks() -> None:
        wrapped = DataParallel(_Chain([10, 20, 30], 5.0), bucket_bytes=None)
        wrapped(torch.ones(())).backward()

    simulation = simulate_ranks(ranks, 2, network=Network(latency=1.0, bandwidth=1e9))
    spans = [span for span in simulation.timeline if (span.rank, span.lane) == (0, "compute")]
    last, middle, first = (span for span in spans if span.name.startswith("backward"))
    sent = {message.label: message for message in simulation.messages if message.source == 0}
    assert sent["gradients of layers.2"].start == pytest.approx(last.end)
    assert sent["gradients of layers.2"].end < middle.end
    assert sent["gradients of layers.0"].start == pytest.approx(first.end)


# Models that differ, wrappers that are in the way


def test_different_models_are_named_on_every_rank() -> None:
    def build(kind: str) -> nn.Module:
        model = net()
        rank = dist.get_rank()
        if kind == "shape" and rank == 2:
            model[2] = nn.Linear(6, 7)
        if kind == "more" and rank == 1:
            model.append(nn.Linear(3, 3))
        if kind == "fewer" and rank == 1:
            del model[4]
        if kind == "dtype" and rank > 0:
            model[4].double()
        if kind == "frozen" and rank == 1:
            model[0].bias.requires_grad_(False)
        if kind == "buffer" and rank == 0:
            model.register_buffer("table", torch.zeros(2))
        return model

    def ranks(kind: str) -> str:
        with pytest.raises(ValueError) as caught:
            DataParallel(build(kind), overlap=kind != "settings" or dist.get_rank() == 0)
        dist.barrier()
        return str(caught.value)

    start = "every rank must bring the same model: rank 0 has "
    for kind, expected in {
        "shape": "'parameter 2.weight: float32 (5, 6)' where rank 2 has 'parameter 2.weight: float32 (7, 6)'",
        "more": "'the end' where rank 1 has 'parameter 5.weight: float32 (3, 3)'",
        "fewer": "'parameter 4.weight: float32 (3, 5)' where rank 1 has 'the end'",
        "dtype": "'parameter 4.weight: float32 (3, 5)' where rank 1 has 'parameter 4.weight: float64 (3, 5)'",
        "frozen": "'parameter 0.bias: float32 (6,)' where rank 1 has 'parameter 0.bias: float32 (6,), frozen'",
        "buffer": "'buffer table: float32 (2,)' where rank 1 has 'the end'",
    }.items():
        assert simulated(ranks, 3, kind) == [start + expected] * 3
    (said,) = set(simulated(ranks, 3, "settings"))
    assert "'overlap': True" in said
    assert "'overlap': False" in said
    assert (
        run_ranks(ranks, 2, "more") == [start + "'the end' where rank 1 has 'parameter 5.weight: float32 (3, 3)'"] * 2
    )


def test_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="needs a process group"):
        DataParallel(net())
    with pytest.raises(TypeError, match=r"model must be a torch\.nn.Module, got int"):
        DataParallel(3)  # type: ignore[arg-type]

    def ranks() -> None:
        for error, said, model, arguments in (
            (TypeError, "bucket_bytes must be None or an int, got 1.5", net(), {"bucket_bytes": 1.5}),
            (TypeError, "bucket_bytes must be None or an int, got True", net(), {"bucket_bytes": True}),
            (ValueError, "bucket_bytes must be None or at least 1, got 0", net(), {"bucket_bytes": 0}),
            (ValueError, "reduction must be 'mean' or 'sum', got 'max'", net(), {"reduction": "max"}),
            (ValueError, "values, got a parameter without: 'weight'", nn.Linear(2, 2, device="meta"), {}),
            (ValueError, "values, got a parameter without: 'weight'", nn.LazyLinear(2), {}),
            (ValueError, "dense gradients, got sparse=True at '0'", nn.Sequential(nn.Embedding(2, 2, sparse=True)), {}),
            (ValueError, "wrapped already, got a DataParallel at ''", DataParallel(net()), {}),
            (ValueError, "a DistributedDataParallel at 'inner'", nn.ModuleDict({"inner": _ddp()}), {}),
        ):
            with pytest.raises(error, match=said.replace("(", r"\(")):
                DataParallel(model, **arguments)  # type: ignore[arg-type]

    simulated(ranks, 1)


def _ddp() -> nn.Module:
    return DistributedDataParallel(net())


def test_a_model_has_one_wrapper_at_a_time() -> None:
    def ranks() -> Any:
        model = net()
        wrapped = DataParallel(model)
        with pytest.raises(ValueError, match=r"'0.weight' belongs to a DataParallel; unwrap\(\) that first"):
            DataParallel(nn.Sequential(*model))
        assert wrapped.unwrap() is model
        with count_traffic() as traffic:
            model(inputs()).sum().backward()
            wrapped(inputs()).sum().backward()  # no longer synchronises
        assert traffic.bytes_sent == 0
        model.zero_grad()
        wrapped = DataParallel(model)
        wrapped(inputs()).square().mean().backward()
        del wrapped
        gc.collect()
        kept = gradients(model)
        model.zero_grad()
        with count_traffic() as traffic:
            model(inputs()).sum().backward()  # what wrapped it is gone, and its hooks with it
            model.zero_grad()
            wrapped = DataParallel(model)
        assert "all_reduce" not in traffic.by_operation or traffic.by_label.keys() == {
            "comparison of the models",
            "the first rank's parameters and buffers",
        }
        wrapped(inputs()).square().mean().backward()
        assert_same(gradients(model), kept)
        return kept

    first, second = simulated(ranks, 2)
    assert_same(first, second)


def test_states_are_the_models() -> None:
    def ranks() -> None:
        model = net()
        wrapped = DataParallel(model)
        assert list(wrapped.state_dict()) == list(model.state_dict())
        assert wrapped.state_dict()._metadata == model.state_dict()._metadata
        assert list(nn.ModuleDict({"inner": wrapped}).state_dict()) == [f"inner.{name}" for name in model.state_dict()]
        changed = {name: value + 1 for name, value in model.state_dict().items()}
        assert wrapped.load_state_dict(changed).missing_keys == []
        assert_same(dict(model.state_dict()), changed)
        with pytest.raises(ValueError, match="assign must be False"):
            wrapped.load_state_dict(changed, assign=True)
        saved = io.BytesIO()
        torch.save(wrapped.state_dict(), saved)
        saved.seek(0)
        assert_same(dict(torch.load(saved)), changed)

    simulated(ranks, 2)


def test_copies_and_pickles() -> None:
    def ranks() -> tuple[list[Any], ...]:
        wrapped = DataParallel(net(), bucket_bytes=100, reduction="sum")
        twin = copy.deepcopy(wrapped)
        assert twin.group is wrapped.group
        assert twin.module is not wrapped.module
        for model in (wrapped, twin):
            model(inputs()).square().mean().backward()
        with pytest.raises(TypeError, match=r"cannot be pickled: pickle \.module instead"):
            pickle.dumps(wrapped)
        plain = pickle.loads(pickle.dumps(wrapped.module))
        DataParallel(plain)  # belongs to nobody
        DataParallel(copy.deepcopy(wrapped.module))
        return gradients(wrapped), gradients(twin)

    (ours, twins), (others, _) = simulated(ranks, 2)
    assert_same(ours, twins)
    assert_same(ours, others)


def test_a_model_without_gradients_or_parameters() -> None:
    def ranks() -> None:
        assert DataParallel(nn.Tanh())(torch.ones(2)).shape == (2,)
        wrapped = DataParallel(net().requires_grad_(False))
        with count_traffic() as traffic:
            x = inputs().requires_grad_()
            wrapped(x).sum().backward()
            with torch.no_grad():
                wrapped.eval()(x)
        assert x.grad is not None
        assert traffic.bytes_sent == 0

    simulated(ranks, 2)


def test_buffers_are_sent_once_a_reduction_in_training_and_only_those_of_the_state() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.register_buffer("seen", torch.zeros(1))
            self.register_buffer("table", torch.zeros(dist.get_rank() + 1), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen + dist.get_rank() + 1
            return x * self.weight

    def ranks(broadcast: bool) -> tuple[list[float], int]:
        wrapped = DataParallel(Counting(), broadcast_buffers=broadcast)
        kept = []
        with count_traffic() as traffic:
            for step in range(4):
                if step % 2 == 0:
                    with wrapped.no_sync():
                        wrapped(torch.ones(1)).backward()
                else:
                    wrapped(torch.ones(1)).backward()
                kept.append(float(wrapped.module.seen))
            with torch.no_grad():
                wrapped(torch.ones(1))
            wrapped.eval()(torch.ones(1))
            wrapped.module.get_buffer("table")
        return kept, traffic.calls.get("broadcast", 0)

    on, off = simulated(ranks, 2, True), simulated(ranks, 2, False)
    assert on == [([1.0, 2.0, 3.0, 4.0], 2), ([2.0, 4.0, 4.0, 6.0], 2)]
    assert off == [([1.0, 2.0, 3.0, 4.0], 0), ([2.0, 4.0, 6.0, 8.0], 0)]


def test_a_rank_that_fails_ends_the_others_with_a_message() -> None:
    def ranks() -> None:
        wrapped = DataParallel(net())
        if dist.get_rank() == 1:
            raise OSError("the disk is full")
        wrapped(inputs()).sum().backward()

    for run in (simulated, run_ranks):
        with pytest.raises(RankError, match="rank 1 failed: OSError: the disk is full"):
            run(ranks, 3)
