"""The feed-forward layers against transformers' GPT-2 and Llama MLPs."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from minillm.layers import FeedForward, SwiGLU


def _compare(ours: nn.Module, theirs: nn.Module) -> None:
    x = torch.randn(2, 5, 12)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = ours(mine), theirs(other)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("approximate", "theirs"), [("none", "gelu"), ("tanh", "gelu_new")])
def test_gelu_equals_gpt2s(approximate, theirs):
    twin = GPT2MLP(20, GPT2Config(n_embd=12, activation_function=theirs, resid_pdrop=0.0))
    layer = FeedForward(12, 20, approximate=approximate)
    with torch.no_grad():
        for ours, other in ((layer.up, twin.c_fc), (layer.down, twin.c_proj)):
            ours.weight.copy_(other.weight.t())
            ours.bias.copy_(other.bias.normal_())
    _compare(layer, twin)


@pytest.mark.parametrize("bias", [True, False])
def test_swiglu_equals_llamas(bias):
    twin = LlamaMLP(LlamaConfig(hidden_size=12, intermediate_size=20, num_attention_heads=2, mlp_bias=bias))
    layer = SwiGLU(12, 20, bias=bias)
    pairs = {"gate": twin.gate_proj, "up": twin.up_proj, "down": twin.down_proj}
    for name, other in pairs.items():
        getattr(layer, name).load_state_dict(other.state_dict())
    _compare(layer, twin)


def test_unknown_approximation_is_refused():
    with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh', got 'sigmoid'"):
        FeedForward(4, 8, approximate="sigmoid")
