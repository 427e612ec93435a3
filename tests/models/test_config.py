"""The config: what it works out, what it refuses, and that it survives being written down."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.layers import LinearScaling, Llama3Scaling
from minillm.models import TransformerConfig, presets


def test_sizes_left_open_are_worked_out():
    config = TransformerConfig(vocab_size=10, d_model=96, n_heads=6)
    assert (config.n_kv_heads, config.head_dim, config.d_ff) == (6, 16, 384)
    # 8/3 * 96 = 256, and 8/3 * 100 = 266.7, rounded up to a multiple of 32.
    assert TransformerConfig(vocab_size=10, d_model=96, activation="swiglu").d_ff == 256
    assert TransformerConfig(vocab_size=10, d_model=100, activation="swiglu").d_ff == 288


def test_replace_works_them_out_again_unless_they_were_chosen():
    config = TransformerConfig(vocab_size=10, d_model=64, n_heads=4)
    assert config.replace(d_model=128) == TransformerConfig(vocab_size=10, d_model=128, n_heads=4)
    assert config.replace(n_heads=8).n_kv_heads == 8
    chosen = TransformerConfig(vocab_size=10, d_model=64, n_heads=4, n_kv_heads=2, d_ff=100, head_dim=8)
    assert chosen.replace(d_model=128).to_dict() == chosen.to_dict() | {"d_model": 128}
    odd = TransformerConfig(vocab_size=10, d_model=100, n_heads=3, head_dim=32)
    assert odd.replace(dropout=0.1).to_dict() == odd.to_dict() | {"dropout": 0.1}
    with pytest.raises(ValueError, match="unknown config field width; the fields are vocab_size, context_length"):
        config.replace(width=3)


@given(
    heads=st.sampled_from([(4, 1), (4, 2), (4, 4)]),
    scaling=st.sampled_from([None, LinearScaling(2.0), Llama3Scaling()]),
    activation=st.sampled_from(["gelu", "gelu_tanh", "swiglu"]),
    bias=st.booleans(),
    dropout=st.floats(0, 0.99),
)
def test_survives_json(heads, scaling, activation, bias, dropout):
    config = TransformerConfig(
        vocab_size=10,
        n_heads=heads[0],
        n_kv_heads=heads[1],
        positions="rope",
        rope_scaling=scaling,
        activation=activation,
        bias=bias,
        dropout=dropout,
    )
    assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(TransformerConfig.from_dict(config.to_dict()))


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("vocab_size", 0, ValueError, "vocab_size must be at least 1, got 0"),
        ("n_layers", 2.0, TypeError, "n_layers must be an integer, got 2.0"),
        ("n_layers", True, TypeError, "n_layers must be an integer, got True"),
        ("context_length", None, TypeError, "context_length must be an integer, got None"),
        ("d_model", -4, ValueError, "d_model must be at least 1, got -4"),
        ("n_heads", 3, ValueError, "n_heads must divide d_model=128 unless head_dim is given, got 3"),
        ("n_kv_heads", 3, ValueError, "n_kv_heads must divide n_heads=4, got 3"),
        ("n_kv_heads", 8, ValueError, "n_kv_heads must divide n_heads=4, got 8"),
        ("d_ff", 0, ValueError, "d_ff must be at least 1, got 0"),
        ("norm", "batchnorm", ValueError, "norm must be one of layernorm, rmsnorm, got 'batchnorm'"),
        (
            "positions",
            "absolute",
            ValueError,
            "positions must be one of learned, sinusoidal, shaw, t5, rope, alibi, none",
        ),
        ("window", 0, ValueError, "window must be at least 1, got 0"),
        ("window", 2.5, TypeError, "window must be an integer, got 2.5"),
        ("relative_distance", 0, ValueError, "relative_distance must be at least 1, got 0"),
        ("activation", "relu", ValueError, "activation must be one of gelu, gelu_tanh, swiglu, got 'relu'"),
        ("bias", 1, TypeError, "bias must be True or False, got 1"),
        ("tied_embeddings", None, TypeError, "tied_embeddings must be True or False, got None"),
        ("dropout", 1.0, ValueError, "dropout must be at least 0 and below 1, got 1.0"),
        ("dropout", float("nan"), ValueError, "dropout must be at least 0 and below 1, got nan"),
        ("dropout", "0.1", TypeError, "dropout must be a number, got '0.1'"),
        ("norm_eps", 0, ValueError, "norm_eps must be above 0 and below 1, got 0"),
        ("rope_base", -1.0, ValueError, "rope_base must be above 0 and below inf, got -1.0"),
        ("initializer_std", 0.0, ValueError, "initializer_std must be above 0 and below inf, got 0.0"),
        (
            "rope_scaling",
            "linear",
            TypeError,
            "rope_scaling must be None or a RoPE scaling, got 'linear'",
        ),
        ("rope_scaling", LinearScaling(2.0), ValueError, "rope_scaling must be None unless positions='rope'"),
    ],
)
def test_bad_values_are_refused_by_name(field, value, error, message):
    with pytest.raises(error, match=message):
        TransformerConfig(**({"vocab_size": 10} | {field: value}))


def test_odd_heads_cannot_turn():
    with pytest.raises(ValueError, match="head_dim must be even for positions='rope', got 5"):
        TransformerConfig(vocab_size=10, head_dim=5, positions="rope")


def test_from_dict_refuses_unknown_and_missing_fields():
    with pytest.raises(ValueError, match="unknown config field n_head, n_layer; the fields are"):
        TransformerConfig.from_dict({"vocab_size": 10, "n_layer": 2, "n_head": 2})
    with pytest.raises(ValueError, match="vocab_size is missing"):
        TransformerConfig.from_dict({"n_layers": 2})


def test_preset_names():
    assert set(presets.names()) == set(presets.PRESETS)
    assert presets.get("gpt2-small").d_model == 768
    with pytest.raises(ValueError, match=r"the preset must be one of tiny, .*gpt2-small.*, got 'gpt5'"):
        presets.get("gpt5")
