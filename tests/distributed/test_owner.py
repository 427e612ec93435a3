"""A model is wrapped once, and what has been dropped owns nothing."""

import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from minillm.distributed import DataParallel, Offload, RankError, Zero, simulate_ranks
from minillm.distributed.owner import check_unclaimed, claim, release


def wrapped(kind: str, model: nn.Module) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    make: dict[str, Callable[[], Any]] = {
        "DataParallel": lambda: DataParallel(model),
        "Offload": lambda: Offload(model, optimizer),
        "Zero": lambda: Zero(model, optimizer, stage=1),
        "Zero 3": lambda: Zero(model, optimizer, stage=3),
    }
    return make[kind]()


KINDS = ["DataParallel", "Offload", "Zero", "Zero 3"]


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_what_takes_gradients_away_is_alone(first: str, second: str) -> None:
    def ranks() -> None:
        model = nn.Linear(3, 2)
        one = wrapped(first, model)
        wrapped(second, model)
        assert one is not None

    kind = first.split()[0]
    with pytest.raises(RankError, match=rf"must not be wrapped twice: 'weight' belongs to a {kind}"):
        simulate_ranks(ranks, 2)


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", ["DataParallel", "Offload", "Zero"])
def test_what_is_gone_owns_nothing(first: str, second: str) -> None:
    def ranks() -> bool:
        model = nn.Linear(3, 2)
        one = wrapped(first, model)
        assert one is not None
        del one
        gc.collect()
        two = wrapped(second, model)
        model(torch.ones(1, 3)).sum().backward()
        return two is not None

    assert simulate_ranks(ranks, 2).results == [True, True]


def test_a_claim_lasts_as_long_as_the_owner_and_is_in_no_pickle() -> None:
    class Owner:
        pass

    model, owner = nn.Linear(3, 2), Owner()
    claim(model.parameters(), owner, "Zero")
    check_unclaimed(pickle.loads(pickle.dumps(model)))
    with pytest.raises(ValueError, match=r"'weight' belongs to a Zero$"):
        check_unclaimed(model)
    release(p for p in model.parameters() if p.dim() == 2)
    with pytest.raises(ValueError, match=r"'bias' belongs to a Zero$"):
        check_unclaimed(model)
    del owner
    check_unclaimed(model)
