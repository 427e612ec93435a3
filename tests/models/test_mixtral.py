"""Mixtral in and out of transformers: logits, gradients, files of both kinds, and what the layout cannot hold."""

import json

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from minillm.costs import parameters
from minillm.inference import generate
from minillm.models import MoEConfig, Transformer, TransformerConfig, huggingface, presets

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

_CONFIG = {"vocab_size": 9, "d_model": 16, "n_layers": 2, "positions": "rope", "norm": "rmsnorm"}
_CONFIG |= {"activation": "swiglu", "bias": False}


def _mixtral(**changes) -> MixtralForCausalLM:
    small = {"vocab_size": 37, "max_position_embeddings": 16, "hidden_size": 16, "intermediate_size": 20}
    small |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    small |= {"num_local_experts": 4, "bos_token_id": None, "eos_token_id": None}
    model = MixtralForCausalLM(MixtralConfig(**(small | changes))).eval()
    model.set_experts_implementation("eager")  # their loop: grouped_mm knows neither float64 nor odd widths
    return model


@st.composite
def mixtral_models(draw):
    heads, kv_heads = draw(st.sampled_from([(1, 1), (4, 2), (6, 3)]))
    n_experts = draw(st.sampled_from([1, 2, 5, 8]))
    return _mixtral(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_size=heads * draw(st.sampled_from([2, 6])),
        head_dim=draw(st.sampled_from([None, 4])),
        num_hidden_layers=draw(st.integers(1, 3)),
        intermediate_size=draw(st.sampled_from([5, 24])),
        num_local_experts=n_experts,
        num_experts_per_tok=draw(st.integers(1, n_experts)),
        sliding_window=draw(st.sampled_from([None, 5])),
        tie_word_embeddings=draw(st.booleans()),
    )


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    theirs=mixtral_models(), seed=st.integers(0, 2**31), batch=st.integers(1, 3), seq=st.sampled_from([1, 2, 7, 15, 16])
)
def test_logits_and_gradients_equal_transformers_both_ways(theirs, seed, batch, seq):
    torch.manual_seed(seed)
    theirs = theirs.double()  # in float32 two experts may change places
    ours = huggingface.from_transformers(theirs)
    assert parameters(ours.config) == sum(p.numel() for p in theirs.parameters())
    back = huggingface.to_transformers(ours)
    back.set_experts_implementation("eager")
    tokens, targets = torch.randint(0, 37, (2, batch, seq))

    logits = {"ours": ours(tokens), "theirs": theirs(tokens).logits, "back": back(tokens).logits}
    torch.testing.assert_close(logits["ours"], logits["theirs"], atol=1e-5, rtol=0)  # their norms are float32
    assert torch.equal(logits["back"], logits["theirs"])

    for out in logits.values():
        F.cross_entropy(out.flatten(0, 1), targets.flatten()).backward()
    # Our gradients in their layout, through the export: as weights of a model whose weights they are.
    as_weights = Transformer(ours.config).double()
    with torch.no_grad():
        for name, parameter in as_weights.named_parameters():
            parameter.copy_(ours.get_parameter(name).grad)
    exported = huggingface.to_transformers(as_weights)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(exported.get_parameter(name).data, parameter.grad, atol=1e-5, rtol=1e-4)


def test_the_balance_loss_is_theirs_for_one_layer():
    theirs = _mixtral(num_hidden_layers=1, router_aux_loss_coef=0.02)
    ours = huggingface.from_transformers(theirs)
    tokens = torch.randint(0, 37, (3, 11))
    out = theirs(tokens, output_router_logits=True)
    expected = load_balancing_loss_func(out.router_logits, 4, 2)
    records = ours(tokens, return_records=True)[1]
    assert records[0].losses.keys() == {"balance"}
    torch.testing.assert_close(records[0].losses["balance"], 0.02 * expected / 2)


