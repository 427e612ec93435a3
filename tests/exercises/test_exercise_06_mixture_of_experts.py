"""Exercise 06: wrong answers that students may well give, right ones of other kinds; transformers as the oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM, MixtralSparseMoeBlock
from transformers.models.switch_transformers.configuration_switch_transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
    load_balancing_loss_func,
)

from minillm.exercises.folder import find_exercise
from minillm.exercises.testing import ExerciseTests, solution_names

GATES = """
def top_k_gates(logits, k):
    {before}
    ordered, experts = {order}
    return {experts}, {weights}
"""
GATED = {
    "before": "logits = logits.to(torch.promote_types(logits.dtype, torch.float32))",
    "order": "logits.sort(dim=-1, descending=True, stable=True)",
    "experts": "experts[:, :k]",
    "weights": "ordered[:, :k].softmax(-1)",
}


def gates(**changes: str) -> str:
    """Part 6.1's answer with some of its places filled in otherwise."""
    return GATES.format(**GATED | changes)


LOSS = """
def switch_loss(probabilities, experts):
    t, n = probabilities.shape
    f = {f}
    p = {p}
    return {loss}

def switch_loss_gradient(probabilities, experts):
    t, n = probabilities.shape
    f = torch.bincount(experts.flatten(), minlength=n) / experts.numel()
    p = probabilities
    return {gradient}
"""
LOSSES = {
    "f": "torch.bincount(experts.flatten(), minlength=n) / experts.numel()",
    "p": "probabilities.mean(0)",
    "loss": "n * (f * p).sum()",
    "gradient": "n / t * p * (f - (f * p).sum(1, keepdim=True))",
}


def loss(**changes: str) -> str:
    """Part 6.2's answer with some of its places filled in otherwise."""
    return LOSS.format(**LOSSES | changes)


QUEUE = """
def expert_capacity(n_tokens, n_experts, k, factor):
    return {capacity}

def places(experts, n_experts):
    flat = {flat}
    member = F.one_hot(flat, n_experts)
    before = {before}
    return {places}

def drops(experts, n_experts, capacity):
    kept = {kept}
    return {out}
"""
QUEUED = {
    "capacity": "math.ceil(factor * k * n_tokens / n_experts)",
    "flat": "experts.T.reshape(-1)",
    "before": "(member.cumsum(0) - member).gather(1, flat[:, None])",
    "places": "before.reshape(experts.T.shape).T",
    "kept": "places(experts, n_experts) < capacity",
    "out": "kept, torch.bincount(experts[~kept], minlength=n_experts)",
}


def queue(**changes: str) -> str:
    """Part 6.3's answer with some of its places filled in otherwise."""
    return QUEUE.format(**QUEUED | changes)


MIXTURE = """
def mixture(x, experts, weights, kept, networks):
    {before}
    out = torch.zeros_like(x)
    for i, network in enumerate(networks):
        token, choice = ({own}).nonzero(as_tuple=True)
        if len(token):
            w = weights[token, choice, None]
            rows = {rows}
            {add}
    return {out}
"""
MIXED = {
    "before": "",
    "own": "(experts == i) & kept",
    "rows": "network(x[token]) * w",
    "add": "out = out.index_add(0, token, rows.to(x.dtype))",
    "out": "out",
}


def mix(**changes: str) -> str:
    """Part 6.4's answer, expert by expert, with some of its places filled in otherwise."""
    return MIXTURE.format(**MIXED | changes)


SORTED = """
def mixture(x, experts, weights, kept, networks):
    token, choice = kept.nonzero(as_tuple=True)
    order = experts[token, choice].argsort(stable=True)
    token, choice = {token}
    sizes = torch.bincount(experts[kept], minlength=len(networks)).tolist()
    rows = torch.cat([f(a) for f, a in zip(networks, x[token].split(sizes)) if len(a)] + [x[:0]])
    rows = (rows * weights[{weights}].unsqueeze(1)).to(x.dtype)
    out = torch.zeros_like(x)
    {add}
    return out
"""
SORTS = {
    "token": "token[order], choice[order]",
    "weights": "token, choice",
    "add": "out = out.index_add(0, token, rows)",
}


def sort(**changes: str) -> str:
    """Part 6.4's answer by sorting, with some of its places filled in otherwise."""
    return SORTED.format(**SORTS | changes)


COUNT = """
def count(m, n):
    d = m.d_model
    expert = {expert}
    mixture = {mixture}
    attention = {attention}
    dense = {dense}
    return {tables} * m.vocab_size * d + m.n_layers * (attention + {norms}) + {layers} + {last}

def total_parameters(model):
    return {total}

def active_parameters(model):
    return {active}

def flops_per_token(model):
    m, d = model, model.d_model
    norms = (2 * m.n_layers + 1) * d
    table = m.vocab_size * d
    return {flops}
"""
COUNTED = {
    "expert": "m.expert_matrices * d * m.expert_d_ff",
    "mixture": "(n + m.n_shared) * expert + m.n_experts * d",
    "attention": "2 * d * m.head_dim * (m.n_heads + m.n_kv_heads)",
    "dense": "m.dense_matrices * d * m.dense_d_ff",
    "tables": "(2 - m.tied)",
    "norms": "2 * d",
    "layers": "(m.n_layers - m.dense_layers) * mixture + m.dense_layers * dense",
    "last": "d",
    "total": "count(model, model.n_experts)",
    "active": "count(model, model.k)",
    "flops": "2 * (active_parameters(m) - norms - (0 if m.tied else table))",
}


def counting(**changes: str) -> str:
    """Part 6.5's answer with some of its places filled in otherwise."""
    return COUNT.format(**COUNTED | changes)


BIAS = """
def biased_choice(logits, bias, k):
    scores = {scores}
    experts = {experts}
    chosen = {chosen}
    return experts, {weights}

def moved_bias(bias, experts, rate):
    loads = {loads}
    mean = {mean}
    return {moved}
"""
BIASED = {
    "scores": "logits.sigmoid()",
    "experts": "(scores + bias).topk(k, dim=-1).indices",
    "chosen": "scores.gather(1, experts)",
    "weights": "chosen / chosen.sum(1, keepdim=True)",
    "loads": "torch.bincount(experts.flatten(), minlength=len(bias))",
    "mean": "experts.numel() / len(bias)",
    "moved": "bias + rate * torch.sign(mean - loads)",
}


def bias(**changes: str) -> str:
    """Part 6.6's answer with some of its places filled in otherwise."""
    return BIAS.format(**BIASED | changes)


LAYER = """
def switch_layer(x, router, networks, *, capacity_factor, coefficient=0.01):
    tokens = {tokens}
    n = len(networks)
    p = ({logits}).softmax(-1)
    experts = {experts}
    weights = {weights}
    capacity = {capacity}
    kept, dropped = drops(experts, n, capacity)
    y = {y}
    loss = {loss}
    return {output}, loss, {dropped}
"""
LAYERED = {
    "tokens": "x.reshape(-1, x.shape[-1])",
    "logits": "tokens.to(torch.promote_types(x.dtype, torch.float32)) "
    "@ router.to(torch.promote_types(x.dtype, torch.float32)).T",
    "experts": "top_k_gates(p, 1)[0]",
    "weights": "p.gather(1, experts)",
    "capacity": "expert_capacity(len(tokens), n, 1, capacity_factor)",
    "y": "mixture(tokens, experts, weights, kept, networks)",
    "loss": "coefficient * switch_loss(p, experts)",
    "output": "x + y.reshape(x.shape)",
    "dropped": "dropped.sum().item()",
}


def layer(**changes: str) -> str:
    """Part 6.7's answer with some of its places filled in otherwise."""
    return LAYER.format(**LAYERED | changes)


