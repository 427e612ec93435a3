"""Parameter counts: equal to the model's for every switch, and to the published ones."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.costs import parameters, parameters_by_part
from minillm.models import Transformer, TransformerConfig, presets

configs = st.builds(
    lambda heads, width, **fields: TransformerConfig(
        d_model=heads[0] * 4 * width, n_heads=heads[0], n_kv_heads=heads[1], **fields
    ),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1), (6, 3)]),
    width=st.integers(1, 3),
    vocab_size=st.integers(1, 50),
    context_length=st.integers(1, 20),
    n_layers=st.integers(1, 3),
    head_dim=st.sampled_from([None, 6]),
    d_ff=st.sampled_from([None, 7]),
    norm=st.sampled_from(["layernorm", "rmsnorm"]),
    positions=st.sampled_from(["learned", "rope", "shaw", "t5", "alibi"]),
    relative_distance=st.integers(4, 9),
    relative_buckets=st.just(6),
    activation=st.sampled_from(["gelu", "gelu_tanh", "swiglu"]),
    bias=st.booleans(),
    tied_embeddings=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(config=configs)
def test_equals_the_model_in_all_and_in_each_part(config):
    with torch.device("meta"):
        model = Transformer(config)
    counted = dict.fromkeys(parameters_by_part(config), 0)
    for name, parameter in model.named_parameters():
        part = next((part for part in counted if name.startswith(part)), None)
        part = "position_embedding" if "relative." in name or name == "position_bias.weight" else part
        part = part or next(p for p in ("norms", "attention", "feed_forward") if p.removesuffix("s") in name)
        counted[part] += parameter.numel()
    assert parameters_by_part(config) == counted
    assert parameters(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gpt2-small", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("mistral-7b", 7_241_732_096),
        ("tinyllama-1.1b", 1_100_048_384),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_equals_the_published_count(name, published):
    assert parameters(presets.get(name)) == published


def test_costs_need_no_torch():
    script = "import sys; sys.modules['torch'] = None; import minillm.costs; print('fine')"
    assert "fine" in subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
