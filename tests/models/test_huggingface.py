"""Parity with transformers' GPT-2, Llama and Mistral at random configs, both ways, and the files between them."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import minillm
from minillm.costs import parameters
from minillm.inference import generate
from minillm.layers import NTKScaling, YarnScaling
from minillm.models import Transformer, TransformerConfig, huggingface, presets

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}


def _gpt2(**changes) -> GPT2LMHeadModel:
    small = {"vocab_size": 37, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 3, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(**(small | NO_TOKENS | changes))).eval()


def _llama(**changes) -> LlamaForCausalLM:
    small = {"vocab_size": 37, "max_position_embeddings": 16, "hidden_size": 16, "intermediate_size": 20}
    small |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**(small | NO_TOKENS | changes))).eval()


def _mistral(**changes) -> MistralForCausalLM:
    small = {"vocab_size": 37, "max_position_embeddings": 16, "hidden_size": 16, "intermediate_size": 20}
    small |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return MistralForCausalLM(MistralConfig(**(small | {"sliding_window": 5} | NO_TOKENS | changes))).eval()


def _randomised(model):
    """Biases and norms start as zeros and ones, which would hide a swap."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


rope = st.sampled_from(
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
        {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
        {"rope_type": "yarn", "rope_theta": 500.0, "factor": 2.0, "original_max_position_embeddings": 8},
        {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "beta_fast": 2.0,
            "beta_slow": 0.3,
            "attention_factor": 0.8,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    ]
)


@st.composite
def gpt2_models(draw):
    heads = draw(st.sampled_from([1, 2, 3]))
    return _gpt2(
        vocab_size=draw(st.sampled_from([1, 37, 64])),
        n_head=heads,
        n_embd=heads * draw(st.sampled_from([1, 3, 8])),
        n_layer=draw(st.integers(1, 3)),
        n_inner=draw(st.sampled_from([None, 5, 24])),
        activation_function=draw(st.sampled_from(["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast"])),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 1e-3])),
        tie_word_embeddings=draw(st.booleans()),
    )


@st.composite
def llama_fields(draw):
    heads, kv_heads = draw(st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1), (6, 3)]))
    return {
        "vocab_size": draw(st.sampled_from([1, 37, 64])),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * draw(st.sampled_from([2, 6])),
        "head_dim": draw(st.sampled_from([None, 4, 10])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "intermediate_size": draw(st.sampled_from([5, 24])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "rope_parameters": draw(rope),
        "tie_word_embeddings": draw(st.booleans()),
    }


llama_models = st.builds(lambda fields: _llama(**fields), llama_fields())
mistral_models = st.builds(
    lambda fields, window: _mistral(**fields, sliding_window=window),
    llama_fields(),
    st.sampled_from([None, 1, 2, 5, 15, 16, 100]),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), seed=st.integers(0, 2**31), batch=st.integers(1, 3), seq=st.sampled_from([1, 2, 7, 15, 16]))
@pytest.mark.parametrize("models", [gpt2_models(), llama_models, mistral_models], ids=["gpt2", "llama", "mistral"])
def test_logits_and_gradients_equal_transformers_both_ways(models, data, seed, batch, seq):
    torch.manual_seed(seed)
    theirs = _randomised(data.draw(models))
    ours = huggingface.from_transformers(theirs)
    assert parameters(ours.config) == sum(p.numel() for p in theirs.parameters())
    back = huggingface.to_transformers(ours)
    vocab_size = theirs.config.vocab_size
    tokens, targets = torch.randint(0, vocab_size, (2, batch, seq))

    logits = {"ours": ours(tokens), "theirs": theirs(tokens).logits, "back": back(tokens).logits}
    torch.testing.assert_close(logits["ours"], logits["theirs"], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits["back"], logits["theirs"], atol=1e-5, rtol=0)  # gelu_fast comes back as gelu_new

    for out in logits.values():
        F.cross_entropy(out.flatten(0, 1), targets.flatten()).backward()
    # Our gradients in their layout, through the export: as weights of a model whose weights they are.
    as_weights = Transformer(ours.config)
    with torch.no_grad():
        for name, parameter in as_weights.named_parameters():
            parameter.copy_(ours.get_parameter(name).grad)
    exported = huggingface.to_transformers(as_weights)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(exported.get_parameter(name).data, parameter.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("make", [_gpt2, _llama, _mistral], ids=["gpt2", "llama", "mistral"])
@pytest.mark.parametrize("tied", [True, False])
def test_folders_go_both_ways(make, tied, tmp_path):
    theirs = _randomised(make(tie_word_embeddings=tied))
    tokens = torch.randint(0, 37, (2, 9))
    expected = theirs(tokens).logits

    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    loaded = [huggingface.load(tmp_path / name) for name in ("one", "shards")]
    for model in loaded:
        assert not model.training
        torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=0)

    folder = huggingface.save(loaded[0], tmp_path / "new" / "ours", eos_token_id=3)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(again) is type(theirs)
    assert again.config.eos_token_id == 3
    assert torch.equal(again(tokens).logits, expected)
    back = huggingface.load(folder)
    assert back.config == loaded[0].config
    assert torch.equal(back(tokens), loaded[0](tokens))


@pytest.mark.parametrize("window", [3, 8, None])
def test_generation_with_the_rolling_cache_equals_mistrals_in_transformers(window):
    theirs = _randomised(_mistral(sliding_window=window, max_position_embeddings=64))
    ours = huggingface.from_transformers(theirs)
    assert ours.config.window == window
    prompts = torch.randint(0, 37, (3, 12)).tolist()
    prompts[1] = prompts[1][:5]  # shorter rows are padded in front
    prompts[2] = prompts[2][:1]
    padded = torch.tensor([[0] * (12 - len(row)) + row for row in prompts])
    present = torch.tensor([[0] * (12 - len(row)) + [1] * len(row) for row in prompts])
    out = theirs.generate(padded, attention_mask=present, do_sample=False, max_new_tokens=40, pad_token_id=0)
    assert generate(ours, prompts, max_new_tokens=40, temperature=0.0) == out[:, 12:].tolist()

    # Token by token through a cache that is smaller than the text, against the whole text at once.
    tokens = torch.cat((padded[:1], out[:1, 12:]), dim=1)
    expected = theirs(tokens).logits
    cache = ours.new_cache(1)
    steps = [ours(tokens[:, :20], cache=cache), *(ours(tokens[:, i : i + 1], cache=cache) for i in range(20, 52))]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-4, rtol=0)
    if window is not None:
        assert cache.layers[0].keys.size(2) < 16


