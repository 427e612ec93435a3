"""ZeRO's memory and traffic against the paper's printed tables; MiCS and ZeRO-Offload against sums over all ranks."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.costs import (
    communication_bytes,
    mics_bytes_per_rank,
    mics_communication_bytes,
    offload_device_bytes,
    offload_host_bytes,
    offload_link_bytes,
    zero_bytes_by_kind,
    zero_bytes_per_rank,
    zero_communication_bytes,
    zero_largest_model,
    zero_table,
)

# Rajbhandari et al. 2020, Table 1, digit for digit: DP degree; P_os, P_os+g, P_os+g+p of 7.5B, of 128B, of 1T (GB).
# An asterisk stands for the paper's bold type: the first row of a column in which the model fits GPUs of 32 GB.
TABLE_1 = """
   1   120    120    120    2048 2048 2048   16000 16000 16000
   4   52.5   41.3   30*     896  704  512    7000  5500  4000
  16   35.6   21.6*  7.5     608  368  128    4750  2875  1000
  64   31.4*  16.6   1.88    536  284   32*   4187  2218   250
 256   30.4   15.4   0.47    518  263    8    4046  2054  62.5
1024   30.1   15.1   0.12    513  257    2    4011  2013  15.6*
"""
# Table 2, "Max Theoretical Model Size": MP degree, GPUs; baseline, P_os, P_os+g, P_os+g+p.
TABLE_2 = """
 1    64    2B    7.6B   14.4B   128B
 2   128    4B   15.2B   28.8B   256B
 4   256    8B   30.4B   57.6B   0.5T
 8   512   16B   60.8B  115.2B     1T
