"""What benchmarks/data_parallel.py counts, against closed forms; what it times is not looked at."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.distributed.optim uses it


@pytest.fixture
def benchmark() -> ModuleType:
    file = ROOT / "benchmarks" / "data_parallel.py"
    spec = importlib.util.spec_from_file_location("data_parallel_benchmark", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_side_sends_and_holds_what_it_should(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "result.json"
    monkeypatch.setattr("sys.argv", ["data_parallel.py", "--smoke", "--json", str(file)])
    benchmark.main()
    result = json.loads(file.read_text(encoding="utf-8"))
    rows = {row["side"]: row for row in result["rows"]}
    assert rows.keys() == benchmark.SIDES.keys()
    assert [row["ranks"] for row in result["simulator"]] == [2]

    n, parameters = result["ranks"], result["parameters"]
    sent = {name: row["sent"] for name, row in rows.items()}
    assert sent["alone"] == 0
    for name in ("DataParallel naive", "DataParallel buckets", "DataParallel overlapped", "Zero 1", "Zero 2"):
        assert sent[name] == pytest.approx(2.0, abs=1e-3), name  # a part is padded to equal lengths
    assert sent["Zero 3 kept"] == pytest.approx(2.0, abs=1e-2)
    assert sent["Zero 3"] == pytest.approx(3.0, abs=1e-2)
    assert sent["DDP"] == pytest.approx(2.0, abs=1e-2)  # it also agrees on its buckets' order
    assert sent["DDP + ZeRO-1"] == pytest.approx(3.0, abs=1e-2)
    assert rows["DataParallel naive"]["calls"] == 28

    def per_parameter(name: str) -> float:
        return float(sum(rows[name]["held"].values())) / parameters

    # float32: 4 bytes of parameters, 4 of gradients, 8 of AdamW's moments; activations of the batch come on top.
    alone = per_parameter("alone")
    assert rows["alone"]["held"]["parameters"] == rows["alone"]["held"]["gradients"] == 4 * parameters
    for name in ("DataParallel naive", "DataParallel buckets", "DataParallel overlapped"):
        assert per_parameter(name) == pytest.approx(alone, abs=0.05)
    assert per_parameter("DDP") == pytest.approx(alone + 4, abs=0.1)  # its buckets
    assert per_parameter("DDP views") == pytest.approx(alone, abs=0.1)
    assert per_parameter("Zero 1") == pytest.approx(alone - 8 + 8 / n, abs=0.3)
    assert per_parameter("Zero 2") == pytest.approx(alone - 12 + 12 / n, abs=0.3)
