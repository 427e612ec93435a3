"""What benchmarks/pipeline.py counts, against the schedules' own numbers; what it times is not looked at."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark() -> ModuleType:
    file = ROOT / "benchmarks" / "pipeline.py"
    spec = importlib.util.spec_from_file_location("pipeline_benchmark", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bubbles_are_those_of_theory_and_memory_that_of_the_proof(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "result.json"
    monkeypatch.setattr("sys.argv", ["pipeline.py", "--smoke", "--schedules", "1f1b", "zb-v", "--json", str(file)])
    benchmark.main()
    result = json.loads(file.read_text(encoding="utf-8"))

    assert [(row["schedule"], row["ranks"], row["size"]) for row in result["steps"]] == [
        ("1f1b", 2, "tiny"),
        ("zb-v", 2, "tiny"),
    ]
    assert all(row["cpu"] > 0 and row["wall_ratio"] > 0 for row in result["steps"])

    bubbles = result["bubbles"]
    assert {row["schedule"] for row in bubbles} == {case[0] for case in benchmark.MEASURED}
    for row in bubbles:
        assert row["measured"] == pytest.approx(row["simulated"], rel=0.02), row
        assert row["measured_with_latency"] == pytest.approx(row["simulated_with_latency"], rel=0.02), row
        if row["closed_form"] is not None:
            assert row["measured"] == pytest.approx(row["closed_form"], rel=0.02), row

    for row in result["memory"]:
        for in_flight, held, recomputed in zip(row["in_flight"], row["bytes"], row["bytes_recompute"], strict=True):
            assert held >= in_flight * benchmark.MICRO_BATCH_BYTES, row
            assert recomputed <= held, row