RIGHT = {
    "less the logarithm of the sum": (
        "6.1",
        gates(weights="(a := ordered[:, :k]).sub(a.logsumexp(1, keepdim=True)).exp()"),
    ),
    "a fraction in float32": (
        "6.2",
        loss(f="torch.bincount(experts.flatten(), minlength=n) / torch.tensor(float(experts.numel()))"),
    ),
    "row by row, in lists": (
        "6.6",
        """
def biased_choice(logits, bias, k):
    e, w = [], []
    for row in logits:
        s = 1 / (1 + torch.exp(-row))
        best = sorted(range(len(s)), key=lambda i: -(s[i] + bias[i]).item())[:k]
        e.append(best)
        w.append(torch.stack([s[i] for i in best]) / sum(s[i] for i in best))
    return torch.tensor(e), torch.stack(w)

def moved_bias(bias, experts, rate):
    load = torch.bincount(experts.flatten(), minlength=len(bias))
    return bias - rate * torch.sign(load * len(bias) - experts.numel())
""",
    ),
    "softmax over all, then divided": (
        "6.1",
        """
def top_k_gates(logits, k):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    experts = torch.argsort(logits, dim=1, descending=True, stable=True)[:, :k]
    every = torch.softmax(logits.to(dtype), 1) + 1e-30
    chosen = torch.gather(every, 1, experts)
    return experts, chosen / chosen.sum(dim=1, keepdim=True)
""".replace(
            "torch.softmax(logits.to(dtype), 1) + 1e-30",
            "torch.softmax(logits.to(dtype), 1)",
        ),
    ),
    "all others at -inf": (
        "6.1",
        """
def top_k_gates(logits, k):
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    experts = (-logits).argsort(dim=-1, stable=True)[:, :k]
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, experts, True)
    return experts, F.softmax(logits.masked_fill(~chosen, -math.inf), dim=-1).gather(1, experts)
""",
    ),
    "the largest, k times": (
        "6.1",
        """
def top_k_gates(logits, k):
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    experts, picked = [], []
    for row in logits:
        left = sorted(range(len(row)), key=lambda i: (-row[i].item(), i))[:k]
        experts.append(left)
        e = torch.exp(row[left] - row[left[0]])
        picked.append(e / e.sum())
    if not experts:
        return torch.zeros(0, k, dtype=torch.int64), logits[:, :k]
    return torch.tensor(experts), torch.stack(picked)
""",
    ),
    "argmax, k times": (
        "6.1",
        """
def top_k_gates(logits, k):
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    left, experts = logits.detach().clone(), []
    for _ in range(k):
        best = (left == left.amax(1, keepdim=True)).int().argmax(1)
        experts.append(best)
        left = left.scatter(1, best[:, None], -math.inf)
    experts = torch.stack(experts, 1)
    return experts, logits.gather(1, experts).softmax(1)
""",
    ),
    "loops": (
        "6.2",
        """
def switch_loss(probabilities, experts):
    n = probabilities.size(1)
    flat = experts.reshape(-1).tolist()
    total = 0
    for i in range(n):
        total = total + flat.count(i) / len(flat) * probabilities[:, i].sum() / len(probabilities)
    return total * n

def switch_loss_gradient(probabilities, experts):
    t, n = probabilities.shape
    flat = experts.reshape(-1).tolist()
    f = [flat.count(i) / len(flat) for i in range(n)]
    out = torch.zeros_like(probabilities)
    for row in range(t):
        for i in range(n):
            for j in range(n):
                p_i, p_j = probabilities[row, i], probabilities[row, j]
                out[row, i] += n * f[j] / t * p_j * (float(i == j) - p_i)
    return out
""",
    ),
    "one-hot and einsum": (
        "6.2",
        """
def switch_loss(probabilities, experts):
    mask = F.one_hot(experts, probabilities.shape[-1]).to(probabilities.dtype)
    density = mask.mean(dim=(0, 1))
    return torch.einsum("i,ti->", density, probabilities) / len(probabilities) * probabilities.shape[-1]

def switch_loss_gradient(probabilities, experts):
    t, n = probabilities.shape
    f = F.one_hot(experts, n).double().mean(dim=(0, 1))
    p = probabilities.double()
    jacobian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("tij,j->ti", jacobian, f) * n / t
""",
    ),
    "the mean of products, n squared times": (
        "6.2",
        loss(loss="(f * p).mean() * n**2", gradient="p * (f - (p @ f.to(p.dtype))[:, None]) * n / t"),
    ),
    "scatter_add": (
        "6.2",
        loss(
            f="torch.zeros(n, dtype=probabilities.dtype).scatter_add(0, experts.flatten(), "
            "torch.ones(experts.numel(), dtype=probabilities.dtype)) / experts.numel()"
        ),
    ),
    "a list of arrivals": (
        "6.3",
        """
def expert_capacity(n_tokens, n_experts, k, factor):
    exact = factor * (k * n_tokens / n_experts)
    return int(exact) + (exact > int(exact))

def places(experts, n_experts):
    seen = [0] * n_experts
    out = torch.empty_like(experts)
    for c in range(experts.shape[1]):
        for t in range(experts.shape[0]):
            i = int(experts[t, c])
            out[t, c] = seen[i]
            seen[i] += 1
    return out

def drops(experts, n_experts, capacity):
    kept = places(experts, n_experts).lt(capacity)
    return kept, torch.tensor([int(((experts == i) & ~kept).sum()) for i in range(n_experts)])
""",
    ),
    "by sorting": (
        "6.3",
        """
def expert_capacity(n_tokens, n_experts, k, factor):
    return -int(-(factor * k * n_tokens) // n_experts)

def places(experts, n_experts):
    flat = experts.T.flatten()
    order = flat.argsort(stable=True)
    loads = torch.bincount(flat, minlength=n_experts)
    starts = loads.cumsum(0) - loads
    out = torch.empty_like(flat)
    out[order] = torch.arange(len(flat)) - starts[flat[order]]
    return out.view(experts.shape[1], -1).T

def drops(experts, n_experts, capacity):
    loads = torch.bincount(experts.flatten(), minlength=n_experts)
    return places(experts, n_experts) + 1 <= capacity, (loads - capacity).clamp(min=0)
""",
    ),
    "choice by choice, as GShard has it": (
        "6.3",
        """
def expert_capacity(n_tokens, n_experts, k, factor):
    return math.ceil(n_tokens * k / n_experts * factor)

def places(experts, n_experts):
    out, before = [], torch.zeros(n_experts, dtype=torch.int64)
    for column in experts.unbind(1):
        mask = F.one_hot(column, n_experts)
        out.append(((mask.cumsum(0) - 1 + before) * mask).sum(1))
        before = before + mask.sum(0)
    return torch.stack(out, 1)

def drops(experts, n_experts, capacity):
    kept = places(experts, n_experts) < capacity
    gone = F.one_hot(experts, n_experts) * ~kept[..., None]
    return kept, gone.sum((0, 1))
""",
    ),
    "expert by expert": ("6.4", mix()),
    "experts without tokens are called too": ("6.4", mix().replace("if len(token):", "if True:")),
    "sorted": ("6.4", sort()),
    "sorted and put back choice by choice": (
        "6.4",
        """
def mixture(x, experts, weights, kept, networks):
    flat = torch.where(kept, experts, len(networks)).flatten()
    order = flat.argsort(stable=True)
    rows = x.repeat_interleave(experts.shape[1], 0)[order]
    answers = torch.zeros_like(rows)
    start = 0
    for i, network in enumerate(networks):
        count = int((flat == i).sum())
        if count:
            answers = torch.cat((answers[:start], network(rows[start:start + count]), answers[start + count:]))
        start += count
    back = answers[order.argsort()].view(*experts.shape, x.shape[1])
    return torch.einsum("tkd,tk->td", back, (weights * kept).to(x.dtype))
""",
    ),
    "one-hot matrices": (
        "6.4",
        """
def mixture(x, experts, weights, kept, networks):
    out = torch.zeros_like(x)
    for i, network in enumerate(networks):
        dense = (weights * kept * (experts == i)).sum(1)
        own = ((experts == i) & kept).any(1)
        dispatch = torch.eye(len(x), dtype=x.dtype)[own]
        out = out + (dispatch * dense.to(x.dtype)).T @ network(dispatch @ x)
    return out
""",
    ),
    "index_put that accumulates": ("6.4", mix(add="out = out.index_put((token,), rows.to(x.dtype), accumulate=True)")),
    "out[token] for one expert at a time": ("6.4", mix(add="out[token] += rows.to(x.dtype)")),
    "matrix by matrix": (
        "6.5",
        """
def total_parameters(model):
    return everything(model, model.n_experts)

def active_parameters(model):
    return everything(model, model.k)

def matrices(m, n):
    out = [(m.d_model, m.vocab_size)]
    for i in range(m.n_layers):
        out += [(m.d_model, m.n_heads * m.head_dim)] * 2 + [(m.d_model, m.n_kv_heads * m.head_dim)] * 2
        if i < m.dense_layers:
            out += [(m.d_model, m.dense_d_ff)] * m.dense_matrices
        else:
            out += [(m.d_model, m.expert_d_ff)] * m.expert_matrices * (n + m.n_shared) + [(m.d_model, m.n_experts)]
    return sum(a * b for a, b in out)

def everything(m, n):
    return matrices(m, n) + (not m.tied) * m.vocab_size * m.d_model + (2 * m.n_layers + 1) * m.d_model

def flops_per_token(model):
    return 2 * matrices(model, model.k)
""",
    ),
    "with the number of experts as an argument": (
        "6.5",
        counting(),
    ),
    "a loop over tokens and a sort": (
        "6.6",
        """
def biased_choice(logits, bias, k):
    scores = 1 / (1 + torch.exp(-logits))
    experts = torch.argsort(scores + bias, dim=1, descending=True)[:, :k]
    weights = torch.stack([row[one] / row[one].sum() for row, one in zip(scores, experts)])
    return experts, weights

def moved_bias(bias, experts, rate):
    out = bias.clone()
    flat = experts.flatten().tolist()
    for i in range(len(bias)):
        if flat.count(i) * len(bias) > len(flat):
            out[i] -= rate
        elif flat.count(i) * len(bias) < len(flat):
            out[i] += rate
    return out
""",
    ),
    "the bias in float32, a tiny epsilon": (
        "6.6",
        bias(
            weights="chosen / (chosen.sum(1, keepdim=True) + 1e-20)",
            moved="bias + rate * ((loads < mean).to(bias) - (loads > mean).to(bias))",
        ),
    ),
    "everything in one": (
        "6.7",
        """
def switch_layer(x, router, networks, *, capacity_factor, coefficient=0.01):
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    flat = x.flatten(0, 1)
    probabilities = torch.softmax(torch.einsum("td,nd->tn", flat.to(exact), router.to(exact)), -1)
    gate, expert = probabilities.max(-1)
    n = len(networks)
    mask = F.one_hot(expert, n)
    loss = n * (mask.to(exact).mean(0) * probabilities.mean(0)).sum() * coefficient
    mask = mask * (mask.cumsum(0) <= math.ceil(capacity_factor * len(flat) / n))
    out = flat.clone()
    for i, network in enumerate(networks):
        own = mask[:, i].nonzero()[:, 0]
        if own.numel():
            out = out.index_add(0, own, (gate[own, None] * network(flat[own])).to(x.dtype))
    return out.view_as(x), loss, len(flat) - int(mask.sum())
""",
    ),
    "from its parts": ("6.7", layer()),
}


