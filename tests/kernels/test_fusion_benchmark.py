"""What benchmarks/fusion.py counts, against the tensors' shapes and a program whose kernels are known."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fusion() -> ModuleType:
    return _load(ROOT / "benchmarks" / "fusion.py")


def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def test_eager_bytes_are_the_closed_forms(fusion: ModuleType) -> None:
    n, d_in, d_out = 24, 16, 40
    x, forms = torch.randn(n, d_in), fusion.closed_forms(n, d_in, d_out)
    batch_norm = fusion.LinearBatchNormReLU(d_in, d_out).eval()
    folded = fusion.folded(batch_norm)
    torch.testing.assert_close(folded(x), batch_norm(x))
    for piece, way, run, names in (
        ("linear, bias, GELU", "eager", lambda: fusion.LinearGELU(d_in, d_out)(x), ["addmm", "gelu"]),
        ("linear, batch norm, ReLU", "folded", lambda: folded(x), ["addmm", "relu"]),
        (
            "residual, RMSNorm",
            "eager",
            lambda: fusion.ResidualRMSNorm(d_in)(x, x.clone()),
            ["mul", "add", "pow", "mean", "add", "rsqrt", "mul", "mul"],
        ),
    ):
        counter = fusion.count_eager(run)
        kernels = [name.split(".")[1] for name, _ in counter.kernels if "randn" not in name and "clone" not in name]
        assert kernels[-len(names) :] == names
        made = sum(number for name, number in counter.kernels[: -len(names)])  # weights and inputs made in the run
        assert counter.moved - made == forms[piece, way]


def test_generated_kernels_are_counted_by_their_signature(
    fusion: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "generated.py"
    file.write_text(
        """
import torch
from torch._inductor.select_algorithm import extern_kernels

def cpp_pybinding(types, text):
    def kernel(inside, bias, out):
        inside += bias
        out.copy_(inside)
    return kernel

cpp_fused_add_0 = cpp_pybinding(['float*', 'const float*', 'float*'], '''
static void inner(float* a) {}
extern "C"  void  kernel(float* in_out_ptr0,
                       const float* in_ptr0,
                       float* out_ptr0)
''')

def call(x, weight, bias):
    product = torch.empty(x.size(0), weight.size(1))
    extern_kernels.mm(x, weight, out=product)
    out = torch.empty_like(product)
    cpp_fused_add_0(product, bias, out)
    return out
""",
        encoding="utf-8",
    )
    generated = _load(file)
    monkeypatch.setattr(fusion.PyCodeCache, "modules", [generated])
    x, weight, bias = torch.randn(3, 5), torch.randn(5, 7), torch.randn(7)
    results: list[Tensor] = []
    counter = fusion.count_generated(lambda: results.append(generated.call(x, weight, bias)))
    torch.testing.assert_close(results[0], x @ weight + bias)
    assert counter.kernels == [("mm", 4 * (15 + 35 + 21)), ("cpp_fused_add_0", 4 * (21 + 7 + 21 + 21))]
    assert type(generated.extern_kernels) is not type(counter)


def test_allocated_bytes(fusion: ModuleType) -> None:
    x = torch.randn(100, 64)
    assert fusion.allocated(lambda: (x + x) * x) == 2 * 4 * 6400
