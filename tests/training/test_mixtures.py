"""Training a model with experts: the loss that is minimised, the figures in the metrics, the biases, resuming."""

import copy
import json

import pytest
import torch
from torch.nn import functional as F

from minillm.models import MoEConfig, Transformer, TransformerConfig
from minillm.training import Trainer, TrainingConfig
from minillm.training.loss import accumulate_gradients
from minillm.training.mixtures import MixtureTraining


class Batches:
    """Random batches of different sizes; only as many as a Trainer asks for."""

    n_tokens, n_bytes = 100, 100

    def __init__(self, sizes=((3, 8), (2, 5))) -> None:
        self.sizes, self.count = sizes, 0

    def next_batch(self):
        generator = torch.Generator().manual_seed(self.count)
        shape = self.sizes[self.count % len(self.sizes)]
        self.count += 1
        return tuple(torch.randint(0, 19, (2, *shape), generator=generator))

    def evaluation_batches(self, max_batches=None):
        yield tuple(torch.randint(0, 19, (2, 2, 8), generator=torch.Generator().manual_seed(99)))

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def _model(moe: MoEConfig | None, **changes) -> Transformer:
    torch.manual_seed(3)
    small = {"vocab_size": 19, "context_length": 8, "d_model": 16, "n_layers": 2, "n_heads": 2, "initializer_std": 0.3}
    return Transformer(TransformerConfig(**(small | {"moe": moe} | changes)))


def _settings(**changes) -> TrainingConfig:
    return TrainingConfig(**({"max_steps": 4, "log_every": 2, "eval_every": None, "device": "cpu"} | changes))


def test_what_is_minimised_is_the_loss_and_the_experts_losses_weighed_by_tokens():
    model = _model(MoEConfig(4, 2, balance_loss=0.5, z_loss=0.1)).double()
    batches = [Batches().next_batch(), Batches(((2, 5),)).next_batch()]
    mixtures = MixtureTraining(model, model)
    loss, n_targets = accumulate_gradients(mixtures.forward, batches, torch.device("cpu"))
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    cross_entropy = router = 0.0
    for inputs, targets in batches:
        logits, records = model(inputs, return_records=True)
        weight = targets.numel() / n_targets
        cross_entropy = cross_entropy + weight * F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        router = router + weight * sum(record.losses["balance"] + record.losses["z"] for record in records)
    (cross_entropy + router).backward()
    torch.testing.assert_close(loss.double(), cross_entropy, atol=1e-6, rtol=0)  # reported without
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    assert router > 0.1


def test_metrics_tell_of_the_experts_and_only_where_there_are_some(tmp_path):
    trainer = Trainer(
        _model(MoEConfig(4, 1, router="switch", capacity_factor=0.5)),
        Batches(),
        Batches(),
        _settings(),
        folder=tmp_path,
    )
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert 0.015 < line["router_loss"] <= 0.08  # about 0.01 a layer when balanced, 0.04 when one expert has all
        assert 1.0 <= line["max_over_mean"] <= 4.0
        assert line["tokens_without_expert"] == pytest.approx(
            line["drop_rate"], abs=0.3
        )  # of the worst layer, of both layers
        assert 0.2 <= line["drop_rate"] < 0.9  # a half and more, but room is rounded up
    dense = Trainer(_model(None), Batches(), Batches(), _settings(), progress=False)
    dense.train()
    assert not {"router_loss", "max_over_mean", "drop_rate", "tokens_without_expert"} & set(dense.history[-1])


def test_tokens_that_nobody_chose_are_told():
    model = _model(MoEConfig(4, 1, router="expert_choice"))
    mixtures = MixtureTraining(model, model)
    mixtures.forward(Batches().next_batch()[0])
    records = model(Batches().next_batch()[0], return_records=True)[1]
    expected = max(1 - len(set(record.routing.tokens.tolist())) / 24 for record in records)
    figures = mixtures.read()
    assert figures["drop_rate"] == 0.0
    assert figures["tokens_without_expert"] == pytest.approx(expected)
    assert expected > 0