class TestExercise06(ExerciseTests):
    exercise = "06"
    right_answers = RIGHT
    wrong_answers = {  # noqa: RUF012
        "6.1": {
            "minillm's own": (
                "from minillm.layers.routers import TopKRouter\n\ndef top_k_gates(logits, k):\n"
                "    r = TopKRouter(4, logits.shape[1], k).route(logits, logits)\n    return r.experts, r.weights",
                "uses minillm.layers.routers.TopKRouter",
            ),
            "not renormalised": (
                gates(weights="logits.softmax(-1).gather(1, experts[:, :k])"),
                "shares among all experts",
            ),
            "a softmax of a softmax": (
                gates(before="logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)"),
                "you take the softmax of a softmax",
            ),
            "the smallest": (
                gates(order="logits.sort(dim=-1, stable=True)", weights="(-ordered[:, :k]).softmax(-1)"),
                "you take the smallest logits",
            ),
            "the best last": (
                gates(experts="experts[:, :k].flip(1)", weights="ordered[:, :k].flip(1).softmax(-1)"),
                "the best choice comes first",
            ),
            "weights in the opposite order": (
                gates(weights="ordered[:, :k].softmax(-1).flip(1)"),
                "in the opposite order of the experts",
            ),
            "topk": (gates(order="logits.topk(k, dim=-1)"), "of equal logits the lower number comes first"),
            "all that reach the k-th logit": (
                gates(
                    weights="logits.masked_fill(logits < ordered[:, k - 1 : k], -math.inf).softmax(-1)"
                    ".gather(1, experts[:, :k])"
                ),
                "an equal logit that is not chosen takes part",
            ),
            "ties broken by a little": (
                gates(order="(logits - 1e-6 * torch.arange(logits.shape[1])).sort(dim=-1, descending=True)"),
                "expert 1 is the best, however close",
            ),
            "sorted upwards and flipped": (
                gates(order="(a.flip(1) for a in logits.sort(dim=-1, stable=True))"),
                "of equal logits the lower number comes first",
            ),
            "logits divided by their sum": (
                gates(weights="ordered[:, :k] / ordered[:, :k].sum(1, keepdim=True)"),
                "without exponentials",
            ),
            "equal weights": (gates(weights="torch.ones_like(ordered[:, :k]) / k"), "all get the same weight"),
            "sigmoid": (gates(weights="ordered[:, :k].sigmoid()"), "a sigmoid is no softmax"),
            "over the tokens": (gates(weights="ordered[:, :k].softmax(0)"), "goes over the tokens (dim 0)"),
            "over tokens and choices": (
                gates(weights="ordered[:, :k].flatten().softmax(0).reshape(-1, k)"),
                "the softmax goes over experts, not over tokens",
            ),
            "exponentials that overflow": (
                gates(weights="ordered[:, :k].exp() / ordered[:, :k].exp().sum(1, keepdim=True)"),
                "an exponential overflows",
            ),
            "exponentials that vanish": (
                gates(
                    weights="ordered[:, :k].sub(ordered[:, :1].clamp(min=0)).exp() "
                    "/ ordered[:, :k].sub(ordered[:, :1].clamp(min=0)).exp().sum(1, keepdim=True)"
                ),
                "all exponentials are 0",
            ),
            "detached": (gates(weights="ordered[:, :k].detach().softmax(-1)"), "no gradient reaches the logits"),
            "the sum detached": (
                gates(weights="(a := (ordered - ordered[:, :1]).exp()[:, :k]) / a.sum(1, keepdim=True).detach()"),
                "is a part of the softmax detached?",
            ),
            "in bfloat16": (
                gates(before="pass", weights="ordered[:, :k].softmax(-1)"),
                "yours are torch.bfloat16",
            ),
            "in bfloat16, widened at the end": (
                gates(
                    before="pass",
                    weights="ordered[:, :k].softmax(-1).to(torch.promote_types(logits.dtype, torch.float32))",
                ),
                "go to float32 before the softmax",
            ),
            "always float32": (gates(before="logits = logits.float()"), "give weights in torch.float64"),
            "all experts": (
                gates(experts="experts", weights="logits.softmax(-1)"),
                "those of the chosen experts only",
            ),
            "the other way round": (
                gates(experts=GATED["weights"], weights=GATED["experts"]),
                "yours are the other way round",
            ),
            "experts as floats": (gates(experts="experts[:, :k].float()"), "expert numbers are int64"),
            "in place": (gates(before="logits -= logits.amax(1, keepdim=True)"), "changes the logits"),
            "chosen by probabilities in float32": (
                gates(
                    order="logits.softmax(-1).sort(dim=-1, descending=True, stable=True)",
                    weights="ordered[:, :k] / ordered[:, :k].sum(1, keepdim=True)",
                ),
                "so choose by the logits",
            ),
            "an unstable sort": (gates(order="logits.sort(dim=-1, descending=True)"), "17 equal logits with k=3"),
            "the largest logit of all tokens taken off": (
                gates(weights="(a := (ordered[:, :k] - ordered.max()).exp()) / a.sum(1, keepdim=True)"),
                "instead of each token's own",
            ),
            "a softmax in float32 for float64": (
                gates(weights="ordered[:, :k].float().softmax(-1).to(ordered.dtype)"),
                "is something worked out in float32",
            ),
            "a little in the sum": (
                gates(weights="(a := (ordered - ordered[:, :1]).exp()[:, :k]) / (a.sum(1, keepdim=True) + 1e-9)"),
                "a small number added to the sum",
            ),
            "float16 stays float16": (
                gates(before="logits = logits.float() if logits.dtype == torch.bfloat16 else logits"),
                "yours are torch.float16",
            ),
            "differences cut off": (
                gates(weights="(a := (ordered - ordered[:, :1]).clamp(min=-20).exp()[:, :k]) / a.sum(1, keepdim=True)"),
                "the logits 0 and -30",
            ),
            "ties broken by very little": (
                gates(
                    order="(logits.double() - 1e-10 * torch.arange(logits.shape[1])).topk(k, dim=1)",
                    weights="logits.gather(1, experts).softmax(1)",
                ),
                "in float64 are not equal",
            ),
            "in order of their numbers": (
                gates(experts="experts[:, :k].sort(1).values", weights="logits.gather(1, experts[:, :k]).softmax(1)"),
                "they stand in the order of their numbers",
            ),
            "no tokens": (
                """
def top_k_gates(logits, k):
    logits = logits if logits.dtype == torch.float64 else logits.float()
    best = [sorted(range(logits.shape[1]), key=lambda i: (-row[i], i))[:k] for row in logits.tolist()]
    return torch.tensor(best), torch.stack([row[one].softmax(0) for row, one in zip(logits, best)])
""",
                "there may be no tokens",
            ),
            "the check's own": (
                """
def top_k_gates(logits, k):
    chosen = torch.tensor([brute_6_1(row, k)[0] for row in logits.tolist()])
    return chosen, logits.gather(1, chosen).softmax(1)
""",
                "uses brute_6_1",
            ),
            "one only": (gates(experts="experts[:, :1]", weights="ordered[:, :1].softmax(-1)"), "(tokens, k)"),
        },
        "6.2": {
            "autograd": (
                loss() + "\nprint(torch.autograd.grad)\n",
                "uses",
            ),
            "without n_experts": (loss(loss="(f * p).sum()"), "is it multiplied by n_experts"),
            "a mean of products": (loss(loss="n * (f * p).mean()"), "is it multiplied by n_experts"),
            "n_experts twice": (loss(loss="n**2 * (f * p).sum()"), "n_experts is in it once too often"),
            "loads instead of fractions": (
                loss(f="torch.bincount(experts.flatten(), minlength=n)"),
                "one of yours is a count or a sum",
            ),
            "a sum of probabilities": (loss(p="probabilities.sum(0)"), "one of yours is a count or a sum"),
            "counts and sums": (
                loss(f="torch.bincount(experts.flatten(), minlength=n)", p="probabilities.sum(0)"),
                "yours are a count and a sum",
            ),
            "probabilities twice": (loss(f="probabilities.mean(0)"), "yours is made of the probabilities, like P"),
            "token by token": (
                loss(loss="n * (F.one_hot(experts, n).sum(1) * probabilities).sum(1).mean() / experts.shape[1]"),
                "yours multiplies token by token",
            ),
            "its own choice": (
                loss(f="F.one_hot(probabilities.argmax(1), n).float().mean(0)"),
                "yours takes the largest probability of each token",
            ),
            "the first choice only": (
                loss(f="torch.bincount(experts[:, 0], minlength=n) / t"),
                "yours counts the first ones only",
            ),
            "of the tokens": (
                loss(f="torch.bincount(experts.flatten(), minlength=n) / t"),
                "tokens times k, not of the tokens",
            ),
            "without minlength": (
                loss(f="torch.bincount(experts.flatten()) / experts.numel()"),
                "fails where nobody chooses some expert",
            ),
            "detached": (loss(p="probabilities.mean(0).detach()"), "P must not be detached"),
            "the straight-through fraction": (
                loss(
                    f="(torch.bincount(experts.flatten(), minlength=n) / experts.numel()).to(probabilities) "
                    "+ probabilities.mean(0) - probabilities.mean(0).detach()"
                ),
                "only P is moved by it",
            ),
            "a mean over the experts": (loss(p="probabilities.mean(1)"), "P is a mean over the tokens (dim 0)"),
            "a number for each expert": (loss(loss="n * f * p"), "the loss is one number"),
            "a float": (loss(loss="(n * (f * p).sum()).item()"), "switch_loss returns a tensor"),
            "one subtracted": (loss(loss="n * (f * p).sum() - 1"), "the loss is 1 at an equal load; yours is"),
            "in the probabilities": (loss(gradient="(n / t * f).expand(t, n)"), "the gradient in the probabilities"),
            "one term of the softmax": (loss(gradient="n / t * p * f"), "one of the softmax's two terms"),
            "the diagonal of the softmax": (loss(gradient="n / t * f * p * (1 - p)"), "adds up to 0"),
            "less 1 / n": (loss(gradient="n / t * p * (f - 1 / n)"), "f is compared with 1 / n_experts"),
            "down instead of up": (
                loss(gradient="n / t * p * ((f * p).sum(1, keepdim=True) - f)"),
                "the sign is wrong",
            ),
            "not divided by the tokens": (
                loss(gradient="n * p * (f - (f * p).sum(1, keepdim=True))"),
                "too large by the number of tokens",
            ),
            "without n_experts in the gradient": (
                loss(gradient="p * (f - (f * p).sum(1, keepdim=True)) / t"),
                "too small by the factor n_experts",
            ),
            "f moves too": (
                loss(gradient="2 * n / t * p * (f - (f * p).sum(1, keepdim=True))"),
                "f is fixed, only P moves",
            ),
            "the mean over tokens of what they expect": (
                loss(gradient="n / t * p * (f - (f * p).sum(1).mean())"),
                "adds up to 0",
            ),
            "counts not flattened": (
                loss(f="torch.bincount(experts, minlength=n) / experts.numel()"),
                "bincount takes one dimension",
            ),
            "the mean of integers in the gradient": (
                loss(gradient="n / t * p * (f - (f * p).sum(1, keepdim=True)) + experts.mean()"),
                "switch_loss_gradient fails: torch takes no mean of integers",
            ),
            "the mean of integers": (loss(f="F.one_hot(experts.flatten(), n).mean(0)"), "no mean of integers"),
            "float32 times float64": (
                loss(f="torch.bincount(experts.flatten(), minlength=n).float() / experts.numel()", loss="n * f.dot(p)"),
                "a product of two dtypes",
            ),
            "an index of two dimensions": (
                loss(f="torch.zeros(n).index_add(0, experts, torch.ones(experts.shape)) / experts.numel()"),
                "the index must be a vector",
            ),
            "places that repeat": (
                loss(f="torch.zeros(n).index_put((experts.flatten(),), torch.tensor(1.0)) / experts.numel()"),
                "adds but once",
            ),
            "only those with tokens": (
                loss(f="experts.unique(return_counts=True)[1] / experts.numel()"),
                "0 for one that nobody chose",
            ),
            "the loss in float32": (loss(p="probabilities.float().mean(0)"), "your loss is only as exact as float32"),
            "the gradient in float32": (
                loss(gradient="(n / t * p * (f - (f * p).sum(1, keepdim=True))).float()"),
                "right to a few digits only",
            ),
            "differences of losses": (
                loss().split("def switch_loss_gradient")[0]
                + """
def switch_loss_gradient(probabilities, experts):
    n, logits = probabilities.shape[1], probabilities.log()
    f = F.one_hot(experts, n).double().mean((0, 1))
    out = torch.zeros_like(logits)
    for i in range(n):  # every token's own share of the loss
        d = 1e-6 * F.one_hot(torch.tensor(i), n)
        up, down = ((n * f * (logits + a).softmax(1)).sum(1) / len(logits) for a in (d, -d))
        out[:, i] = (up - down) / 2e-6
    return out
""",
                "like one from differences of losses",
            ),
            "probabilities in place": (
                loss(gradient="probabilities.mul_(n / t * (f - (f * p).sum(1, keepdim=True)))"),
                "switch_loss_gradient changes a tensor",
            ),
            "experts in place": (
                loss(gradient="n / t * p * (f - (f * p).sum(1, keepdim=True)) + 0 * experts.zero_().sum()"),
                "switch_loss_gradient changes a tensor",
            ),
            "torch's own derivative": (
                loss(gradient="torch.ops.aten._softmax_backward_data((n / t * f).expand(t, n).to(p), p, 1, p.dtype)"),
                "uses torch.ops",
            ),
            "a node of the graph": (loss(gradient="p.log().softmax(1).grad_fn(f)"), "uses grad_fn"),
            "the check's own": (loss(gradient="difference_6_2(p.log(), experts)"), "uses difference_6_2"),
            "one row for all": (
                loss(gradient="(n / t * p * (f - (f * p).sum(1, keepdim=True))).mean(0)"),
                "has the shape of the logits",
            ),
        },
        "6.3": {
            "rounded down": (queue(capacity="int(factor * k * n_tokens / n_experts)"), "round up"),
            "rounded": (queue(capacity="round(factor * k * n_tokens / n_experts)"), "round up"),
            "k forgotten": (queue(capacity="math.ceil(factor * n_tokens / n_experts)"), "a token has k assignments"),
            "nearly rounded up": (queue(capacity="int(factor * k * n_tokens / n_experts + 0.99)"), "round up"),
            "by an unstable sort": (
                """
def expert_capacity(n_tokens, n_experts, k, factor):
    return math.ceil(factor * k * n_tokens / n_experts)

def places(experts, n_experts):
    flat = experts.T.flatten()
    order = flat.argsort(stable=True).flip(0)
    order = order[flat[order].argsort(stable=True)]
    loads = torch.bincount(flat, minlength=n_experts)
    out = torch.empty_like(flat)
    out[order] = torch.arange(len(flat)) - (loads.cumsum(0) - loads)[flat[order]]
    return out.view(experts.shape[1], -1).T

def drops(experts, n_experts, capacity):
    kept = places(experts, n_experts) < capacity
    return kept, torch.bincount(experts[~kept], minlength=n_experts)
""",
                "who comes first has the lower place",
            ),
            "by a sort that is not stable": (
                queue(
                    before="torch.empty_like(flat).index_copy(0, order := flat.argsort(), torch.arange(len(flat)) - "
                    "(member.sum(0).cumsum(0) - member.sum(0))[flat[order]])"
                ),
                "is the sort stable?",
            ),
            "rounded up twice": (
                queue(capacity="math.ceil(factor * math.ceil(k * n_tokens / n_experts))"),
                "round up once, at the end",
            ),
            "one more": (queue(capacity="int(factor * k * n_tokens / n_experts) + 1"), "one share is 2 exactly"),
            "not rounded": (queue(capacity="factor * k * n_tokens / n_experts"), "a capacity is an int"),
            "factor forgotten": (queue(capacity="math.ceil(k * n_tokens / n_experts)"), "is the factor used?"),
            "at least four": (queue(capacity="max(4, " + QUEUED["capacity"] + ")"), "one share is 2 exactly"),
            "counted from 1": (
                queue(before="member.cumsum(0).gather(1, flat[:, None])"),
                "a place is what comes before, the first has 0",
            ),
            "token by token": (
                queue(flat="experts.reshape(-1)", places="before.reshape(experts.shape)"),
                "yours serves token by token",
            ),
            "a queue for each choice": (
                """
def expert_capacity(n_tokens, n_experts, k, factor):
    return math.ceil(factor * k * n_tokens / n_experts)

def places(experts, n_experts):
    member = F.one_hot(experts, n_experts)
    return ((member.cumsum(0) - 1) * member).sum(2)

def drops(experts, n_experts, capacity):
    kept = places(experts, n_experts) < capacity
    return kept, torch.bincount(experts[~kept], minlength=n_experts)
""",
                "an expert has one queue for all choices",
            ),
            "last come, first served": (
                queue(before="(member.flip(0).cumsum(0).flip(0) - member).gather(1, flat[:, None])"),
                "who comes first has the lower place",
            ),
            "second choices first": (
                queue(flat="experts.flip(1).T.reshape(-1)", places="before.reshape(experts.T.shape).T.flip(1)"),
                "first choices come before second ones",
            ),
            "back in the wrong shape": (
                queue(places="before.reshape(experts.shape)"),
                "shaped to (k, tokens) and transposed back",
            ),
            "flat": (queue(places="before.flatten()"), "there is a place for each assignment"),
            "one column for each expert": (
                queue(places="member.cumsum(0)"),
                "there is a place for each assignment",
            ),
            "as floats": (queue(places="before.reshape(experts.T.shape).T.float()"), "places are int64"),
            "the first pair only": (
                queue(
                    places="torch.tensor([[0, 1], [1, 0], [0, 2]]) if len(experts) == 3 else torch.zeros_like(experts)"
                ),
                "have the places 0, 1, 0, 2",
            ),
            "every pair compared": (
                queue(before="(flat[:, None] == flat).tril(-1).sum(1)"),
                "every assignment is compared with every other",
            ),
            "a capacity of all tokens at most": (
                queue(capacity="min(n_tokens, " + QUEUED["capacity"] + ")"),
                "the formula has no upper limit",
            ),
            "not divided by the experts": (
                queue(capacity="math.ceil(factor * k * n_tokens)"),
                "is one part in n_experts",
            ),
            "counted in bytes": (
                queue(before="(member.byte().cumsum(0, dtype=torch.uint8) - member).gather(1, flat[:, None])"),
                "a dtype that is too narrow",
            ),
            "counted in bfloat16": (
                queue(before="(member.bfloat16().cumsum(0) - member).long().gather(1, flat[:, None])"),
                "a dtype that is too narrow",
            ),
            "summed over the experts": (
                queue(before="(member.cumsum(1) - member).gather(1, flat[:, None])"),
                "do you count along the assignments",
            ),
            "every pair compared, a few rows at a time": (
                queue(
                    before="torch.cat([(flat == flat[i : i + 32, None]).tril(i - 1).sum(1) "
                    "for i in range(0, len(flat), 32)] + [flat[:0]])"
                ),
                "are made one after another",
            ),
            "no tokens": (queue().replace("F.one_hot(flat, n_experts)", "F.one_hot(flat)"), "there may be no tokens"),
            "one too many": (
                queue(kept="places(experts, n_experts) <= capacity"),
                "the assignment at place 2 is kept in yours",
            ),
            "who is dropped": (
                queue(out="~kept, torch.bincount(experts[~kept], minlength=n_experts)"),
                "yours says who is dropped",
            ),
            "who is kept is counted": (
                queue(out="kept, torch.bincount(experts[kept], minlength=n_experts)"),
                "yours counts what is kept",
            ),
            "without minlength": (
                queue(out="kept, torch.bincount(experts[~kept])"),
                "an int64 for each of the 3 experts",
            ),
            "a whole token is dropped": (
                queue(kept="(places(experts, n_experts) < capacity).all(1, keepdim=True).expand_as(experts)"),
                "drops token 2's second choice only",
            ),
            "a token is kept if any is": (
                queue(kept="(places(experts, n_experts) < capacity).any(1, keepdim=True).expand_as(experts)"),
                "the assignment at place 2 is kept in yours",
            ),
            "only what all experts lose": (
                queue(out="kept, (~kept).sum()"),
                "an int64 for each of the 3 experts",
            ),
            "an expert too full counts once": (
                queue(out="kept, torch.bincount(experts[~kept], minlength=n_experts).clamp(max=1)"),
                "nothing is lost silently",
            ),
            "dropped tokens instead of assignments": (
                queue(out="kept, F.one_hot(experts[:, 0], n_experts).mul(~kept.any(1)[:, None]).sum(0)"),
                "drops 1 assignment, at expert 0",
            ),
            "written into what was given": (
                queue(places="experts.copy_(before.reshape(experts.T.shape).T)"),
                "changes the tensor that it was given",
            ),
        },
        "6.4": {
            "without weights": (mix(rows="network(x[token])"), "the weights are not used"),
            "weights twice": (mix(rows="network(x[token]) * w * w"), "the weights are used twice"),
            "weights on the input": (
                mix(rows="network(x[token] * w)"),
                "the weight belongs to its answer",
            ),
            "divided by the sum of what is left": (
                mix(
                    before="weights = weights * kept; weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-9)"
                ),
                "or they are divided by their sum",
            ),
            "shared out anew after a drop": (
                mix(
                    before="total = weights.sum(1, keepdim=True)",
                    rows="network(x[token]) * w * (total / (weights * kept).sum(1, keepdim=True))[token]",
                ),
                "shared out anew",
            ),
            "a mean": (mix(out="out / experts.shape[1]"), "that is a mean"),
            "the last expert's answer only": (
                mix(add="out = out.index_copy(0, token, rows.to(x.dtype))"),
                "a token with two experts gets the answer of one only",
            ),
            "an index that repeats": (
                sort(add="out[token] += rows"),
                "adds but once for a token that stands in index twice",
            ),
            "left in the experts' order": (
                sort(add="out = torch.cat((rows, out))[:len(x)]"),
                "the right rows come back, but at the wrong tokens",
            ),
            "weights not brought into order": (
                SORTED.replace("order = ", "unsorted = token, choice\n    order = ").format(
                    **SORTS | {"weights": "unsorted"}
                ),
                "each times the weight of its own assignment",
            ),
            "weights of the other choice": (
                mix(before="weights = weights.flip(1)"),
                "the weight of the token's other choice",
            ),
            "dropped tokens run": (mix(own="experts == i"), "a dropped token is not to be worked on"),
            "dropped tokens run, their weights are 0": (
                mix(own="experts == i", before="weights = weights * kept"),
                "a dropped token is not to be worked on",
            ),
            "every expert on every token": (
                """
def mixture(x, experts, weights, kept, networks):
    out = torch.zeros_like(x)
    for i, network in enumerate(networks):
        w = (weights * kept * (experts == i)).sum(1, keepdim=True)
        out = out + w.to(x.dtype) * network(x)
    return out
""",
                "that is every token, run it on its own ones only",
            ),
            "zeros as padding": (
                mix(
                    rows="network(torch.cat((x[token], x.new_zeros(20 - len(token), x.shape[1]))))[:len(token)] * w",
                ),
                "leave out the padding",
            ),
            "masked instead of gathered": (
                """
def mixture(x, experts, weights, kept, networks):
    out = torch.zeros_like(x)
    for i, network in enumerate(networks):
        own = (experts == i) & kept
        w = (weights * own).sum(1, keepdim=True)
        out = out + w.to(x.dtype) * network(x * own.any(1, keepdim=True))
    return out
""",
                "that is every token",
            ),
            "token by token": (
                """
def mixture(x, experts, weights, kept, networks):
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for c in range(experts.shape[1]):
            if kept[t, c]:
                out[t] = out[t] + weights[t, c] * networks[experts[t, c]](x[t:t + 1])[0]
    return out
""",
                "gather all of its tokens first and call it once",
            ),
            "choice by choice": (
                """
def mixture(x, experts, weights, kept, networks):
    out = torch.zeros_like(x)
    for c in range(experts.shape[1]):
        for i, network in enumerate(networks):
            own = (experts[:, c] == i) & kept[:, c]
            if own.any():
                out[own] += (network(x[own]) * weights[own, c, None]).to(x.dtype)
    return out
""",
                "gather all of its tokens first and call it once",
            ),
            "single rows": (
                """
def mixture(x, experts, weights, kept, networks):
    return torch.stack([sum(weights[t, c] * networks[experts[t, c]](x[t]) for c in kept[t].nonzero()[:, 0]) for t in
                        range(len(x))])
""",
                "an expert takes (rows, d_model)",
            ),
            "dropped tokens pass": (
                mix(out="torch.where(kept.any(1, keepdim=True), out, x)"),
                "yours is passed through",
            ),
            "the residual is added": (mix(out="out + x"), "the token itself is added to its answers"),
            "dropped tokens are nan": (
                mix(out="torch.where(kept.any(1, keepdim=True), out, torch.nan)"),
                "a token dropped everywhere gets zeros; yours gets something else",
            ),
            "the first choice only": (mix(own="((experts == i) & kept)[:, :1]"), "tokens of its own and gets"),
            "another expert's tokens": (
                mix(rows="network(x[(token + 1) % len(x)]) * w"),
                "is given other rows than those of its own tokens",
            ),
            "detached": (mix(rows="network(x[token].detach()) * w"), "no gradient reaches x"),
            "weights detached": (mix(rows="network(x[token]) * w.detach()"), "no gradient reaches the weights"),
            "experts without gradients": (
                mix(rows="network(x[token]).detach() * w"),
                "but no gradient reaches",
            ),
            "everything detached": (mix(out="out.detach()"), "no gradient comes through mixture"),
            "the wider dtype": (
                mix(add="out = out + torch.zeros(x.shape, dtype=rows.dtype).index_add(0, token, rows)"),
                "x in bfloat16 gives an output in bfloat16",
            ),
            "dtypes that don't meet": (
                mix(add="out = out.index_add(0, token, rows)"),
                "bring the weighted answers to the dtype of x",
            ),
            "summed in float32": (
                mix(
                    before="out32 = torch.zeros(x.shape)",
                    add="out32 = out32.index_add(0, token, rows.float())",
                    out="out32.to(x.dtype)",
                ),
                "your output is only as exact as float32",
            ),
            "weighted in float32": (
                mix(rows="(network(x[token]) * w).float()"),
                "your output is only as exact as float32",
            ),
            "rows in float32": (
                mix(rows="network(x[token].to(w.dtype)) * w"),
                "an expert is given rows in torch.float32",
            ),
            "no tokens": (
                mix(out="torch.stack([row for row in out])"),
                "there may be no tokens",
            ),
            "in place": (mix(add="x[token] = rows.to(x.dtype)", out="x"), "changes a tensor that it was given"),
            "a list": (mix(out="list(out)"), "mixture returns a tensor"),
            "transposed": (mix(out="out.T"), "the output is (tokens, d_model)"),
        },
        "6.5": {
            "minillm's own": (
                "from minillm.costs import parameters as total_parameters, active_parameters, flops_per_token",
                "uses minillm.costs",
            ),
            "k experts in all": (counting(total="count(model, model.k)"), "total_parameters counts all experts"),
            "all experts active": (
                counting(active="count(model, model.n_experts)"),
                "active_parameters counts all experts",
            ),
            "one expert active": (counting(active="count(model, 1)"), "a token uses k experts"),
            "no last norm": (counting(last="0"), "the norm at the end is left out"),
            "no norms": (counting(last="0", norms="0"), "the norms are left out"),
            "one norm a layer": (counting(norms="d"), "a layer has two norms"),
            "no router": (counting(mixture="(n + m.n_shared) * expert"), "the routers are left out"),
            "a router of k": (counting(mixture="(n + m.n_shared) * expert + n * d"), "the router scores all experts"),
            "routers in dense layers": (
                counting(layers=COUNTED["layers"] + " + m.dense_layers * m.n_experts * d"),
                "a dense layer has no router",
            ),
            "as many key heads as query heads": (
                counting(attention="4 * d * m.head_dim * m.n_heads"),
                "keys and values have n_kv_heads heads",
            ),
            "queries as wide as the model": (
                counting(attention="2 * d * d + 2 * d * m.head_dim * m.n_kv_heads"),
                "n_heads * head_dim wide, not d_model",
            ),
            "always a gate": (counting(expert="3 * d * m.expert_d_ff"), "an expert has expert_matrices matrices"),
            "a gate in dense layers": (
                counting(dense="3 * d * m.dense_d_ff"),
                "a dense layer has dense_matrices matrices",
            ),
            "never a gate": (counting(expert="2 * d * m.expert_d_ff"), "an expert has expert_matrices matrices"),
            "embedding once": (counting(tables="1"), "the output matrix is not tied here"),
            "embedding twice": (counting(tables="2"), "the output matrix is tied here"),
            "no shared experts": (
                counting(mixture="n * expert + m.n_experts * d"),
                "the shared experts are left out",
            ),
            "shared experts that rest": (
                counting(active="count(model, model.k - model.n_shared)"),
                "the shared experts are used by every token",
            ),
            "mixtures everywhere": (
                counting(layers="m.n_layers * mixture"),
                "the first dense_layers layers are no mixtures",
            ),
            "mixtures everywhere, dense ones too": (
                counting(layers="m.n_layers * mixture + m.dense_layers * dense"),
                "a dense layer has no experts",
            ),
            "no dense layers": (
                counting(layers="(m.n_layers - m.dense_layers) * mixture"),
                "the dense layers are left out",
            ),
            "active without the embedding": (
                counting(active="count(model, model.k) - model.vocab_size * model.d_model"),
                "the embedding counts as active",
            ),
            "a whole number, as a float": (counting(total="count(model, model.n_experts) / 1"), "returns an int"),
            "twice the active parameters": (counting(flops="2 * active_parameters(m)"), "looking up an embedding and"),
            "one operation": (
                counting(flops="active_parameters(m) - norms - (0 if m.tied else table)"),
                "a multiplication and an addition are two",
            ),
            "norms multiplied": (
                counting(flops="2 * (active_parameters(m) - (0 if m.tied else table))"),
                "a norm is no matrix product",
            ),
            "all experts work": (
                counting(flops="2 * (total_parameters(m) - norms - (0 if m.tied else table))"),
                "experts that the token does not use",
            ),
            "embedding looked up": (
                counting(flops="2 * (active_parameters(m) - norms)"),
                "looking up an embedding multiplies nothing",
            ),
            "no output matrix": (
                counting(flops="2 * (active_parameters(m) - norms - (1 if m.tied else 2) * table)"),
                "the output matrix multiplies each token, tied or not",
            ),
            "tied, so left out": (
                counting(flops="2 * (active_parameters(m) - norms - table)"),
                "the output matrix multiplies each token, tied or not",
            ),
            "router for free": (
                counting(
                    flops="2 * (active_parameters(m) - norms - (0 if m.tied else table)"
                    " - (m.n_layers - m.dense_layers) * m.n_experts * d)"
                ),
                "the routers multiply each token too",
            ),
            "dense layers everywhere": (
                counting(layers="(m.n_layers - m.dense_layers) * mixture + m.n_layers * dense"),
                "only the first dense_layers layers are dense",
            ),
            "experts in dense layers": (
                counting(
                    mixture="(n + m.n_shared) * expert",
                    layers="m.n_layers * mixture + (m.n_layers - m.dense_layers) * m.n_experts * d"
                    " + m.dense_layers * dense",
                ),
                "a dense layer has no experts",
            ),
            "attention in mixtures only": (
                counting(layers=COUNTED["layers"] + " - m.dense_layers * attention"),
                "a dense layer has attention too",
            ),
            "keys or values": (
                counting(attention="d * m.head_dim * (2 * m.n_heads + m.n_kv_heads)"),
                "attention has four matrices",
            ),
            "no output of attention": (
                counting(attention="d * m.head_dim * (m.n_heads + 2 * m.n_kv_heads)"),
                "attention has four matrices",
            ),
            "dense layers as wide as experts": (
                counting(dense="m.dense_matrices * d * m.expert_d_ff"),
                "dense_d_ff wide",
            ),
            "shared experts scored": (
                counting(mixture="(n + m.n_shared) * expert + (m.n_experts + m.n_shared) * d"),
                "does not score the shared experts",
            ),
            "no table at all": (counting(tables="(0 if m.tied else 2)"), "there is still one table"),
            "shared experts for free": (
                counting(flops="2 * (count(m, m.k - m.n_shared) - norms - (0 if m.tied else table))"),
                "the shared experts multiply each token too",
            ),
            "a router of k works": (
                counting(
                    flops="2 * (active_parameters(m) - norms - (0 if m.tied else table)"
                    " - (m.n_layers - m.dense_layers) * (m.n_experts - m.k) * d)"
                ),
                "the router multiplies with all its rows",
            ),
            "the check's own": (counting(total="sum(p[1] for p in brute_6_5(model))"), "uses brute_6_5"),
            "forward and backward": (
                counting(flops="6 * (active_parameters(m) - norms - (0 if m.tied else table))"),
                "three times as much is forward and backward",
            ),
        },
        "6.6": {
            "bias not used": (bias(experts="scores.topk(k, dim=-1).indices"), "the bias is added to the scores"),
            "bias taken off": (
                bias(experts="(scores - bias).topk(k, dim=-1).indices"),
                "the bias is added to the scores",
            ),
            "bias in the weights": (
                bias(chosen="(scores + bias).gather(1, experts)"),
                "the bias is for choosing only",
            ),
            "bias on the logits": (
                bias(experts="(logits + bias).topk(k, dim=-1).indices"),
                "the bias belongs to the score",
            ),
            "bias inside the sigmoid": (
                bias(experts="(logits + bias).sigmoid().topk(k, dim=-1).indices"),
                "the bias belongs to the score",
            ),
            "softmax": (bias(scores="logits.softmax(-1)"), "not a softmax"),
            "softmax of the chosen": (bias(weights="chosen.softmax(-1)"), "without a softmax"),
            "not divided": (bias(weights="chosen"), "are divided by their sum"),
            "divided by all": (bias(weights="chosen / scores.sum(1, keepdim=True)"), "not over all"),
            "in the order of the scores": (
                bias(
                    experts="(scores + bias).topk(k, dim=-1).indices.sort(dim=1).values",
                ),
                "best first means with the bias",
            ),
            "weights sorted": (
                bias(weights="(chosen / chosen.sum(1, keepdim=True)).sort(1, descending=True).values"),
                "the weights stand in another order",
            ),
            "detached": (bias(weights="(chosen / chosen.sum(1, keepdim=True)).detach()"), "no gradient reaches"),
            "the sum detached": (
                bias(weights="chosen / chosen.sum(1, keepdim=True).detach()"),
                "the gradient of the logits is not",
            ),
            "bias changed": (bias(experts="bias.add_(0.1).add(scores).topk(k).indices"), "changes a tensor"),
            "up instead of down": (
                bias(moved="bias + rate * torch.sign(loads - mean)"),
                "an expert with too many tokens must become less likely",
            ),
            "by the difference": (
                bias(moved="bias + rate * (mean - loads)"),
                "only the sign of the difference counts",
            ),
            "by the relative difference": (bias(moved="bias + rate * (mean - loads) / mean"), "only the sign"),
            "without the rate": (bias(moved="bias + torch.sign(mean - loads)"), "the rate is not used"),
            "only up": (bias(moved="bias + rate * (loads < mean)"), "those above it down"),
            "never at rest": (
                bias(moved="bias + torch.where(loads > mean, -rate, rate)"),
                "the expert that has it stays as it is",
            ),
            "a whole mean": (bias(mean="experts.numel() // len(bias)"), "don't round the mean"),
            "tokens instead of assignments": (bias(mean="len(experts) / len(bias)"), "tokens * k / n_experts"),
            "mean of those with tokens": (bias(mean="loads[loads > 0].float().mean()"), "those without tokens too"),
            "only the busiest": (
                bias(moved="bias + rate * torch.where(loads == loads.max(), -1, 1)"),
                "not only the busiest one",
            ),
            "without minlength": (
                bias(loads="torch.bincount(experts.flatten())"),
                "fails where an expert has no tokens",
            ),
            "the first choice only": (
                bias(loads="torch.bincount(experts[:, 0], minlength=len(bias))"),
                "loads 3, 2, 1",
            ),
            "in place": (bias(moved="bias.add_(rate * torch.sign(mean - loads))"), "return a new one"),
            "the mean of integers": (bias(mean="loads.mean()"), "no mean of integers"),
            "counts not flattened": (
                bias(loads="torch.bincount(experts, minlength=len(bias))"),
                "bincount takes one dimension",
            ),
            "two dtypes": (
                bias(mean="0", moved="bias + loads.double() @ torch.eye(len(bias))"),
                "a product of two dtypes",
            ),
            "clamped": (bias(moved="bias + rate * (mean - loads).clamp(-1, 1)"), "every step is as large as the rate"),
            "recentred": (
                bias(moved="(b := bias + rate * torch.sign(mean - loads)) - b.mean()"),
                "the mean of the bias is not taken off",
            ),
            "kept between calls": (
                "B = {}\n"
                + bias(moved="B.setdefault(len(bias), bias.clone()).add_(rate * torch.sign(mean - loads)).clone()"),
                "nothing may be kept",
            ),
            "experts changed": (
                bias(moved="bias + rate * torch.sign(mean - loads) + 0 * experts.zero_().sum()"),
                "changes the experts",
            ),
            "a little in the sum": (
                bias(weights="chosen / (chosen.sum(1, keepdim=True) + 1e-9)"),
                "a small number added to the sum",
            ),
            "summed over tokens": (bias(weights="chosen / chosen.sum(0, keepdim=True)"), "a sum over the tokens"),
            "always float32": (
                bias(weights="(chosen / chosen.sum(1, keepdim=True)).float()"),
                "give weights in torch.float64",
            ),
            "bias in float32": (
                bias(moved="(bias + rate * torch.sign(mean - loads)).float()"),
                "a bias in float64 stays in float64",
            ),
            "from zero": (bias(moved="rate * torch.sign(mean - loads)"), "added to the bias that there was"),
        },
        "6.7": {
            "renormalised": (layer(weights="top_k_gates(p, 1)[1]"), "your weight is 1 for every token"),
            "no residual": (layer(output="y.reshape(x.shape)"), "the residual connection is missing"),
            "dropped tokens vanish": (
                layer(output="x * kept.reshape(*x.shape[:2], 1) + y.reshape(x.shape)"),
                "it passes unchanged",
            ),
            "nothing dropped": (
                layer(y="mixture(tokens, experts, weights, torch.ones_like(kept), networks)"),
                "nothing is dropped",
            ),
            "dropped tokens are worked on": (
                layer(y="mixture(tokens, experts, weights * kept, torch.ones_like(kept), networks)"),
                "it does not work on a dropped one",
            ),
            "the best of the queue": (
                layer().replace(
                    "    y =",
                    "    order = weights[:, 0].argsort(descending=True)\n"
                    "    kept = kept.index_copy(0, order, drops(experts[order], n, capacity)[0])\n    y =",
                ),
                "other tokens are dropped than should be",
            ),
            "router apart from x": (
                layer(logits=LAYERED["logits"].replace("tokens.to", "tokens.detach().to")),
                "the gradient that reaches x from it is not",
            ),
            "the probability twice": (layer(weights="p.gather(1, experts) ** 2"), "multiplied twice"),
            "a queue for each text": (
                """
def switch_layer(x, router, networks, *, capacity_factor, coefficient=0.01):
    n, exact = len(networks), torch.promote_types(x.dtype, torch.float32)
    p = (x.to(exact) @ router.to(exact).T).softmax(-1)
    experts = p.argmax(-1)
    capacity = expert_capacity(x.shape[1], n, 1, capacity_factor)
    kept = torch.cat([drops(row[:, None], n, capacity)[0] for row in experts])
    experts, p = experts.reshape(-1, 1), p.flatten(0, 1)
    y = mixture(x.flatten(0, 1), experts, p.gather(1, experts), kept, networks)
    return x + y.view_as(x), coefficient * switch_loss(p, experts), int((~kept).sum())
""",
                "each text has a queue of its own",
            ),
            "a queue across the texts": (
                layer(
                    tokens="x.transpose(0, 1).reshape(-1, x.shape[-1])",
                    output="x + y.reshape(x.shape[1], x.shape[0], -1).transpose(0, 1)",
                ),
                "other tokens are dropped than should be",
            ),
            "capacity rounded down": (
                layer(capacity="max(1, int(capacity_factor * len(tokens) / n))"),
                "the capacity is rounded up",
            ),
            "capacity of one text": (
                layer(capacity="expert_capacity(x.shape[1], n, 1, capacity_factor)"),
                "yours that of one text",
            ),
            "coefficient forgotten": (layer(loss="switch_loss(p, experts)"), "the coefficient is not used"),
            "coefficient fixed": (layer(loss="0.01 * switch_loss(p, experts)"), "your coefficient is always 0.01"),
            "the loss of those that stay": (
                layer(loss="coefficient * switch_loss(p[kept[:, 0]], experts[kept[:, 0]])"),
                "they did choose",
            ),
            "load of those that stay": (
                layer(loss="coefficient * switch_loss(p, experts[kept[:, 0]])"),
                "they did choose",
            ),
            "loss in the weights of the chosen": (
                layer(loss="coefficient * switch_loss(torch.zeros_like(p).scatter(1, experts, weights), experts)"),
                "the loss is",
            ),
            "logits instead of probabilities": (
                layer(weights="(tokens @ router.to(x.dtype).T).gather(1, experts)"),
                "your weight is the logit",
            ),
            "sigmoid": (
                layer(logits="(tokens.double() @ router.double().T).sigmoid().to(x)"),
                "the output differs from x plus probability times answer",
            ),
            "sigmoid as the weight": (
                layer(weights="(tokens @ router.to(x.dtype).T).sigmoid().gather(1, experts)"),
                "your weight is the sigmoid of the logit",
            ),
            "softmax over the tokens": (
                layer().replace("softmax(-1)", "softmax(0)"),
                "your softmax goes over the tokens",
            ),
            "weights on the input": (
                layer(y="mixture(tokens * weights.to(x.dtype), experts, torch.ones_like(weights), kept, networks)"),
                "the expert is given its token times the probability",
            ),
            "the residual twice": (layer(output="2 * x + y.reshape(x.shape)"), "x is added twice"),
            "factor not used": (
                layer(capacity="expert_capacity(len(tokens), n, 1, 1.0)"),
                "is the capacity factor used?",
            ),
            "the capacity of two choices": (
                layer(capacity="expert_capacity(len(tokens), n, 2, capacity_factor)"),
                "each token has one choice",
            ),
            "a queue for each text, room for all": (
                layer().replace(
                    "kept, dropped = drops(experts, n, capacity)",
                    "pieces = [drops(one, n, capacity) for one in experts.split(x.shape[1])]\n"
                    "    kept, dropped = torch.cat([a for a, _ in pieces]), sum(b for _, b in pieces)",
                ),
                "each text has a queue of its own",
            ),
            "rounded to a small capacity": (
                layer(capacity="int(capacity_factor * (len(tokens) / n))"),
                "the capacity is rounded up",
            ),
            "probabilities in the dtype of x": (
                layer().replace("p = (", "p = (0 + ").replace(").softmax(-1)", ").to(x.dtype).softmax(-1)"),
                "in float32",
            ),
            "the loss of rounded probabilities": (
                layer(loss="(coefficient * switch_loss(p.to(x.dtype), experts)).to(p.dtype)"),
                "the loss is 1.46212",
            ),
            "no residual in bfloat16": (
                layer(output="(0 if x.dtype == torch.bfloat16 else x) + y.reshape(x.shape)"),
                "than bfloat16 explains",
            ),
            "the weight of rounded logits": (
                layer(weights="(tokens @ router.to(x.dtype).T).softmax(-1).gather(1, experts)"),
                "the weight in yours 0.500",
            ),
            "answers of zeros counted as dropped": (
                layer(dropped="int((y == 0).all(1).sum())"),
                "an expert may answer with zeros",
            ),
            "another default": (
                layer().replace("coefficient=0.01", "coefficient=0.1"),
                "no coefficient given",
            ),
            "router transposed": (layer(logits="tokens @ router"), "Error"),
            "experts given the wrong rows": (
                layer(y="mixture(tokens.float(), experts, weights, kept, networks)"),
                "an expert is given torch.float32",
            ),
            "detached probability": (layer(weights="p.gather(1, experts).detach()"), "no gradient reaches the router"),
            "detached loss": (
                layer(loss="coefficient * switch_loss(p, experts).detach()"),
                "no gradient comes through",
            ),
            "router in bfloat16": (
                layer(logits="(tokens @ router.to(x.dtype).T).to(torch.promote_types(x.dtype, torch.float32))"),
                "some tokens go to another expert than in float32",
            ),
            "everything in bfloat16": (
                layer(logits="tokens @ router.to(x.dtype).T"),
                "some tokens go to another expert than in float32",
            ),
            "float32 always": (
                layer(logits="tokens.float() @ router.float().T"),
                "only as exact as float32",
            ),
            "dropped for each expert": (layer(dropped="dropped"), "the number of dropped tokens is an int"),
            "kept instead of dropped": (layer(dropped="int(kept.sum())"), "tokens are dropped, you count"),
            "two results": (layer().replace(", loss, dropped.sum().item()", ", loss"), "returns three things"),
            "flat": (layer(output="tokens + y"), "the output has the shape of x"),
            "in place": (layer(output="x.detach().add_(y.detach().reshape(x.shape))"), "changes a tensor"),
        },
    }