@pytest.mark.parametrize(
    ("left_out", "window", "kv_heads"), [({"sliding_window"}, 4096, 2), ({"num_key_value_heads"}, 5, 8), (set(), 5, 2)]
)
def test_mistrals_config_files_mean_what_they_mean_to_transformers(left_out, window, kv_heads, tmp_path):
    theirs = _mistral(num_attention_heads=8, num_key_value_heads=kv_heads, sliding_window=window)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = {name: value for name, value in json.loads(file.read_text()).items() if name not in left_out}
    file.write_text(json.dumps(fields))
    again = MistralConfig(**fields)
    config = huggingface.load(tmp_path).config
    assert (config.window, config.n_kv_heads) == (again.sliding_window, again.num_key_value_heads) == (window, kv_heads)
    file.write_text(json.dumps(fields | {"sliding_window": None}))
    config = huggingface.load(tmp_path).config
    assert config.window is None
    assert type(huggingface.to_transformers(Transformer(config))) is LlamaForCausalLM  # without a window it is a Llama


def test_ntk_scaling_leaves_as_the_larger_base_that_it_is(tmp_path):
    sizes = {"vocab_size": 37, "d_model": 16, "n_layers": 2, "context_length": 16}
    switches = {"norm": "rmsnorm", "positions": "rope", "activation": "swiglu", "bias": False}
    ours = Transformer(TransformerConfig(**sizes, **switches, rope_base=500.0, rope_scaling=NTKScaling(3.0)))
    theirs = huggingface.to_transformers(ours)
    assert theirs.config.rope_parameters["rope_type"] == "default"
    assert theirs.config.rope_parameters["rope_theta"] == pytest.approx(500 * 3 ** (4 / 2))
    tokens = torch.randint(0, 37, (2, 16))
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-4, rtol=0)
    again = huggingface.load(huggingface.save(ours, tmp_path))
    assert again.config.rope_scaling is None
    torch.testing.assert_close(again(tokens), ours(tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, YarnScaling(4.0, 16)),
        ({"factor": None, "original_max_position_embeddings": 4}, YarnScaling(4.0, 4)),
        ({"beta_fast": None, "beta_slow": 2, "truncate": None, "attention_factor": None}, YarnScaling(4.0, 16, 32, 2)),
    ],
)
def test_what_a_yarn_config_leaves_out_is_what_transformers_takes(changes, expected, tmp_path):
    theirs = _llama()
    theirs.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["rope_scaling"] = {"type": "yarn", "factor": 4.0} | changes  # the older writing
    del fields["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ours = huggingface.load(tmp_path)
    assert ours.config.rope_scaling == expected
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(0, 37, (2, 16))
    torch.testing.assert_close(ours(tokens), again(tokens).logits, atol=1e-4, rtol=0)


def test_dtype_is_kept_or_chosen(tmp_path):
    huggingface.save(huggingface.from_transformers(_llama()).to(torch.bfloat16), tmp_path)
    assert {p.dtype for p in huggingface.load(tmp_path).parameters()} == {torch.bfloat16}
    model = huggingface.load(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.rotary.inverse_frequency.dtype is torch.float32
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype is torch.bfloat16


def test_files_as_published_are_read(tmp_path):
    """Without the prefix, with mask buffers, old rope fields, most config fields left out; as on the hub."""
    theirs = _randomised(_gpt2(n_embd=24, n_head=12, n_layer=1))
    bare = {name.removeprefix("transformer."): t.contiguous() for name, t in theirs.state_dict().items()}
    del bare["lm_head.weight"]
    bare |= {"h.0.attn.bias": torch.ones(1, 1, 16, 16).tril(), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(bare, tmp_path / "model.safetensors")
    fields = {"model_type": "gpt2", "vocab_size": 37, "n_ctx": 16, "n_positions": 16, "n_embd": 24, "n_layer": 1}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"n_inner": None}))
    tokens = torch.randint(0, 37, (2, 16))
    torch.testing.assert_close(huggingface.load(tmp_path)(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)

    llama = _llama(num_hidden_layers=1, rope_parameters={"rope_type": "linear", "rope_theta": 77.0, "factor": 2.0})
    tensors = {name: t.contiguous() for name, t in llama.state_dict().items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, tmp_path / "model.safetensors")
    fields = {"model_type": "llama", "vocab_size": 37, "hidden_size": 16, "intermediate_size": 20}
    fields |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu"}
    fields |= {"rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    torch.testing.assert_close(huggingface.load(tmp_path)(tokens), llama(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", [GPT2LMHeadModel, LlamaForCausalLM])
def test_every_published_preset_is_the_same_shape_in_transformers(family):
    wanted = "gpt2" if family is GPT2LMHeadModel else "llama"
    for name in presets.names():
        config = presets.get(name)
        if not name.startswith(wanted):
            continue
        with torch.device("meta"):
            theirs = huggingface.to_transformers(Transformer(config.replace(n_layers=1)))
        assert sum(p.numel() for p in theirs.parameters()) == parameters(config.replace(n_layers=1))


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (_gpt2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be False.*got True"),
        (_gpt2, {"scale_attn_weights": False}, "scale_attn_weights must be True"),
        (_gpt2, {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn must be False"),
        (_gpt2, {"add_cross_attention": True}, "add_cross_attention must be False"),
        (_gpt2, {"activation_function": "relu"}, "activation_function must be one of gelu, .*got 'relu'"),
        (_gpt2, {"attn_pdrop": 0.3}, "embd_pdrop, attn_pdrop and resid_pdrop must be equal"),
        (_llama, {"attention_bias": True}, "attention_bias must be False"),
        (_llama, {"mlp_bias": True}, "mlp_bias must be False"),
        (_llama, {"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        (_llama, {"attention_dropout": 0.1}, "attention_dropout must be 0.0"),
        (
            _llama,
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type must be one of default, linear, llama3, yarn, got 'dynamic'",
        ),
        (
            _llama,
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "mscale": 0.7}},
            "mscale must be None: .* got 0.7",
        ),
        (
            _llama,
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 0.5}},
            "factor must be at least 1 and finite, got 0.5",
        ),
        (_llama, {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
        (_mistral, {"attention_dropout": 0.1}, "attention_dropout must be 0.0"),
        (_mistral, {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types must be None"),
    ],
)
def test_models_that_cannot_be_held_are_refused_by_name(make, changes, message):
    with pytest.raises(ValueError, match=message):
        huggingface.from_transformers(make(**changes))


def test_other_architectures_are_refused_by_name():
    small = {
        "vocab_size": 8,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
    }
    other = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**small))
    with pytest.raises(ValueError, match="model_type must be one of gpt2, llama, mistral, mixtral, got 'gpt_neox'"):
        huggingface.from_transformers(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "learned", "bias": False}, r"GPT-2 layout needs bias=True \(got False\)"),
        ({"norm": "rmsnorm", "n_kv_heads": 2}, r"norm='layernorm' \(got 'rmsnorm'\), n_kv_heads=4 \(got 2\)"),
        ({"activation": "swiglu"}, "activation 'gelu' or 'gelu_tanh'"),
        ({"head_dim": 5}, r"n_heads \* head_dim = d_model, got 'gelu' and 4 \* 5 for 16"),
        ({"positions": "rope"}, r"Llama layout needs norm='rmsnorm' .*, activation='swiglu' .*, bias=False"),
        ({"positions": "rope", "window": 4}, r"Mistral layout needs norm='rmsnorm' .*, activation='swiglu'"),
        ({"window": 4}, r"GPT-2 layout needs window=None \(got 4\)"),
        ({"positions": "alibi"}, r"GPT-2 layout needs positions='learned' \(got 'alibi'\)"),
    ],
)
def test_configs_without_a_layout_are_refused_by_name(changes, message, tmp_path):
    model = Transformer(TransformerConfig(**({"vocab_size": 9, "d_model": 16} | changes)))
    for export in (huggingface.to_transformers, lambda m: huggingface.save(m, tmp_path / "out")):
        with pytest.raises(ValueError, match=message):
            export(model)
    assert not (tmp_path / "out").exists()


