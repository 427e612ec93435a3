"""The experts over sorted rows against one dense layer for each expert, in outputs, gradients and memory."""

import copy
import gc
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minillm.layers import Experts, FeedForward, SwiGLU
from minillm.layers.gradient_buffers import LEAST_BYTES, GradientBuffers
from minillm.layers.grouped_experts import Weights, plain_grouped_experts

ACTIVATIONS = ["swiglu", "gelu", "gelu_tanh", "relu"]


class _Relu(nn.Module):
    def __init__(self, d_model: int, d_ff: int, bias: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d_model, d_ff, bias=bias), nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


def _dense(d_model: int, d_ff: int, activation: str, bias: bool) -> nn.Module:
    if activation == "swiglu":
        return SwiGLU(d_model, d_ff, bias=bias)
    if activation == "relu":
        return _Relu(d_model, d_ff, bias)
    return FeedForward(d_model, d_ff, approximate="tanh" if activation == "gelu_tanh" else "none", bias=bias)


def _random(layer: nn.Module, std: float = 0.3) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=std)
    return layer


def _twins(experts: Experts, bias: bool) -> list[nn.Module]:
    """A dense layer for each expert, with its numbers."""
    twins = []
    for expert in range(experts.n_experts):
        twin = _dense(experts.d_model, experts.d_ff, experts.activation, bias).to(experts.up.dtype)
        with torch.no_grad():
            for name in ("gate", "up", "down"):
                if getattr(experts, name) is not None:
                    getattr(twin, name).weight.copy_(getattr(experts, name)[expert])
                    if bias:
                        getattr(twin, name).bias.copy_(getattr(experts, f"{name}_bias")[expert])
        twins.append(twin)
    return twins


def _by_twins(twins: list[nn.Module], rows: Tensor, counts: list[int]) -> Tensor:
    *groups, beyond = rows.split([*counts, len(rows) - sum(counts)])
    out = [twin(group) for twin, group in zip(twins, groups, strict=True)]
    return torch.cat([*out, torch.zeros_like(beyond, dtype=out[0].dtype)])


