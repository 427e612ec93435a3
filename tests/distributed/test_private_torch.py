"""The private parts of PyTorch that are leaned on: each is asked for, so that one that goes is missed by its name."""

import threading

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from minillm.distributed.private_torch import _Record, after_backward, group_name, process_groups, worlds_by_thread
from minillm.distributed.simulator import simulate_ranks
from minillm.distributed.simulator.process_group import SimulatedProcessGroup


def test_the_record_of_groups_keeps_every_field_for_itself() -> None:
    """A field that PyTorch keeps in a global, and `_Record` does not, would be shared by all simulated ranks."""
    fields = {name for name, value in vars(distributed_c10d._World).items() if isinstance(value, property)}
    worked_out = {"pg_config_info"}
    own = {name for name in fields if f"_{name}" in vars(_Record())}

    assert {"default_pg", "pg_map", "pg_names", "pg_group_ranks", "group_count", "tags_to_pg"} <= fields
    assert fields - worked_out - own <= set(vars(_Record))


def test_a_thread_has_groups_of_its_own_and_leaves_the_others_theirs() -> None:
    seen = []
    outside = distributed_c10d._world
    before = outside.group_count

    def rank(enter: object, index: int) -> None:
        enter()  # type: ignore[operator]
        distributed_c10d._world.group_count = index
        distributed_c10d._world.pg_names["group"] = str(index)  # type: ignore[index, assignment]
        seen.append((distributed_c10d._world.group_count, dict(distributed_c10d._world.pg_names)))

    with worlds_by_thread() as enter:
        for index in (1, 2):
            thread = threading.Thread(target=rank, args=(enter, index))
            thread.start()
            thread.join()
        assert outside.group_count == distributed_c10d._world.group_count == before
        assert not distributed_c10d._world.pg_names

    assert seen == [(1, {"group": "1"}), (2, {"group": "2"})]
    assert distributed_c10d._world is outside
    assert not dist.is_initialized()


def test_every_group_of_a_rank_is_known() -> None:
    def ranks() -> bool:
        half = dist.new_subgroups(2)[0]
        return {dist.group.WORLD, half} <= set(process_groups())

    assert process_groups() == []
    assert all(simulate_ranks(ranks, 4).results)


def test_groups_are_found_by_name_in_the_rank_that_made_them() -> None:
    """As DTensor looks for them: through C++, by name."""

    def ranks() -> list[str]:
        half = dist.new_subgroups(2)[0]
        found = distributed_c10d._resolve_process_group(group_name(half))
        return [group_name(dist.group.WORLD), group_name(half), str(dist.get_process_group_ranks(found))]

    results = simulate_ranks(ranks, 4).results

    assert [result[2] for result in results] == ["[0, 1]", "[0, 1]", "[2, 3]", "[2, 3]"]
    assert len({result[0] for result in results}) == 1


def test_a_callback_runs_when_all_gradients_are_there() -> None:
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    seen = []

    def hook(_: torch.Tensor) -> None:
        after_backward(lambda: seen.append((x.grad is not None, y.grad is not None, threading.get_ident())))

    y.register_hook(hook)
    (x.sin().cos() * y).sum().backward()

    assert seen == [(True, True, threading.get_ident())]


def test_no_callback_without_a_backward_pass() -> None:
    with pytest.raises(RuntimeError, match="backward"):
        after_backward(lambda: None)


def test_every_operation_of_a_process_group_is_the_simulators_own() -> None:
    """One that is not would end in "No backend type associated with device type cpu", far from here."""
    inherited = {
        name
        for name in vars(dist.ProcessGroup)
        if any(word in name for word in ("gather", "scatter", "reduce", "all", "broadcast", "send", "recv", "barrier"))
        and name not in vars(SimulatedProcessGroup)
    }

    assert inherited <= {"_wait_for_pending_works", "_enable_collectives_timing"}, inherited
