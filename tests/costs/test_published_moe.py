"""Cards of published mixtures: against transformers' models of those shapes, their FLOPs, and the printed figures."""

import re
from dataclasses import replace

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from minillm.costs import (
    PUBLISHED_MOE_MODELS,
    active_parameters,
    forward_flops,
    moe_figures,
    parameters,
)
from minillm.costs.moe_card import LatentAttention
from minillm.costs.published_moe import SPAN_CORRUPTION
from minillm.models import presets

_OPTIONS = {"attn_implementation": "eager", "experts_implementation": "eager"}


_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}


def printed_value(printed: str) -> tuple[float, float]:
    """A figure as printed, "96.6B" for instance, and half a unit of its last digit: (96.6e9, 0.05e9)."""
    match = re.fullmatch(r"\d+(?:\.(\d+))?([KMBGT])", printed)
    if match is None:
        raise ValueError(f"printed must be a number and one of {', '.join(_UNITS)}, got {printed!r}")
    unit = _UNITS[match[2]]
    return float(printed[:-1]) * unit, 0.5 * unit / 10 ** len(match[1] or "")


def rounds_to(value: float, printed: str) -> bool:
    """Whether ``value`` lies within half a unit of the last printed digit."""
    number, half = printed_value(printed)
    return abs(value - number) <= half


def _theirs(card):
    """transformers' model of the card's shape."""
    fields = {
        "vocab_size": card.vocab_size,
        "hidden_size": card.d_model,
        "num_hidden_layers": card.n_layers,
        "num_attention_heads": card.n_heads,
        "num_key_value_heads": card.n_kv_heads,
        "head_dim": card.head_dim,
        "intermediate_size": card.d_ff,
        "num_experts_per_tok": card.k,
        "tie_word_embeddings": card.tied_embeddings,
        "pad_token_id": 0,
    }
    if card.name.startswith("Mixtral"):
        config = transformers.MixtralConfig(**fields, num_local_experts=card.n_experts)
    elif card.name.startswith("OLMoE"):
        config = transformers.OlmoeConfig(**fields, num_experts=card.n_experts)
    elif card.name.startswith("Qwen3"):
        sizes = {"num_local_experts": card.n_experts, "moe_intermediate_size": card.expert_d_ff}
        config = transformers.Qwen3MoeConfig(**fields, **sizes)
    elif card.name.startswith("gpt-oss"):
        config = transformers.GptOssConfig(
            **fields, num_local_experts=card.n_experts, sliding_window=card.alternate_window
        )
    else:
        of_version = {
            "DeepSeek-V2": (transformers.DeepseekV2Config, {}),
            "DeepSeek-V3": (transformers.DeepseekV3Config, {"n_group": 1, "topk_group": 1}),
        }
        make, groups = of_version[card.name]
        del fields["head_dim"]
        config = make(
            **fields,
            **groups,
            moe_intermediate_size=card.expert_d_ff,
            n_routed_experts=card.n_experts,
            n_shared_experts=card.n_shared_experts,
            first_k_dense_replace=card.first_dense,
            q_lora_rank=card.latent.query_rank,
            kv_lora_rank=card.latent.key_value_rank,
            qk_nope_head_dim=card.latent.nope_dim,
            qk_rope_head_dim=card.latent.rope_dim,
            v_head_dim=card.latent.value_dim,
        )
    return transformers.AutoModelForCausalLM.from_config(config, **_OPTIONS)