def _compare(d_model: int, d_ff: int, counts: list[int], beyond: int, activation: str, bias: bool) -> None:
    experts = _random(Experts(d_model, d_ff, len(counts), activation=activation, bias=bias).double())
    twins = _twins(experts, bias)
    rows = torch.randn(sum(counts) + beyond, d_model, dtype=torch.float64, requires_grad=True)
    other = rows.detach().clone().requires_grad_()
    out, expected = experts(rows, torch.tensor(counts)), _by_twins(twins, other, counts)
    torch.testing.assert_close(out, expected)
    assert not out[sum(counts) :].any()
    gradient = torch.randn_like(out)
    out.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(rows.grad, other.grad)
    for name, parameter in experts.named_parameters():
        stack, _, is_bias = name.partition("_")
        of_twins = [getattr(getattr(twin, stack), "bias" if is_bias else "weight").grad for twin in twins]
        torch.testing.assert_close(
            parameter.grad,
            torch.stack([g if g is not None else 0 * p for g, p in zip(of_twins, parameter.detach(), strict=True)]),
        )
    with torch.no_grad():
        torch.testing.assert_close(experts(rows, torch.tensor(counts)), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_a_dense_layer_for_each_expert(activation, bias):
    _compare(6, 7, [3, 0, 5, 1], 2, activation, bias)


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    beyond=st.integers(0, 3),
    d_model=st.integers(1, 5),
    d_ff=st.integers(1, 5),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_any_counts(counts, beyond, d_model, d_ff, activation):
    _compare(d_model, d_ff, counts, beyond, activation, bias=True)


@pytest.mark.parametrize("counts", [[4], [9, 0, 0], [0, 0, 0], [0, 0, 9]])
def test_one_expert_or_all_rows_to_one(counts):
    _compare(5, 3, counts, 0, "swiglu", bias=True)


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_fast_and_plain_agree(activation):
    experts = _random(Experts(8, 12, 3, activation=activation, bias=True))
    rows, counts = torch.randn(10, 8, requires_grad=True), [4, 0, 5]
    out, plain = experts(rows, torch.tensor(counts)), plain_grouped_experts(rows, experts.weights, counts, activation)
    torch.testing.assert_close(out, plain)
    inputs = (rows, *experts.parameters())
    gradients = (torch.autograd.grad(y.square().sum(), inputs) for y in (out, plain))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(experts.one(rows[:4], 0), out[:4])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_batched_is_the_same_with_equal_counts(activation):
    experts = _random(Experts(5, 7, 3, activation=activation, bias=True).double())
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    out = experts(x.flatten(0, 1), torch.full((3,), 4))
    torch.testing.assert_close(experts.batched(x).flatten(0, 1), out)
    assert experts.batched(x[:, :0]).shape == (3, 0, 5)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_gradcheck_of_first_and_second_derivatives(activation):
    experts = _random(Experts(3, 4, 3, activation=activation, bias=True).double())
    rows, counts = torch.randn(6, 3, dtype=torch.float64, requires_grad=True), torch.tensor([2, 0, 3])

    def run(rows: Tensor, *parameters: Tensor) -> Tensor:
        return experts(rows, counts)

    inputs = (rows, *experts.parameters())
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_a_gradient_that_is_not_wanted_is_not_computed():
    experts = _random(Experts(4, 6, 2, bias=True))
    counts = torch.tensor([3, 2])
    rows = torch.randn(5, 4, requires_grad=True)
    whole = torch.autograd.grad(experts(rows, counts).sum(), (rows, *experts.parameters()))
    names = ["rows", *(name for name, _ in experts.named_parameters())]
    expected = dict(zip(names, whole, strict=True))
    for wanted in (["rows"], ["down"], ["up_bias"], ["gate", "down_bias"], ["rows", "up"]):
        leaf = rows.detach().requires_grad_("rows" in wanted)
        for name, parameter in experts.named_parameters():
            parameter.requires_grad_(name in wanted)
            parameter.grad = None
        experts(leaf, counts).sum().backward()
        gradients = {"rows": leaf.grad, **{name: parameter.grad for name, parameter in experts.named_parameters()}}
        for name, gradient in gradients.items():
            assert (gradient is not None) == (name in wanted)
            if gradient is not None:
                torch.testing.assert_close(gradient, expected[name])
    experts.requires_grad_(False)
    assert not experts(rows.detach(), counts).requires_grad


def _saved_bytes(run) -> int:
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(held.values())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_keeps_no_more_for_the_backward_pass_than_a_dense_layer_of_as_many_rows(activation):
    experts, dense = Experts(16, 32, 4, activation=activation), _dense(16, 32, activation, bias=False)
    rows, counts = torch.randn(40, 16), torch.tensor([10, 3, 20, 7])

    def weights(layer: nn.Module) -> int:
        return sum(parameter.nbytes for parameter in layer.parameters())

    ours = _saved_bytes(lambda: experts(rows, counts)) - weights(experts)
    assert ours == 4 * 40 * (16 + (2 if activation == "swiglu" else 1) * 32)
    # What F.linear saves of its weight is a view of it, of x the tensor itself.
    assert ours <= _saved_bytes(lambda: dense(rows.requires_grad_())) - weights(dense)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_is_as_good_as_a_dense_layers(dtype, tolerance):
    experts = _random(Experts(32, 64, 3, bias=True), 0.1).to(dtype)
    rows, counts = torch.randn(20, 32, dtype=dtype, requires_grad=True), torch.tensor([8, 2, 10])
    exact = copy.deepcopy(experts).double()
    exact_rows = rows.detach().double().requires_grad_()
    out, expected = experts(rows, counts), exact(exact_rows, counts)
    assert out.dtype is dtype
    out.sum().backward()
    expected.sum().backward()

    def error(one: Tensor, other: Tensor) -> float:
        return float((one.detach().double() - other.detach()).norm() / other.detach().norm())

    assert error(out, expected) < tolerance
    assert error(rows.grad, exact_rows.grad) < tolerance
    for name, parameter in experts.named_parameters():
        assert parameter.grad.dtype is dtype
        assert error(parameter.grad, exact.get_parameter(name).grad) < tolerance, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_as_linear_layers(dtype):
    experts = _random(Experts(16, 24, 2, bias=True))
    twins = _twins(experts, bias=True)
    rows, counts = torch.randn(9, 16, requires_grad=True), [5, 4]
    other = rows.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out, expected = experts(rows, torch.tensor(counts)), _by_twins(twins, other, counts)
        assert out.dtype is expected.dtype is experts.batched(torch.randn(2, 3, 16)).dtype is dtype
        exact = copy.deepcopy(experts).double()  # autocast leaves float64 alone
        assert exact(rows.double(), torch.tensor(counts)).dtype is torch.float64
    torch.testing.assert_close(out, expected, atol=3e-2, rtol=3e-2)
    out.float().sum().backward()
    expected.float().sum().backward()
    assert rows.grad.dtype is experts.up.grad.dtype is torch.float32
    torch.testing.assert_close(rows.grad, other.grad, atol=1e-1, rtol=3e-2)
    torch.testing.assert_close(experts.up.grad[1], twins[1].up.weight.grad, atol=1e-1, rtol=3e-2)


def test_a_backward_pass_within_autocast_is_the_one_outside():
    experts = _random(Experts(16, 24, 2))
    rows, counts = torch.randn(9, 16, requires_grad=True), torch.tensor([5, 4])
    experts(rows, counts).square().sum().backward()
    expected, rows.grad = rows.grad, None
    out = experts(rows, counts).square().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out.backward()
    assert torch.equal(rows.grad, expected)


def test_a_second_derivative_under_autocast():
    experts = _random(Experts(4, 6, 2))
    rows = torch.randn(5, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = experts(rows, torch.tensor([3, 2]))
    (d_rows,) = torch.autograd.grad(out.float().square().sum(), rows, create_graph=True)
    d_rows.square().sum().backward()
    assert experts.down.grad.isfinite().all()
    assert experts.down.grad.any()


def test_rows_that_are_not_contiguous():
    experts = _random(Experts(6, 5, 2))
    rows, counts = torch.randn(6, 14).t()[::2], torch.tensor([3, 4])
    torch.testing.assert_close(experts(rows, counts), experts(rows.contiguous(), counts))
    one = rows.detach().requires_grad_()
    experts(one, counts).sum().backward()  # an expanded gradient
    other = rows.detach().contiguous().requires_grad_()
    experts(other, counts).backward(torch.ones(7, 6))
    torch.testing.assert_close(one.grad, other.grad)


def test_checkpointing_compiling_and_functional_gradients_agree():
    experts = _random(Experts(4, 6, 3))
    rows, counts = torch.randn(8, 4, requires_grad=True), torch.tensor([3, 1, 4])
    expected = torch.autograd.grad(experts(rows, counts).square().sum(), (rows, *experts.parameters()))
    for reentrant in (False, True):
        out = checkpoint(experts, rows, counts, use_reentrant=reentrant)
        out.square().sum().backward()
        gradients = (rows.grad, *(parameter.grad for parameter in experts.parameters()))
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one, other)
        rows.grad = None
        experts.zero_grad()
    compiled = torch.compile(experts, backend="eager")
    for one, other in zip(
        torch.autograd.grad(compiled(rows, counts).square().sum(), (rows, *experts.parameters())), expected, strict=True
    ):
        torch.testing.assert_close(one, other)
    parameters = {name: parameter.detach() for name, parameter in experts.named_parameters()}
    functional = torch.func.grad(
        lambda p: torch.func.functional_call(experts, p, (rows.detach(), counts)).square().sum()
    )(parameters)
    for one, other in zip(functional.values(), expected[1:], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_functional_derivatives_of_all_kinds(activation, bias):
    """torch.func calls the backward pass in a way of its own: by rows and by parameters, in one direction and many."""
    experts = _random(Experts(4, 6, 3, activation=activation, bias=bias)).double()
    rows, counts = torch.randn(7, 4, dtype=torch.float64), torch.tensor([3, 0, 3])
    parameters = {name: parameter.detach() for name, parameter in experts.named_parameters()}

    def fast(x, own):
        return torch.func.functional_call(experts, own, (x, counts))

    def plain(x, own):
        weights = Weights(*(own.get(name) for name in Weights._fields))
        return plain_grouped_experts(x, weights, counts.tolist(), activation)

    direction = torch.randn(7, 4, dtype=torch.float64)
    for transform in (
        lambda f: torch.func.vjp(f, rows, parameters)[1](direction),
        lambda f: torch.func.jacrev(f, argnums=(0, 1))(rows, parameters),
        lambda f: torch.func.grad(lambda x: torch.func.grad(lambda y: f(y, parameters).square().sum())(x).sum())(rows),
    ):
        torch.testing.assert_close(transform(fast), transform(plain))


def test_a_gradient_in_use_is_never_written_again():
    n_experts, d_model = 4, 16
    d_ff = LEAST_BYTES // (4 * n_experts * d_model)  # each stack just large enough for a kept buffer
    experts = Experts(d_model, d_ff, n_experts)
    counts = torch.tensor([1, 0, 2, 1])
    rows = torch.randn(4, d_model)

    def step() -> None:
        experts(rows, counts).sum().backward()

    step()
    first, copied = experts.up.grad, experts.up.grad.clone()
    address = first.data_ptr()
    step()  # accumulates: the second gradient needs memory of its own
    torch.testing.assert_close(first, 2 * copied)
    kept_by_the_user = first.detach()[1:]
    del first
    experts.zero_grad()
    gc.collect()
    with torch.no_grad():
        experts.down.mul_(2)
    step()
    torch.testing.assert_close(kept_by_the_user, 2 * copied[1:])
    torch.testing.assert_close(experts.up.grad, 2 * copied)
    assert experts.up.grad.data_ptr() != address
    again = experts.up.grad.data_ptr()
    experts.zero_grad()
    step()
    assert experts.up.grad.data_ptr() == again


def test_buffers_are_taken_again_only_when_they_are_free():
    buffers = GradientBuffers()
    parameter = torch.empty(LEAST_BYTES // 2, dtype=torch.bfloat16)
    one, two = buffers.empty_like(0, parameter), buffers.empty_like(0, parameter)
    assert one.dtype is torch.bfloat16
    assert one.shape == parameter.shape
    assert one.data_ptr() != two.data_ptr()
    address, part = one.data_ptr(), one[3:5]
    del one
    assert buffers.empty_like(0, parameter).data_ptr() != address
    del part, two
    larger = buffers.empty_like(0, parameter.float())
    assert larger.nbytes == 2 * parameter.nbytes
    assert buffers.empty_like(1, parameter[:8]).data_ptr() != address


def test_a_buffer_of_another_size_is_not_taken():
    buffers = GradientBuffers()
    large, small = torch.empty(LEAST_BYTES // 2), torch.empty(LEAST_BYTES // 4)
    buffers.empty_like(0, large).zero_()
    gc.collect()
    taken = buffers.empty_like(0, small)  # the same parameter, cut down since
    assert taken.shape == small.shape
    assert taken.untyped_storage().nbytes() == small.nbytes


def test_copies_and_pickles():
    experts = Experts(4, 3, 2)
    rows, counts = torch.randn(3, 4), torch.tensor([1, 2])
    for other in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        torch.testing.assert_close(other(rows, counts), experts(rows, counts))
    assert list(experts.state_dict()) == ["gate", "up", "down"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"d_model": 0}, ValueError, "d_model must be at least 1, got 0"),
        ({"d_ff": 2.0}, TypeError, r"d_ff must be an integer, got 2\.0"),
        ({"n_experts": True}, TypeError, "n_experts must be an integer, got True"),
        ({"activation": "tanh"}, ValueError, "activation must be one of gelu, gelu_tanh, relu, swiglu, got 'tanh'"),
    ],
)
def test_arguments_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        Experts(**{"d_model": 4, "d_ff": 4, "n_experts": 2, **arguments})


def test_inputs_are_checked():
    experts = Experts(4, 3, 2)
    rows, counts = torch.randn(5, 4), torch.tensor([2, 3])
    with pytest.raises(ValueError, match=r"rows must be \(n_rows, d_model=4\), got \(5, 3\)"):
        experts(rows[:, :3], counts)
    with pytest.raises(ValueError, match=r"counts must be int64 \(2,\), got torch.int64 \(3,\)"):
        experts(rows, torch.tensor([2, 3, 0]))
    with pytest.raises(ValueError, match=r"counts must be int64 \(2,\), got torch.float32 \(2,\)"):
        experts(rows, counts.float())
    with pytest.raises(ValueError, match=r"at most 5 rows in all, got \[2, 4\]"):
        experts(rows, torch.tensor([2, 4]))
    with pytest.raises(ValueError, match=r"counts must be at least 0 .* got \[-1, 3\]"):
        experts(rows, torch.tensor([-1, 3]))
    with pytest.raises(TypeError, match=r"rows must have the parameters' type torch.float32, got torch.float64"):
        experts(rows.double(), counts)
    with pytest.raises(ValueError, match=r"x must be \(n_experts=2, capacity, d_model=4\), got \(3, 5, 4\)"):
        experts.batched(torch.randn(3, 5, 4))


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_products_of_the_gpu_path(activation, bias):
    """``F.grouped_mm`` has a slow CPU form: the GPU's path runs here too, in float32."""
    experts = _random(Experts(8, 16, 4, activation=activation, bias=bias))
    counts = torch.tensor([3, 0, 4, 1])
    rows = torch.randn(11, 8, requires_grad=True)
    gradient = torch.randn(11, 8)
    inputs = (rows, *experts.parameters())
    out, expected = experts._by_grouped_products(rows, counts), experts(rows, counts)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    assert not out[8:].any()
    for one, other in zip(
        torch.autograd.grad(out, inputs, gradient), torch.autograd.grad(expected, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d_ff", [64, 63])
def test_on_a_gpu_as_on_a_cpu(dtype, d_ff):
    experts = _random(Experts(32, d_ff, 4, bias=True), 0.1).double()
    rows, counts = torch.randn(40, 32, dtype=torch.float64), torch.tensor([10, 0, 25, 3])
    expected = experts(rows, counts)
    expected.sum().backward()
    twin = copy.deepcopy(experts).to("cuda", dtype)
    twin.zero_grad()
    out = twin(rows.to("cuda", dtype), counts.cuda())
    out.sum().backward()
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    torch.testing.assert_close(out.cpu().double(), expected, atol=tolerance, rtol=tolerance)
    for name, parameter in experts.named_parameters():
        error = (twin.get_parameter(name).grad.cpu().double() - parameter.grad).norm() / parameter.grad.norm()
        assert error < tolerance, name