def test_every_part_has_the_three_levels_of_hints_that_the_notebook_promises():
    assert {len(part.hints) for part in find_exercise("06").parts} == {3}


@pytest.fixture(scope="module")
def solution() -> dict[str, object]:
    return solution_names("06")


@pytest.mark.parametrize("k", [1, 2, 5])
def test_gates_and_dispatch_are_those_of_mixtral(solution, k):
    torch.manual_seed(k)
    config = MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=5, num_experts_per_tok=k)
    theirs = MixtralSparseMoeBlock(config).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    tokens = x.flatten(0, 1)

    def network(i):
        def run(rows):
            gate, up = (rows @ theirs.experts.gate_up_proj[i].T).chunk(2, -1)
            return torch.nn.functional.silu(gate) * up @ theirs.experts.down_proj[i].T

        return run

    experts, weights = solution["top_k_gates"](tokens @ theirs.gate.weight.T, k)
    kept = torch.ones_like(experts, dtype=torch.bool)
    ours = solution["mixture"](tokens, experts, weights, kept, [network(i) for i in range(5)])
    torch.testing.assert_close(ours, theirs(x).flatten(0, 1), rtol=1e-5, atol=1e-5)  # their router is float32


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 20), n=st.integers(1, 8), seed=st.integers(0, 999))
def test_the_loss_is_that_of_switch_transformers(solution, tokens, n, seed):
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.randn(tokens, n, generator=generator).softmax(-1)
    experts = probabilities.argmax(-1, keepdim=True)
    theirs = load_balancing_loss_func(probabilities[None], experts[None, :, 0])
    torch.testing.assert_close(solution["switch_loss"](probabilities, experts), theirs)