def _numel(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


DECODERS = [name for name in PUBLISHED_MOE_MODELS if not name.startswith(("Switch", "GLaM"))]
SMALL = {"vocab_size": 31, "d_model": 16, "n_layers": 4, "n_heads": 4, "d_ff": 24, "n_experts": 5, "k": 2}


def _small(card):
    """Cut down to a few thousand parameters; what is peculiar to the family is left."""
    heads = {"n_kv_heads": 4 if card.latent or card.name.startswith("OLMoE") else 2, "head_dim": 8}
    small = replace(card, **SMALL, **heads, expert_d_ff=24 if card.d_ff == card.expert_d_ff else 10)
    if card.latent:
        small = replace(small, latent=LatentAttention(12, 6, 8, 4, 10), attention_vectors=12 + 6)
    elif card.name.startswith("OLMoE"):
        small = replace(small, head_dim=4, attention_vectors=2 * 16)
    elif card.name.startswith("Qwen3"):
        small = replace(small, attention_vectors=2 * 8)
    elif card.name.startswith("gpt-oss"):
        small = replace(
            small,
            attention_vectors=(4 + 2 * 2) * 8 + 16 + 4,
            expert_vectors=2 * 24 + 16,
            router_vectors=5,
            alternate_window=3,
        )
    return small


@pytest.mark.parametrize("name", DECODERS)
def test_parameters_are_those_of_transformers_model(name):
    card = PUBLISHED_MOE_MODELS[name]
    with torch.device("meta"):
        assert card.parameters == _numel(_theirs(card))


def _counted(run) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", DECODERS)
def test_flops_are_those_that_run_in_transformers_model(name):
    card = _small(PUBLISHED_MOE_MODELS[name])
    model = _theirs(card).eval()
    assert card.parameters == _numel(model)
    tokens = torch.randint(1, 31, (1, 6))
    assert _counted(lambda: model(tokens, use_cache=False)) == card.forward_flops(6)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("gated", [False, True])
def test_encoder_decoders_are_those_of_transformers(every, gated):
    """transformers' experts are not gated and its gated T5 has none: between them they have all parts."""
    sizes = {"vocab_size": 31, "d_model": 16, "n_layers": 4, "n_encoder_layers": 2, "n_heads": 2, "n_kv_heads": 2}
    sizes |= {"head_dim": 8, "d_ff": 24, "expert_d_ff": 24, "position_parameters": 2 * 32 * 2, "moe_every": every}
    card = replace(PUBLISHED_MOE_MODELS["Switch-Base"], **sizes, n_experts=3, gated=False, gated_experts=False)
    fields = {"vocab_size": 31, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 4}
    fields |= {"num_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    if gated:
        card = replace(card, gated=True, n_experts=0, k=0)
        config = transformers.T5Config(**fields, feed_forward_proj="gated-gelu")
        model = transformers.T5ForConditionalGeneration._from_config(config, attn_implementation="eager")
    else:
        sparse = {"num_sparse_encoder_layers": 2 // every, "num_sparse_decoder_layers": 4 // every}
        config = transformers.SwitchTransformersConfig(**fields, **sparse, num_experts=3, expert_capacity=99)
        model = transformers.SwitchTransformersForConditionalGeneration._from_config(config, **_OPTIONS)
    assert card.parameters == _numel(model)
    texts = {"input_ids": torch.randint(2, 31, (1, 7)), "decoder_input_ids": torch.randint(2, 31, (1, 5))}
    assert _counted(lambda: model.eval()(**texts, use_cache=False)) == card.forward_flops(7, 5)


@pytest.mark.parametrize("card", PUBLISHED_MOE_MODELS.values(), ids=lambda card: card.name)
def test_printed_figures_follow_or_the_card_says_that_they_do_not(card):
    """To the last printed digit, both ways: nothing is called unexplained that agrees."""
    lengths = SPAN_CORRUPTION if card.n_encoder_layers else (1,)
    active = card.active_parameters - (0 if card.active_counts_embedding else card.embedding_parameters)
    computed = {
        "parameters": (card.parameters, card.printed_parameters),
        "active": (active, card.printed_active),
        "flops": (card.weight_flops(*lengths), card.printed_flops),
    }
    computed = {figure: pair for figure, pair in computed.items() if pair[1] is not None}
    disagreeing = {figure for figure, (value, printed) in computed.items() if not rounds_to(value, printed)}
    assert disagreeing == set(card.unexplained)


def test_how_far_the_unexplained_figures_are_off():
    """What the cards say of them. All but Switch-XXL's and GLaM 1.7B/32E's experts are within 8 %."""
    ratios = {
        (card.name, figure): value / printed_value(printed)[0]
        for card in PUBLISHED_MOE_MODELS.values()
        for figure, value, printed in (
            ("parameters", card.parameters, card.printed_parameters),
            ("active", card.active_parameters, card.printed_active),
        )
        if figure in card.unexplained
    }
    assert ratios == pytest.approx(
        {
            ("Switch-Large", "parameters"): 1.043,
            ("Switch-XXL", "parameters"): 0.510,
            ("GLaM 0.1B", "parameters"): 1.060,
            ("GLaM 0.1B", "active"): 1.060,
            ("GLaM 1.7B", "active"): 0.986,
            ("GLaM 137B", "parameters"): 1.005,
            ("GLaM 137B", "active"): 1.005,
            ("GLaM 0.1B/64E", "active"): 1.050,
            ("GLaM 1.7B/32E", "parameters"): 0.698,
            ("GLaM 1.7B/256E", "parameters"): 0.992,
            ("GLaM 1.7B/256E", "active"): 0.999,
            ("Qwen3-30B-A3B", "active"): 1.016,
        },
        abs=6e-4,
    )
    assert PUBLISHED_MOE_MODELS["GLaM 64B/64E"].weight_flops() / 180e9 == pytest.approx(1.073, abs=1e-3)


def test_what_the_cards_say_would_explain_a_figure():
    cards = PUBLISHED_MOE_MODELS
    assert rounds_to(replace(cards["Switch-XXL"], n_experts=128).parameters, "395B")
    two_matrices = replace(cards["Switch-Large"], gated=False, gated_experts=False, d_ff=4096, expert_d_ff=4096)
    assert rounds_to(two_matrices.parameters, "26B")
    assert rounds_to(two_matrices.parameters, "26.3B")
    for name in ("GLaM 137B", "GLaM 0.1B"):
        card = cards[name]
        assert rounds_to(
            card.parameters - card.embedding_parameters, {"GLaM 137B": "137.4B", "GLaM 0.1B": "113M"}[name]
        )
    # The vocabulary is what the 96.6B hold, and what the four digits of the 1.7B models do not.
    assert not rounds_to(replace(cards["GLaM 64B/64E"], vocab_size=32000).active_parameters, "96.6B")
    assert not rounds_to(replace(cards["GLaM 1.7B/64E"], vocab_size=256000).active_parameters, "1.879B")


@pytest.mark.parametrize("name", ["Switch-Base", "Switch-Large", "Switch-XXL", "Switch-C"])
def test_flops_of_a_sequence_in_switch_are_near_the_printed(name):
    """Fedus et al. 2022, table 9, prints neither lengths nor what is counted; Switch-C's router alone is 9 % of it."""
    card = PUBLISHED_MOE_MODELS[name]
    printed, _ = printed_value(card.printed_flops)
    assert 0.96 < card.weight_flops(*SPAN_CORRUPTION) / printed < 1.08
    assert 1.10 < card.forward_flops(*SPAN_CORRUPTION) / printed < 1.24
    # Matched with T5: experts cost nothing but the router.
    dense = replace(card, n_experts=0, k=0)
    router = 2 * sum(SPAN_CORRUPTION) * card.n_moe_layers // 2 * card.n_experts * card.d_model
    assert card.weight_flops(*SPAN_CORRUPTION) - dense.weight_flops(*SPAN_CORRUPTION) == router


def test_cards_and_configs_agree():
    config, card = presets.get("mixtral-8x7b"), PUBLISHED_MOE_MODELS["Mixtral 8x7B"]
    assert card.parameters == parameters(config)
    assert card.active_parameters == active_parameters(config)
    for seq in (1, 7, 300):
        assert card.forward_flops(seq) == forward_flops(config, 1, seq)
        assert card.forward_flops(seq, causal=True) == forward_flops(config, 1, seq, causal=True)


def test_a_window_counts_in_every_other_layer():
    card = PUBLISHED_MOE_MODELS["gpt-oss-20b"]
    full = replace(card, alternate_window=None)
    assert card.forward_flops(128, causal=True) == full.forward_flops(128, causal=True)
    seen = sum(min(place, 128) for place in range(1, 1001))
    saved = 12 * 4 * 64 * 64 * (1000 * 1001 // 2 - seen)
    assert full.forward_flops(1000, causal=True) - card.forward_flops(1000, causal=True) == saved


def test_figures_are_the_cards():
    rows = {row.name: row for row in moe_figures(512)}
    assert list(rows) == list(PUBLISHED_MOE_MODELS)
    glam, switch = rows["GLaM 64B/64E"], rows["Switch-C"]
    assert round(glam.active_share, 2) == 0.08  # "8% of 1.2T", section 4
    assert glam.weight_flops_per_token == PUBLISHED_MOE_MODELS["GLaM 64B/64E"].weight_flops()
    assert switch.weight_flops_per_token * 626 == PUBLISHED_MOE_MODELS["Switch-C"].weight_flops(512, 114)
    for row in rows.values():
        assert row.active_parameters <= row.parameters
        assert row.weight_flops_per_token < row.forward_flops_per_token
    assert rows["GLaM 137B"].active_share == 1.0
    assert len(moe_figures(1)) == len(rows)


def test_half_a_unit_of_the_last_digit_is_meant_by_a_printed_figure():
    assert printed_value("96.6B") == pytest.approx((96.6e9, 0.05e9))
    assert rounds_to(46.74e9, "46.7B")
    assert not rounds_to(46.76e9, "46.7B")
    with pytest.raises(ValueError, match="printed must be a number and one of K, M, B, G, T, got 'many'"):
        printed_value("many")


def test_bad_numbers_are_refused_by_name():
    switch, mixtral = PUBLISHED_MOE_MODELS["Switch-Base"], PUBLISHED_MOE_MODELS["Mixtral 8x7B"]
    for call, message in (
        (lambda: moe_figures(0), "context must be at least 1, got 0"),
        (lambda: mixtral.forward_flops(0), "seq must be at least 1, got 0"),
        (lambda: switch.forward_flops(3, 0), "target must be at least 1, got 0"),
        (lambda: switch.weight_flops(3), "target must be a number of tokens for Switch-Base, got None"),
        (lambda: mixtral.weight_flops(3, 4), "target must be None .there is no encoder. for Mixtral 8x7B, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