def test_layers_of_different_sizes_and_shared_layers():
    model = _model(MoEConfig(4, 2, router="sigmoid"))
    model.blocks[1].feed_forward = MoEConfig(3, 1, router="switch").layer(16, 8, activation="gelu", bias=False)
    mixtures = MixtureTraining(model, model)
    mixtures.forward(Batches().next_batch()[0])
    assert mixtures.read()["max_over_mean"] >= 1.0

    model = _model(MoEConfig(4, 2, router="sigmoid", router_options={"bias_rate": 0.5}))
    model.blocks[1].feed_forward = model.blocks[0].feed_forward  # one layer in two places: one update by both loads
    mixtures = MixtureTraining(model, model)
    tokens = Batches().next_batch()[0]
    load = sum(record.routing.assigned for record in model(tokens, return_records=True)[1])
    mixtures.forward(tokens)
    mixtures.after_update()
    torch.testing.assert_close(model.mixtures()[0].router.bias, 0.5 * (load.float().mean() - load).sign())


def test_experts_that_the_trainer_cannot_see_are_said():
    wrapped = torch.nn.Sequential(_model(MoEConfig(4, 2)))
    with pytest.warns(UserWarning, match="2 layers of experts train without their losses and biases"):
        Trainer(wrapped, Batches(), None, _settings(), progress=False)


def test_biases_move_once_an_update_by_the_load_of_all_its_batches():
    model = _model(MoEConfig(4, 2, router="sigmoid"))
    before = copy.deepcopy(model)
    trainer = Trainer(model, Batches(), None, _settings(max_steps=1, gradient_accumulation_steps=2), progress=False)
    trainer.train()
    loads = [torch.zeros(4, dtype=torch.int64) for _ in range(2)]
    data = Batches()
    for _ in range(2):
        records = before(data.next_batch()[0], return_records=True)[1]
        loads = [load + record.routing.assigned for load, record in zip(loads, records, strict=True)]
    for mixture, load in zip(model.mixtures(), loads, strict=True):
        expected = 0.001 * (load.float().mean() - load).sign()
        torch.testing.assert_close(mixture.router.bias, expected)
        assert expected.any()
    assert not any(mixture.router.bias.any() for mixture in before.mixtures())


def _stop_at(calls, number):
    calls.append(None)
    if len(calls) == number:
        raise RuntimeError("stopped here")


@pytest.mark.parametrize("moe", [MoEConfig(4, 2, router="sigmoid"), MoEConfig(4, 2, router="noisy_top_k")])
@pytest.mark.parametrize("same_trainer", [True, False])
def test_a_run_that_was_stopped_in_a_step_ends_as_if_it_had_not_been(moe, same_trainer, tmp_path):
    settings = _settings(max_steps=6, checkpoint_every=3, gradient_accumulation_steps=2)
    whole = _model(moe)
    Trainer(whole, Batches(), None, settings, folder=tmp_path / "whole", progress=False).train()
    broken = Trainer(_model(moe), Batches(), None, settings, folder=tmp_path / "parts", progress=False)
    calls = []
    hook = broken.model.register_forward_pre_hook(lambda module, inputs: _stop_at(calls, 10))
    with pytest.raises(RuntimeError, match="stopped here"):
        broken.train()
    if same_trainer:
        hook.remove()
        model = broken.model
        broken.train()
    else:
        model = _model(moe)
        Trainer(model, Batches(), None, settings, folder=tmp_path / "parts", progress=False).train()
    figures = [
        [
            line["max_over_mean"]
            for line in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        ]
        for name in ("whole", "parts")
    ]
    assert figures[0] == figures[1]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


# Both are about what torch's compiler does itself, where a graph breaks and goes on.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*instantiated:DeprecationWarning")
def test_a_compiled_model_gives_the_same_losses():
    model = _model(MoEConfig(4, 2), n_layers=1)
    compiled = MixtureTraining(model, torch.compile(model, backend="eager"))
    tokens = Batches().next_batch()[0]
    logits, added = compiled.forward(tokens)
    expected, records = model(tokens, return_records=True)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(added, records[0].losses["balance"])
    assert compiled.read()["max_over_mean"] >= 1.0
    assert compiled.read() == {}
