"""TrainingConfig refuses what cannot be, by name, and survives JSON."""

import json

import pytest

from minillm.training import TrainingConfig


def test_goes_through_json_and_back() -> None:
    config = TrainingConfig(max_steps=7, betas=(0.8, 0.9), grad_clip=None, eval_every=None)
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_defaults_are_worked_out() -> None:
    config = TrainingConfig(max_steps=500, learning_rate=2e-3)
    assert config.warmup == 10
    assert config.final_learning_rate == pytest.approx(2e-4)
    config = TrainingConfig(max_steps=500, learning_rate=2e-3, warmup_steps=0, min_learning_rate=0.0)
    assert config.warmup == 0
    assert config.final_learning_rate == 0.0


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("max_steps", 0, ValueError),
        ("max_steps", 1.5, TypeError),
        ("max_steps", True, TypeError),
        ("learning_rate", 0.0, ValueError),
        ("learning_rate", float("nan"), ValueError),
        ("learning_rate", "fast", TypeError),
        ("min_learning_rate", 1.0, ValueError),
        ("warmup_steps", -1, ValueError),
        ("warmup_steps", 1001, ValueError),
        ("weight_decay", -0.1, ValueError),
        ("betas", (0.9, 1.0), ValueError),
        ("betas", 0.9, ValueError),
        ("grad_clip", 0.0, ValueError),
        ("grad_clip", float("inf"), ValueError),
        ("gradient_accumulation_steps", 0, ValueError),
        ("eval_every", 0, ValueError),
        ("eval_batches", "all", TypeError),
        ("checkpoint_every", -5, ValueError),
        ("keep_checkpoints", 0, ValueError),
        ("log_every", 0, ValueError),
        ("precision", "fp8", ValueError),
        ("compile", 1, TypeError),
        ("device", 0, TypeError),
        ("seed", -1, ValueError),
    ],
)
def test_a_bad_value_is_named(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{name} must"):
        TrainingConfig(**{name: value})


def test_an_unknown_setting_is_named_with_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown training settings lr; allowed: max_steps, learning_rate"):
        TrainingConfig.from_dict({"lr": 1e-3})