def test_broken_folders_are_refused_by_name(tmp_path):
    def refused(error, message):
        with pytest.raises(error, match=message):
            huggingface.load(tmp_path)

    refused(FileNotFoundError, "config.json is missing")
    config, weights, index = (
        tmp_path / n for n in ("config.json", "model.safetensors", "model.safetensors.index.json")
    )
    config.write_text("{")
    refused(ValueError, "config.json is not JSON")
    config.write_text("[]")
    refused(ValueError, "must hold a JSON object, got list")
    config.write_text('{"model_type": "bert"}')
    refused(ValueError, "model_type must be one of gpt2, llama, mistral, mixtral, got 'bert'")

    model = huggingface.from_transformers(_gpt2())
    huggingface.save(model, tmp_path)
    whole = load_file(weights)
    weights.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refused(FileNotFoundError, "neither model.safetensors nor .* pickled")
    save_file({k: v for k, v in whole.items() if "ln_f" not in k} | {"extra": torch.ones(1)}, weights)
    refused(ValueError, "missing ln_f.bias, ln_f.weight; not known extra")
    save_file(whole | {"transformer.wpe.weight": torch.ones(3, 12)}, weights)
    refused(ValueError, r"transformer.wpe.weight must have the shape \(16, 12\) by the config, got \(3, 12\)")
    name = "transformer.h.0.mlp.c_fc.weight"
    save_file(whole | {name: whole[name].t().contiguous()}, weights)
    refused(ValueError, r"c_fc.weight must have the shape \(12, 48\) by the config, got \(48, 12\)")
    weights.unlink()
    for owner, error, message in (
        ({}, ValueError, "has no weight_map"),
        ({"a": "../../secret.safetensors"}, ValueError, "must name files of its own folder, got '../../secret"),
        ({"a": "gone.safetensors"}, FileNotFoundError, "gone.safetensors is missing, though"),
    ):
        index.write_text(json.dumps({"weight_map": owner}))
        refused(error, message)
    save_file(whole, tmp_path / "part.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*whole, "more"], "part.safetensors")}))
    refused(ValueError, "does not hold more, though the index says so")


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:100], lambda b: b[:-10], lambda b: b"\xff" * 200])
@pytest.mark.parametrize("sharded", [False, True])
def test_damaged_weights_are_refused_by_name(damage, sharded, tmp_path):
    _gpt2().save_pretrained(tmp_path, max_shard_size="4KB" if sharded else "1GB")
    victim = sorted(tmp_path.glob("*.safetensors"))[-1]
    victim.write_bytes(damage(victim.read_bytes()))
    with pytest.raises(ValueError, match=f"{victim.name} is no intact safetensors file"):
        huggingface.load(tmp_path)


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (_gpt2, {"n_layer": 10**12}, "the config has 1000000000000 layers, but the weights are only"),
        (_gpt2, {"n_embd": "12"}, "config.json is no config of GPT2LMHeadModel: .*d_model must be an integer"),
        (_gpt2, {"activation_function": ["gelu"]}, "config.json is no config of GPT2LMHeadModel"),
        (_llama, {"rope_parameters": [1]}, "config.json is no config of LlamaForCausalLM"),
        (_llama, {"rope_parameters": {"rope_type": "linear"}}, "config.json is no config of .*'factor'"),
    ],
)
def test_hostile_configs_are_refused_by_name(make, changes, message, tmp_path):
    make().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        huggingface.load(tmp_path)


def test_a_save_that_fails_leaves_the_old_files_and_no_others(tmp_path, monkeypatch):
    model = huggingface.from_transformers(_gpt2())
    huggingface.save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(huggingface.os, "fsync", full_disk)
    with torch.no_grad():
        model.token_embedding.weight.add_(1)
    with pytest.raises(OSError, match="no space left"):
        huggingface.save(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_all_but_one_function_work_without_transformers(tmp_path, monkeypatch):
    theirs = _gpt2()
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it now raises ImportError
    huggingface.save(huggingface.from_transformers(theirs), tmp_path)
    model = huggingface.load(tmp_path)
    with pytest.raises(ImportError, match="to_transformers needs the transformers package"):
        huggingface.to_transformers(model)


def test_no_module_imports_an_oracle_when_it_is_imported():
    package = Path(minillm.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in getattr(node, "names", [])] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"transformers", "tokenizers", "sentencepiece"} & {name.split(".")[0] for name in names}, path