@pytest.mark.parametrize("capacity", [2, 3, 100])
def test_the_layer_is_that_of_switch_transformers(solution, capacity):
    config = SwitchTransformersConfig(
        d_model=8, d_ff=16, num_experts=4, expert_capacity=capacity, router_jitter_noise=0.0, dropout_rate=0.0
    )
    theirs = SwitchTransformersSparseMLP(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 12, 8)  # one text: theirs has a queue for each
    ours, _, dropped = solution["switch_layer"](
        x,
        theirs.router.classifier.weight,
        [theirs.experts[f"expert_{i}"] for i in range(4)],
        capacity_factor=capacity * 4 / 12,
    )
    torch.testing.assert_close(ours - x, theirs(x), rtol=1e-4, atol=1e-4)
    assert (dropped == 0) == (capacity == 100)


def test_the_counts_are_those_of_transformers_own_model(solution):
    sizes = {"n_layers": 2, "d_model": 16, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "vocab_size": 40}
    config = MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        num_local_experts=5,
        tie_word_embeddings=False,
    )
    theirs = sum(p.numel() for p in MixtralForCausalLM(config).parameters())
    model = solution["Model"](**sizes, n_experts=5, k=2, expert_d_ff=24)
    assert solution["total_parameters"](model) == theirs


def test_mixtral_8x7b_has_its_published_sizes(solution):
    model = solution["Model"](32, 4096, 32, 8, 128, 32000, 8, 2, 14336)
    assert solution["total_parameters"](model) == 46_702_792_704
    assert solution["active_parameters"](model) == 12_879_925_248