@pytest.mark.parametrize("tied", [True, False])
def test_folders_go_both_ways(tied, tmp_path):
    theirs = _mixtral(tie_word_embeddings=tied, sliding_window=7)
    tokens = torch.randint(0, 37, (2, 9))
    expected = theirs(tokens).logits

    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in load_file(tmp_path / "one" / "model.safetensors")
    loaded = [huggingface.load(tmp_path / name) for name in ("one", "shards")]
    for model in loaded:
        torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=0)

    folder = huggingface.save(loaded[0], tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    assert type(again) is MixtralForCausalLM
    assert torch.equal(again(tokens).logits, expected)
    assert huggingface.load(folder).config == loaded[0].config
    assert loaded[0].config.moe == MoEConfig(4, 2, balance_loss=0.001)


def test_what_is_left_to_the_defaults_comes_back_as_it_was(tmp_path):
    """Our balance coefficient is 0.01 where none is given, theirs 0.001; a width or a loss may be said or left out."""
    config = TransformerConfig(**_CONFIG, moe=MoEConfig(4, 2))
    assert huggingface.load(huggingface.save(Transformer(config), tmp_path)).config.moe == MoEConfig(
        4, 2, balance_loss=0.01
    )
    said = config.replace(moe=MoEConfig(4, 2, d_ff=config.d_ff, z_loss=0.0, balance_loss=0.5))
    assert huggingface.load(huggingface.save(Transformer(said), tmp_path)).config.moe == MoEConfig(
        4, 2, balance_loss=0.5
    )


def test_a_config_of_a_million_experts_is_refused_at_once(tmp_path):
    _mixtral().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text()) | {"num_local_experts": 10**7}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"the config has 10000000 experts, but the weights are only .* tensors"):
        huggingface.load(tmp_path)


@pytest.mark.parametrize("left_out", [[], ["rope_parameters", "rms_norm_eps"], ["num_local_experts", "sliding_window"]])
def test_config_files_mean_what_they_mean_to_transformers(left_out, tmp_path):
    theirs = _mixtral(num_local_experts=8, num_key_value_heads=2, rms_norm_eps=1e-5)
    theirs.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    for name in left_out:
        fields.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    again = MixtralForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    tokens = torch.randint(0, 37, (2, 16))
    torch.testing.assert_close(huggingface.load(tmp_path)(tokens), again(tokens).logits, atol=1e-4, rtol=0)


def test_generation_with_a_cache_equals_transformers():
    theirs = _mixtral(max_position_embeddings=64)
    ours = huggingface.from_transformers(theirs)
    prompts = torch.randint(0, 37, (2, 9)).tolist()
    prompts[1] = prompts[1][:4]  # a shorter row is padded in front
    padded = torch.tensor([[0] * (9 - len(row)) + row for row in prompts])
    present = torch.tensor([[0] * (9 - len(row)) + [1] * len(row) for row in prompts])
    out = theirs.generate(padded, attention_mask=present, do_sample=False, max_new_tokens=20, pad_token_id=0)
    assert generate(ours, prompts, max_new_tokens=20, temperature=0.0) == out[:, 9:].tolist()


@pytest.mark.parametrize("name", ["mixtral-8x7b", "mixtral-8x22b"])
def test_presets_are_the_same_shape_in_transformers(name):
    config = presets.get(name).replace(n_layers=1)
    with torch.device("meta"):
        theirs = huggingface.to_transformers(Transformer(config))
    assert sum(p.numel() for p in theirs.parameters()) == parameters(config)
    assert huggingface.from_transformers(theirs).config == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe": MoEConfig(4, 2, layers=(1,))}, "needs moe with experts in every layer, got MoEConfig"),
        ({"moe": MoEConfig(4, 1, router="switch")}, r"Mixtral layout needs router='softmax' \(got 'switch'\)"),
        ({"moe": MoEConfig(4, capacity_factor=1.0)}, r"needs capacity_factor=None \(got 1.0\)"),
        ({"moe": MoEConfig(4, z_loss=0.1)}, r"needs z_loss=None \(got 0.1\)"),
        ({"moe": MoEConfig(4, n_shared_experts=1, d_ff=8)}, r"needs d_ff=None \(got 8\), n_shared_experts=0 \(got 1\)"),
        ({"moe": MoEConfig(4, router_options={"renormalise": False})}, r"needs router_options=\{\}"),
        ({"moe": MoEConfig(4), "activation": "gelu"}, r"Mixtral layout needs activation='swiglu' \(got 'gelu'\)"),
        ({"moe": MoEConfig(4), "positions": "learned"}, r"Mixtral layout needs positions='rope' \(got 'learned'\)"),
    ],
)
def test_configs_that_the_layout_cannot_hold_are_refused_by_name(changes, message, tmp_path):
    model = Transformer(TransformerConfig(**(_CONFIG | changes)))
    for export in (huggingface.to_transformers, lambda m: huggingface.save(m, tmp_path / "out")):
        with pytest.raises(ValueError, match=message):
            export(model)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_jitter_noise": 0.1}, "router_jitter_noise must be 0.0"),
        ({"attention_dropout": 0.1}, "attention_dropout must be 0.0"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
    ],
)
def test_models_that_cannot_be_held_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        huggingface.from_transformers(_mixtral(**changes))
