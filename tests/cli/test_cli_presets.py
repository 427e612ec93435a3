"""Presets load into configs that exist, and whatever does not fit is refused with what would have."""

import dataclasses
from pathlib import Path

import pytest

from minillm.costs import parameters
from minillm.models import MoEConfig, TransformerConfig
from minillm.presets import allowed_keys, load_preset, override, parse_assignment, preset_names
from minillm.training import TrainingConfig


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_describes_a_run(name: str) -> None:
    preset = load_preset(name)
    TransformerConfig(vocab_size=preset["tokenizer"]["vocab_size"], **preset["model"])
    TrainingConfig(**preset["training"])
    TrainingConfig(**preset["training"] | {"max_steps": 1})  # --steps may be anything from 1
    assert preset["data"]["corpus"] in ("python-docs", "python-stdlib")


def test_gpt2_small_has_the_parameters_of_gpt2() -> None:
    # The count that transformers reports for "gpt2".
    preset = load_preset("gpt2-small")
    assert parameters(TransformerConfig(vocab_size=50257, **preset["model"])) == 124_439_808


def test_keys_are_the_fields_of_the_configs() -> None:
    keys = allowed_keys()
    assert set(keys["training"]) == {field.name for field in dataclasses.fields(TrainingConfig)}
    # The first is the tokenizer's to say; the others are no plain values, but one of them is a table of such.
    left_out = {"vocab_size", "rope_scaling", "moe"}
    experts = {f"moe.{field.name}" for field in dataclasses.fields(MoEConfig)}
    assert set(keys["model"]) == {field.name for field in dataclasses.fields(TransformerConfig)} - left_out | experts


def test_reads_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[model]\nn_layers = 3\n[training]\nlearning_rate = 1\nbetas = [0.8, 0.9]\ngrad_clip = 2\n")
    preset = load_preset(str(file))
    assert preset["model"] == {"n_layers": 3}
    assert preset["training"] == {"learning_rate": 1.0, "betas": (0.8, 0.9), "grad_clip": 2.0}
    assert (preset["tokenizer"], preset["data"]) == ({}, {})


def test_experts_are_a_table(tmp_path: Path) -> None:
    file = tmp_path / "experts.toml"
    file.write_text("[model]\nn_layers = 3\n[model.moe]\nn_experts = 4\nlayers = [0, 2]\ncapacity_factor = 1\n")
    preset = load_preset(str(file))
    assert preset["model"] == {"n_layers": 3, "moe": {"n_experts": 4, "layers": (0, 2), "capacity_factor": 1.0}}
    changed = override(preset, {"model.moe.k": 1, "model.moe.router_options": {"jitter": 0.1}})
    config = TransformerConfig.from_dict(changed["model"] | {"vocab_size": 9})
    expected = MoEConfig(4, 1, layers=(0, 2), capacity_factor=1.0, router_options={"jitter": 0.1})
    assert config.moe == expected
    assert "k" not in preset["model"]["moe"]  # the preset itself is as it was
    name, value = parse_assignment("model.moe=none")
    assert override(preset, {name: value})["model"]["moe"] is None
    assert override(override(preset, {name: value}), {"model.moe.n_experts": 2})["model"]["moe"] == {"n_experts": 2}
    for text, words in (
        ("[model.moe]\nexperts = 4\n", r"unknown key 'moe.experts' in \[model\] \(did you mean 'moe.n_experts'\?\)"),
        ("[model.moe]\n", r"unknown key 'moe' in \[model\]"),
        ("[model]\nmoe = 4\n", r"unknown key 'moe' in \[model\]"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            load_preset(str(file))
    with pytest.raises(TypeError, match=r"model.moe.layers\[1\] must be a whole number, got 'b'"):
        override(preset, {"model.moe.layers": [1, "b"]})
    with pytest.raises(TypeError, match=r'model.moe.layers must be a list: a whole number, ... or "none", got 3'):
        override(preset, {"model.moe.layers": 3})
    with pytest.raises(TypeError, match=r"model.moe.router_options must be a table, got 3"):
        override(preset, {"model.moe.router_options": 3})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[model\n", "not valid TOML"),
        ("d_model = 3\n", "outside a section"),
        ("[modle]\nd_model = 3\n", r"unknown section 'modle' \(did you mean 'model'\?\): allowed are model, tokenizer"),
        (
            "[model]\nlayers = 3\n",
            r"unknown key 'layers' in \[model\] \(did you mean 'n_layers'\?\): allowed are .*d_ff",
        ),
        ("[model]\nvocab_size = 300\n", r"unknown key 'vocab_size' in \[model\]"),
    ],
)
def test_refuses_a_file_that_does_not_fit(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        load_preset(str(file))


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("model.n_layers=two", "model.n_layers must be a whole number, got 'two'"),
        ("model.n_layers=2.0", "model.n_layers must be a whole number, got 2.0"),
        ("model.n_layers=true", "model.n_layers must be a whole number, got True"),
        ("model.norm=batchnorm", "model.norm must be one of 'layernorm', 'rmsnorm', got 'batchnorm'"),
        ("model.bias=1", "model.bias must be true or false, got 1"),
        ("training.betas=0.9", "training.betas must be .*got 0.9"),
        ("training.grad_clip=[1]", 'training.grad_clip must be a number or "none"'),
        ("data.corpus=3", "data.corpus must be a string, got 3"),
    ],
)
def test_refuses_a_value_of_another_type(assignment: str, words: str) -> None:
    name, value = parse_assignment(assignment)
    with pytest.raises(TypeError, match=words):
        override(load_preset("tiny"), {name: value})


def test_overrides_leave_the_preset_as_it_was() -> None:
    tiny = load_preset("tiny")
    assignments = ["model.norm=rmsnorm", "model.n_kv_heads = 2", "training.grad_clip=none", 'data.corpus="a=b.txt"']
    changed = override(tiny, dict(map(parse_assignment, assignments)))
    assert changed["model"]["norm"] == "rmsnorm"
    assert changed["model"]["n_kv_heads"] == 2
    assert changed["training"]["grad_clip"] is None
    assert changed["data"]["corpus"] == "a=b.txt"
    assert tiny == load_preset("tiny")


@pytest.mark.parametrize("assignment", ["max_steps=3", "training.max_steps", "training=3", ""])
def test_refuses_an_assignment_without_a_name_or_a_value(assignment: str) -> None:
    with pytest.raises(ValueError, match=r"must read section\.key=value"):
        parse_assignment(assignment)


def test_refuses_an_unknown_preset_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"'tinny' \(did you mean 'tiny'\?\): allowed are gpt2-small, llama-small, tiny"
    ):
        load_preset("tinny")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.toml"):
        load_preset("nowhere.toml")