16  1024   32B  121.6B  230.4B     2T
"""


def test_the_papers_table_of_memory() -> None:
    printed = [line.split() for line in TABLE_1.strip().splitlines()]
    rows = zero_table()
    assert [row.printed for row in rows] == [cell.rstrip("*") for line in printed for cell in line[1:]]
    assert [row.world_size for row in rows[::9]] == [int(line[0]) for line in printed]
    assert [(row.n_parameters, row.stage) for row in rows[:9]] == [
        (n, stage) for n in (7.5e9, 128e9, 1e12) for stage in (1, 2, 3)
    ]
    bold = [cell.endswith("*") for line in printed for cell in line[1:]]
    fits = [row.gigabytes <= 32 for row in rows]
    assert bold == [fit and not any(fits[place - 9 :: -9][: place // 9]) for place, fit in enumerate(fits)]


def test_the_papers_figure_of_memory() -> None:
    """Figure 1: 7.5B parameters on 64 ranks take 120, 31.4, 16.6 and 1.9 GB."""
    gigabytes = [zero_bytes_per_rank(7.5e9, 64, stage) / 1e9 for stage in range(4)]
    assert [f"{number:.1f}" for number in gigabytes] == ["120.0", "31.4", "16.6", "1.9"]


def test_the_papers_table_of_the_largest_models() -> None:
    for line in TABLE_2.strip().splitlines():
        model_parallel, gpus, *printed = line.split()
        for stage, cell in enumerate(printed):
            number, unit = float(cell[:-1]), {"B": 1e9, "T": 1e12}[cell[-1]]
            follows = zero_largest_model(
                32e9, int(gpus) // int(model_parallel), stage, model_parallel=int(model_parallel)
            )
            # The first row is right to its last digit; the others are its multiples, and 1T is 1024B.
            assert follows == pytest.approx(number * unit, rel=0.05 / 7.6 if unit == 1e9 else 0.025)
    assert f"{zero_largest_model(32e9, 64, 1) / 1e9:.1f}B {zero_largest_model(32e9, 64, 2) / 1e9:.1f}B" == "7.6B 14.4B"


def test_the_example_of_gpt_2() -> None:
    """Section 3.1: 1.5B parameters are 3 GB in 16 bits and need 24 GB at least."""
    assert zero_bytes_by_kind(1.5e9, 1, 0) == {"parameters": 3e9, "gradients": 3e9, "optimizer state": 18e9}
    assert zero_bytes_per_rank(1.5e9, 1, 0) == 24e9


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 64), st.integers(1, 3))
def test_whatever_is_cut_adds_up_to_one_whole(parts: int, world_size: int, stage: int) -> None:
    n = parts * world_size  # so that all is exact
    kinds = zero_bytes_by_kind(n, world_size, stage)
    whole = zero_bytes_by_kind(n, 1, 0)
    for kind, first_cut in (("optimizer state", 1), ("gradients", 2), ("parameters", 3)):
        assert kinds[kind] * (world_size if stage >= first_cut else 1) == whole[kind]
    assert zero_bytes_per_rank(n, world_size, stage) <= zero_bytes_per_rank(n, world_size, stage - 1)


def test_other_precisions() -> None:
    full = {"parameter_bytes": 4, "gradient_bytes": 4, "optimizer_bytes": 8}  # Adam in float32
    assert zero_bytes_per_rank(100, 4, 0, **full) == 1600
    assert zero_bytes_per_rank(100, 4, 1, **full) == 800 + 200
    assert mics_bytes_per_rank(100, 4, **full) == 400
    assert zero_largest_model(1600, 4, 3, **full) == 400


@pytest.mark.parametrize(("stage", "volume"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_traffic_is_2_2_2_and_3_psi(stage: int, volume: int) -> None:
    """Section 7.2, in values; and exactly (N-1)/N of it on N ranks, as collectives of these sizes send."""
    values = {"parameter_bytes": 1, "gradient_bytes": 1}
    assert zero_communication_bytes(1000, stage, **values) == volume * 1000
    for n in (1, 2, 5, 64):
        calls = {0: ["all_reduce"], 3: ["all_gather", "all_gather", "reduce_scatter"]}
        expected = sum(
            communication_bytes(call, 1000, n) for call in calls.get(stage, ["reduce_scatter", "all_gather"])
        )
        assert zero_communication_bytes(1000, stage, n, **values) == pytest.approx(expected)
    assert zero_communication_bytes(1000, stage) == volume * 2000  # 16 bits


def test_traffic_of_several_micro_batches() -> None:
    values = {"parameter_bytes": 1, "gradient_bytes": 1, "micro_batches": 5}
    assert [zero_communication_bytes(10, stage, **values) for stage in range(4)] == [20, 20, 60, 150]
    assert zero_communication_bytes(10, 3, reshard_after_forward=False, **values) == 100
    assert zero_communication_bytes(10, 3, parameter_bytes=2, gradient_bytes=4) == 10 * (4 + 2 * 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 5))
def test_mics_sends_inside_what_stage_3_does_and_across_one_part(groups: int, size: int, micro_batches: int) -> None:
    world_size, psi = groups * size, 840
    traffic = mics_communication_bytes(psi, world_size, size, micro_batches=micro_batches)
    assert traffic.inside == zero_communication_bytes(psi, 3, size, micro_batches=micro_batches)
    assert traffic.across == pytest.approx(communication_bytes("all_reduce", 2 * psi / size, groups))
    if groups == 1:
        assert traffic.across == 0  # it is stage 3
        assert mics_bytes_per_rank(psi, size) == zero_bytes_per_rank(psi, world_size, 3)
    if size == 1:
        assert traffic == (0, zero_communication_bytes(psi, 0, world_size))  # it is plain data parallel
        assert mics_bytes_per_rank(psi, size) == zero_bytes_per_rank(psi, world_size, 0)


def test_mics_leaves_little_for_the_slow_links() -> None:
    """10B parameters, 64 nodes of 8: stage 3 sends 3 Psi over links that cross nodes, MiCS a quarter of Psi."""
    traffic = mics_communication_bytes(10e9, 512, 8)
    assert traffic.across == pytest.approx(2 * 63 / 64 * 20e9 / 8)
    assert traffic.across < zero_communication_bytes(10e9, 3, 512) / 12


def test_offload_moves_four_psi_and_leaves_two() -> None:
    psi = 10e9
    assert offload_device_bytes(psi) == 2 * psi == 20e9  # 10B parameters on one GPU of 32 GB: the paper's claim
    assert offload_host_bytes(psi) == 14 * psi
    assert offload_link_bytes(psi) == 4 * psi
    assert offload_device_bytes(psi) + offload_host_bytes(psi) == zero_bytes_per_rank(psi, 1, 0)
    for n in (2, 16):
        assert n * offload_host_bytes(psi, n) == offload_host_bytes(psi)  # the host of all ranks holds it once
        assert n * offload_link_bytes(psi, n) == offload_link_bytes(psi)
        assert offload_device_bytes(psi) + offload_host_bytes(psi, n) == zero_bytes_per_rank(psi, n, 2)
    assert offload_link_bytes(psi, micro_batches=4) == (4 * 2 + 2) * psi


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda: zero_bytes_per_rank(1e9, 8, 4), "stage must be one of 0, 1, 2, 3, got 4"),
        (lambda: zero_bytes_per_rank(1e9, 0, 3), "world_size must be at least 1, got 0"),
        (lambda: zero_bytes_per_rank(-1, 8, 3), "n_parameters must be at least 0, got -1"),
        (lambda: zero_bytes_per_rank(math.nan, 8, 3), "n_parameters must be at least 0, got nan"),
        (lambda: zero_bytes_per_rank(1, 8, 3, optimizer_bytes=-1), "optimizer_bytes must be at least 0"),
        (lambda: zero_communication_bytes(1, 3, 0), "world_size must be at least 1"),
        (lambda: zero_communication_bytes(1, 3, micro_batches=0), "micro_batches must be at least 1"),
        (lambda: zero_largest_model(1, 1, 1, parameter_bytes=0, gradient_bytes=0, optimizer_bytes=0), "are all 0"),
        (lambda: mics_bytes_per_rank(1, 0), "group_size must be at least 1"),
        (lambda: mics_communication_bytes(1, 6, 4), "group_size must divide world_size, got 4 and 6"),
        (lambda: offload_host_bytes(1, 0), "world_size must be at least 1"),
        (lambda: offload_link_bytes(1, micro_batches=0), "micro_batches must be at least 1"),
        (lambda: offload_device_bytes(-1), "n_parameters must be at least 0"),
    ],
)
def test_refuses_what_is_no_cluster(run, words) -> None:
    with pytest.raises(ValueError, match=words):
        run()
