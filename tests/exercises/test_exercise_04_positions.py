"""Exercise 04: wrong answers that students may well give, right ones of other kinds; transformers as the oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rotate
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotate
from transformers.models.t5.modeling_t5 import T5Attention

from minillm.exercises.folder import find_exercise
from minillm.exercises.testing import ExerciseTests, solution_names

SINES = """
def sine_table(length, d_model, *, start=0, base=10000.0):
    p = {places}
    i = torch.arange(0, d_model, 2)
    angles = p[:, None] {by} base ** ({exponent})
    return {table}

def shift_matrix(d_model, shift, *, base=10000.0):
    m = torch.zeros(d_model, d_model)
    for i in range(0, d_model, 2):
        a = {angle}
        m[i:i + 2, i:i + 2] = torch.tensor({block})
    return {matrix}
"""
SINED = {
    "places": "torch.arange(start, start + length)",
    "by": "/",
    "exponent": "i / d_model",
    "table": "torch.stack((angles.sin(), angles.cos()), -1).flatten(1)",
    "angle": "torch.tensor(shift / base ** (i / d_model))",
    "block": "[[a.cos(), a.sin()], [-a.sin(), a.cos()]]",
    "matrix": "m",
}


def sines(**changes: str) -> str:
    """Part 4.1's answer with some of its places filled in otherwise."""
    return SINES.format(**SINED | changes)


ROTATE = """
def rotate(x, *, start=0, base=10000.0):
    n, d = x.shape[-2:]
    {before}
    speeds = {speeds}
    angles = {places}[:, None] * speeds
    cos, sin = angles.cos(), angles.sin()
    a, b = {halves}
    return {out}
"""
ROTATED = {
    "before": "",
    "speeds": "1.0 / base ** (torch.arange(0, d, 2) / d)",
    "places": "torch.arange(start, start + n)",
    "halves": "x.chunk(2, -1)",
    "out": "torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)",
}
HALVES = """
def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat({turned}, -1)

def rotate(x, *, start=0, base=10000.0):
    n, d = x.shape[-2:]
    angles = torch.arange(start, start + n)[:, None] / base ** (torch.arange(0, d, 2) / d)
    angles = {twice}
    return (x * angles.cos() + rotate_half(x) * angles.sin()).to(x.dtype)
"""


def rotated(**changes: str) -> str:
    """Part 4.2's answer with some of its places filled in otherwise."""
    return ROTATE.format(**ROTATED | changes)


LAYOUTS = """
def to_half_layout(weight, n_heads):
    d = len(weight) // n_heads
    return {half}

def to_interleaved_layout(weight, n_heads):
    d = len(weight) // n_heads
    return {back}
"""
LAID = {
    "half": "weight.reshape(n_heads, d // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)",
    "back": "weight.reshape(n_heads, 2, d // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)",
}


def laid(**changes: str) -> str:
    """Part 4.3's answer with some of its places filled in otherwise."""
    return LAYOUTS.format(**LAID | changes)


SLOPES = """
def powers(n):
    return {powers}

def alibi_slopes(n_heads):
    m = 2 ** (n_heads.bit_length() - 1)
    return torch.tensor({slopes})

def alibi_bias(n_heads, query_length, key_length):
    distance = {distance}
    return {bias}
"""
SLOPED = {
    "powers": "[2 ** (-8 * h / n) for h in range(1, n + 1)]",
    "slopes": "powers(m) + powers(2 * m)[0::2][: n_heads - m]",
    "distance": "torch.arange(key_length - query_length, key_length)[:, None] - torch.arange(key_length)",
    "bias": "-alibi_slopes(n_heads)[:, None, None] * distance",
}


def sloped(**changes: str) -> str:
    """Part 4.4's answer with some of its places filled in otherwise."""
    return SLOPES.format(**SLOPED | changes)


SHAW = """
def relative_index(query_length, key_length, max_distance):
    r = {relative}
    return {index}

def shaw_scores(query, key, table):
    b, h, n, d = query.shape
    k = {distance}
    index = relative_index(n, key.shape[2], k)
    return {scores}
"""
SHAWS = {
    "relative": "torch.arange(key_length) - torch.arange(key_length - query_length, key_length)[:, None]",
    "index": "r.clamp(-max_distance, max_distance) + max_distance",
    "distance": "len(table) // 2",
    "scores": "(query @ key.mT + (query @ table.T).gather(-1, index.expand(b, h, -1, -1))) / d**0.5",
}


def shaw(**changes: str) -> str:
    """Part 4.5's answer with some of its places filled in otherwise."""
    return SHAW.format(**SHAWS | changes)


BUCKET = """
def t5_bucket(relative_position, *, bidirectional, n_buckets=32, max_distance=128):
    r = {relative}
    n, first = n_buckets, 0
    if bidirectional:
        n = {half}
        first = n * ({second}).long()
        distance = r.abs()
    else:
        distance = {distance}
    exact = {exact}
    far = exact + (torch.log(distance.clamp(min=1) / exact) / {log} * {steps}){round}
    far = {end}
    return {bucket}
"""
BUCKETS = {
    "relative": "relative_position",
    "half": "n_buckets // 2",
    "second": "r > 0",
    "distance": "(-r).clamp(min=0)",
    "exact": "n // 2",
    "log": "math.log(max_distance / exact)",
    "steps": "(n - exact)",
    "round": ".long()",
    "end": "far.clamp(max=n - 1)",
    "bucket": "first + torch.where(distance < exact, distance, far)",
}


def bucket(**changes: str) -> str:
    """Part 4.6's answer with some of its places filled in otherwise."""
    return BUCKET.format(**BUCKETS | changes)


def base(formula: str) -> str:
    """Part 4.7's answer."""
    return f"def ntk_base(base, head_dim, factor):\n    return {formula}\n"


RIGHT = {
    "filled in by columns": (
        "4.1",
        """
def sine_table(length, d_model, *, start=0, base=10000.0):
    table = torch.zeros(length, d_model)
    position = torch.arange(start, start + length, dtype=torch.float).unsqueeze(1)
    div_term = torch.exp(torch.arange(0, d_model, 2).float() * (-math.log(base) / d_model))
    table[:, 0::2] = torch.sin(position * div_term)
    table[:, 1::2] = torch.cos(position * div_term)
    return table

def shift_matrix(d_model, shift, *, base=10000.0):
    speeds = [base ** (-2 * i / d_model) for i in range(d_model // 2)]
    blocks = [[[math.cos(shift * s), math.sin(shift * s)], [-math.sin(shift * s), math.cos(shift * s)]] for s in speeds]
    return torch.block_diag(*map(torch.tensor, blocks))
""",
    ),
    "complex numbers and least squares": (
        "4.1",
        """
def sine_table(length, d_model, *, start=0, base=10000.0):
    rows = []
    for p in range(start, start + length):
        row = []
        for j in range(d_model):
            angle = p / base ** (2 * (j // 2) / d_model)
            row.append(math.cos(angle) if j % 2 else math.sin(angle))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)

def shift_matrix(d_model, shift, *, base=10000.0):
    one = sine_table(1, d_model, start=1, base=base)[0]
    speeds = torch.atan2(one[0::2], one[1::2]).repeat_interleave(2)
    eye = torch.eye(d_model, dtype=torch.float64)
    swap = eye.reshape(-1, 2, d_model).flip(1).reshape(d_model, d_model)
    sign = torch.tensor([1.0, -1.0]).repeat(d_model // 2)
    return torch.diag(torch.cos(shift * speeds)) + torch.diag(sign * torch.sin(shift * speeds)) @ swap
""",
    ),
    "rotate_half": ("4.2", HALVES.format(turned="(-b, a)", twice="torch.cat((angles, angles), -1)")),
    "complex numbers": (
        "4.2",
        """
def rotate(x, *, start=0, base=10000.0):
    half = x.size(-1) // 2
    z = torch.view_as_complex(x.double().unflatten(-1, (2, half)).transpose(-1, -2).contiguous())
    p = torch.arange(start, start + x.size(-2), dtype=torch.double)
    w = base ** (-torch.arange(half, dtype=torch.double) / half)
    turned = torch.view_as_real(z * torch.polar(torch.ones(len(p), half).double(), torch.outer(p, w)))
    return turned.transpose(-1, -2).flatten(-2).to(x.dtype)
""",
    ),
    "a matrix for each place": (
        "4.2",
        """
def rotate(x, *, start=0, base=10000.0):
    d = x.shape[-1]
    outs = [torch.zeros_like(x[:, :, :0])]
    for i in range(x.shape[2]):
        matrix = torch.zeros(d, d, dtype=torch.float64)
        for j in range(d // 2):
            a = (start + i) * base ** (-2 * j / d)
            matrix[j, j] = matrix[j + d // 2, j + d // 2] = math.cos(a)
            matrix[j, j + d // 2], matrix[j + d // 2, j] = -math.sin(a), math.sin(a)
        outs.append((x[:, :, i:i + 1].double() @ matrix.T).to(x.dtype))
    return torch.cat(outs, 2)
""",
    ),
    "an index": (
        "4.3",
        """
def order(n_heads, rows):
    d = rows // n_heads
    head = list(range(0, d, 2)) + list(range(1, d, 2))
    return torch.tensor([h * d + i for h in range(n_heads) for i in head])

def to_half_layout(weight, n_heads):
    return weight[order(n_heads, weight.shape[0])]

def to_interleaved_layout(weight, n_heads):
    return weight[torch.argsort(order(n_heads, weight.shape[0]))]
""",
    ),
    "head by head": (
        "4.3",
        """
def to_half_layout(weight, n_heads):
    return torch.cat([torch.cat((head[0::2], head[1::2])) for head in weight.chunk(n_heads)])

def to_interleaved_layout(weight, n_heads):
    heads = []
    for head in weight.chunk(n_heads):
        made = torch.empty_like(head)
        made[0::2], made[1::2] = head.chunk(2)
        heads.append(made)
    return torch.cat(heads)
""",
    ),
    "the authors' recursion, -inf where hidden": (
        "4.4",
        """
def alibi_slopes(n_heads):
    def power_of_two(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]
    def slopes(n):
        if math.log2(n).is_integer():
            return power_of_two(n)
        closest = 2 ** math.floor(math.log2(n))
        return power_of_two(closest) + slopes(2 * closest)[0::2][: n - closest]
    return torch.tensor(slopes(n_heads), dtype=torch.float64)

def alibi_bias(n_heads, query_length, key_length):
    bias = torch.full((n_heads, query_length, key_length), -math.inf, dtype=torch.float64)
    for h, slope in enumerate(alibi_slopes(n_heads)):
        for i in range(query_length):
            place = key_length - query_length + i
            for j in range(place + 1):
                bias[h, i, j] = -slope * (place - j)
    return bias
""",
    ),
    "the third hint on slopes": (
        "4.4",
        """
def alibi_slopes(n_heads):
    power = 2 ** int(math.log2(n_heads))
    exponents = [8 * h / power for h in range(1, power + 1)]
    exponents += [4 * h / power for h in range(1, 2 * (n_heads - power), 2)]
    return 2.0 ** -torch.tensor(exponents)

def alibi_bias(n_heads, query_length, key_length):
    places = torch.arange(key_length - query_length, key_length)
    return -alibi_slopes(n_heads)[:, None, None] * (places[:, None] - torch.arange(key_length))
""",
    ),
    "symmetric": (
        "4.4",
        sloped(distance="(" + SLOPED["distance"] + ").abs()"),
    ),
    "one key at a time, and an index pair by pair": (
        "4.5",
        """
def relative_index(query_length, key_length, max_distance):
    index = torch.empty(query_length, key_length, dtype=torch.long)
    for i in range(query_length):
        for j in range(key_length):
            r = j - (i + key_length - query_length)
            index[i, j] = min(max(r, -max_distance), max_distance) + max_distance
    return index

def shaw_scores(query, key, table):
    index = relative_index(query.shape[2], key.shape[2], (table.shape[0] - 1) // 2)
    scores = []
    for j in range(key.shape[2]):
        scores.append((query * (key[:, :, j:j + 1] + table[index[:, j]])).sum(-1))
    return torch.stack(scores, -1) / math.sqrt(query.shape[3])
""",
    ),
    "picked by indexing": (
        "4.5",
        """
def relative_index(query_length, key_length, max_distance):
    r = torch.arange(-query_length + 1, key_length)[None, :].expand(query_length, -1)
    rows = [torch.arange(key_length) - (key_length - query_length) - i for i in range(query_length)]
    return torch.stack(rows).clamp(min=-max_distance).clamp(max=max_distance).add(max_distance)

def shaw_scores(query, key, table):
    n, k = query.shape[2], key.shape[2]
    index = relative_index(n, k, len(table) // 2)
    query = query / query.shape[-1] ** 0.5
    all_products = torch.einsum("bhqd,rd->bhqr", query, table)
    picked = all_products[:, :, torch.arange(n)[:, None], index]
    return torch.einsum("bhqd,bhkd->bhqk", query, key) + picked
""",
    ),
    "a product with one-hot rows": (
        "4.5",
        shaw(
            scores="(query @ key.mT + torch.einsum('bhqr,qkr->bhqk', query @ table.T, "
            "torch.nn.functional.one_hot(index, len(table)).to(query.dtype))) / d**0.5"
        ),
    ),
    "T5's own code": (
        "4.6",
        """
def t5_bucket(relative_position, *, bidirectional, n_buckets=32, max_distance=128):
    buckets = 0
    if bidirectional:
        n_buckets //= 2
        buckets += (relative_position > 0).to(torch.long) * n_buckets
        relative_position = torch.abs(relative_position)
    else:
        relative_position = -torch.min(relative_position, torch.zeros_like(relative_position))
    max_exact = n_buckets // 2
    is_small = relative_position < max_exact
    large = max_exact + (
        torch.log(relative_position.float() / max_exact) / math.log(max_distance / max_exact) * (n_buckets - max_exact)
    ).to(torch.long)
    large = torch.min(large, torch.full_like(large, n_buckets - 1))
    buckets += torch.where(is_small, relative_position, large)
    return buckets
""",
    ),
    "one position at a time, in whole numbers": (
        "4.6",
        """
def t5_bucket(relative_position, *, bidirectional, n_buckets=32, max_distance=128):
    n = n_buckets // 2 if bidirectional else n_buckets
    e = n // 2
    def one(r):
        first = n if bidirectional and r > 0 else 0
        d = abs(r) if bidirectional else max(0, -r)
        if d < e:
            return first + d
        m = 0
        while m < n - e - 1 and d ** (n - e) >= e ** (n - e - m - 1) * max_distance ** (m + 1):
            m += 1
        return first + e + m
    flat = [one(r) for r in relative_position.flatten().tolist()]
    return torch.tensor(flat).reshape(relative_position.shape)
""",
    ),
    "edges and bucketize": (
        "4.6",
        """
def t5_bucket(relative_position, *, bidirectional, n_buckets=32, max_distance=128):
    n = n_buckets // 2 if bidirectional else n_buckets
    e = n // 2
    edges = list(range(1, e)) + [math.ceil(e * (max_distance / e) ** (m / (n - e)) - 1e-9) for m in range(n - e)]
    distance = relative_position.abs() if bidirectional else relative_position.neg().relu()
    return torch.bucketize(distance, torch.tensor(edges), right=True) + n * (relative_position > 0) * bidirectional
""",
    ),
    "the third hint on buckets": (
        "4.6",
        """
def t5_bucket(relative_position, *, bidirectional, n_buckets=32, max_distance=128):
    if bidirectional:
        n, distance, first = n_buckets // 2, relative_position.abs(), n_buckets // 2 * (relative_position > 0)
    else:
        n, distance, first = n_buckets, (-relative_position).clamp(min=0), 0
    exact = n // 2
    far = exact + (
        torch.log(distance.clamp(min=exact) / exact) / math.log(max_distance / exact) * (n - exact)
    ).long()
    return first + torch.where(distance < exact, distance, far.clamp(max=n - 1))
""",
    ),
    "math.log": (
        "4.6",
        """
def t5_bucket(relative_position, *, bidirectional, n_buckets=32, max_distance=128):
    out = torch.zeros_like(relative_position)
    n = n_buckets // 2 if bidirectional else n_buckets
    e = n // 2
    for where, r in zip(out.view(-1).split(1), relative_position.reshape(-1).tolist()):
        d = abs(r) if bidirectional else -min(r, 0)
        if d >= e:
            d = min(n - 1, e + int(math.log(d / e) / math.log(max_distance / e) * (n - e)))
        where += d + (n if bidirectional and r > 0 else 0)
    return out
""",
    ),
    "differences of logarithms": (
        "4.6",
        bucket().replace(
            "torch.log(distance.clamp(min=1) / exact) / math.log(max_distance / exact)",
            "(distance.clamp(min=1).double().log() - math.log(exact)) / (math.log(max_distance) - math.log(exact))",
        ),
    ),
    "by logarithms": (
        "4.7",
        """
def ntk_base(base, head_dim, factor):
    slowest = base ** (-(head_dim - 2) / head_dim) / factor
    return math.exp(-math.log(slowest) * head_dim / (head_dim - 2))
""",
    ),
}


class TestExercise04(ExerciseTests):
    exercise = "04"
    right_answers = RIGHT
    wrong_answers = {  # noqa: RUF012
        "4.1": {
            "cosine first": (
                sines(table="torch.stack((angles.cos(), angles.sin()), -1).flatten(1)"),
                "sine and cosine are swapped",
            ),
            "all the sines first": (
                sines(table="torch.cat((angles.sin(), angles.cos()), -1)"),
                "yours has all the sines first",
            ),
            "places from 1": (
                sines(places="torch.arange(start + 1, start + length + 1)"),
                "the places are counted from 0",
            ),
            "multiplied": (sines(by="*"), "each pair is slower than the one before"),
            "half the exponent": (sines(exponent="i / 2 / d_model"), "yours is half of it"),
            "twice the exponent": (sines(exponent="2 * i / d_model"), "yours is twice that"),
            "each number a speed of its own": (
                """
def sine_table(length, d_model, *, start=0, base=10000.0):
    angles = torch.arange(start, start + length)[:, None] / base ** (torch.arange(d_model) / d_model)
    angles[:, 0::2], angles[:, 1::2] = angles[:, 0::2].sin(), angles[:, 1::2].cos()
    return angles
""",
                "the sine and the cosine of a pair share one speed",
            ),
            "turns instead of radians": (
                sines(exponent="i / d_model) * (2 * math.pi"),
                "the angles are radians",
            ),
            "degrees": (
                sines(exponent="i / d_model) * (180 / math.pi"),
                "the angles are radians",
            ),
            "divided by d_model - 2": (sines(exponent="i / max(d_model - 2, 1)"), "with d_model 8 the pairs turn by"),
            "start forgotten": (
                sines(places="torch.arange(length)"),
                "with start=5 the first vector is that of place 5",
            ),
            "start is taken off": (
                sines(places="torch.arange(start, max(length, start + 1))"),
                "3 places of 8 numbers make a table (3, 8)",
            ),
            "base forgotten": (sines().replace("base **", "10000.0 **"), "yours does not use base"),
            "places in bfloat16": (
                sines(places="torch.arange(start, start + length, dtype=torch.bfloat16)"),
                "places and angles must be worked out in float32 or better",
            ),
            "places in float16": (
                sines(places="torch.arange(start, start + length, dtype=torch.float16)"),
                "places and angles must be worked out in float32 or better",
            ),
            "speeds in float16": (
                sines().replace("/ base ** (i / d_model)", "* (base ** (-i / d_model)).half().float()"),
                "work places and speeds out in float32 or better",
            ),
            "angles in float16": (
                sines().replace("/ base ** (i / d_model)", "/ (base ** (i / d_model)).half()"),
                "add up to 1 only roughly",
            ),
            "divisors in float16": (
                sines().replace("base ** (i / d_model)", "(base ** (i / d_model)).half().float()", 1),
                "are places and angles worked out in float32 or better?",
            ),
            "cut from a table that ends": (
                sines(places="torch.arange(512)[start:start + length]"),
                "there is no last place",
            ),
            "only sines": (
                sines(table="torch.stack((angles.sin(), angles.sin()), -1).flatten(1)"),
                "the vector of place 0 is 0, 1, 0, 1",
            ),
            "half the table": (sines(table="torch.cat((angles.sin(),), -1)"), "make a table (2, 8); yours is (2, 4)"),
            "a list": (sines(table="angles.sin().tolist()"), "sine_table returns a tensor"),
            "moves back": (sines(block="[[a.cos(), -a.sin()], [a.sin(), a.cos()]]"), "moves back instead of on"),
            "no minus": (sines(block="[[a.cos(), a.sin()], [a.sin(), a.cos()]]"), "a block turns"),
            "cosine and sine swapped in the block": (
                sines(block="[[a.sin(), a.cos()], [-a.cos(), a.sin()]]"),
                "is not PE(",
            ),
            "one speed for all pairs": (
                sines(angle="torch.tensor(float(shift))"),
                "does each pair turn by shift times its speed",
            ),
            "the matrix of one step": (
                sines(angle="torch.tensor(1.0 / base ** (i / d_model))"),
                "does each pair turn by shift times its speed",
            ),
            "the halves' matrix": (
                sines(
                    matrix="m[torch.arange(d_model).reshape(-1, 2).T.flatten()]"
                    "[:, torch.arange(d_model).reshape(-1, 2).T.flatten()]"
                ),
                "is not PE(",
            ),
            "the vectors that move": (sines(matrix="sine_table(d_model, d_model, start=shift)"), "changes lengths"),
            "only the blocks": (sines(matrix="m[:2, :2]"), "shift_matrix returns a matrix (d_model, d_model)"),
        },
        "4.2": {
            "minillm's own": (
                "from minillm.layers.positions import RotaryEmbedding\n\n"
                "def rotate(x, *, start=0, base=10000.0):\n"
                "    return RotaryEmbedding(x.shape[-1], base=base)(x, torch.arange(start, start + x.shape[2]))",
                "uses minillm.layers.positions.RotaryEmbedding",
            ),
            "the interleaved layout": (
                rotated(
                    halves="(x[..., 0::2], x[..., 1::2])",
                    out="torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)",
                ),
                "that is the interleaved layout",
            ),
            "the other way round": (
                rotated(out="torch.cat((a * cos + b * sin, b * cos - a * sin), -1).to(x.dtype)"),
                "you turn the other way round",
            ),
            "no minus": (
                rotated(out="torch.cat((a * cos + b * sin, a * sin + b * cos), -1).to(x.dtype)"),
                "must turn by the same angle, in the same direction",
            ),
            "no sines in the second half": (
                rotated(out="torch.cat((a * cos - b * sin, b * cos), -1).to(x.dtype)"),
                "a turned vector keeps its length",
            ),
            "only the first half": (
                rotated(out="torch.cat((a * cos - b * sin, b), -1).to(x.dtype)"),
                "a turned vector keeps its length",
            ),
            "angles repeated for the other layout": (
                HALVES.format(turned="(-b, a)", twice="angles.repeat_interleave(2, -1)"),
                "its partner with the sine of the same angle",
            ),
            "rotate_half without the minus": (
                HALVES.format(turned="(b, a)", twice="torch.cat((angles, angles), -1)"),
                "must turn by the same angle, in the same direction",
            ),
            "rotate_half, the minus elsewhere": (
                HALVES.format(turned="(b, -a)", twice="torch.cat((angles, angles), -1)"),
                "you turn the other way round",
            ),
            "places from 1": (
                rotated(places="torch.arange(start + 1, start + n + 1)"),
                "are your places counted from 1",
            ),
            "halves swapped on return": (
                rotated(out="torch.cat((a * sin + b * cos, a * cos - b * sin), -1).to(x.dtype)"),
                "the halves are swapped in what you return",
            ),
            "tokens come back in reverse": (
                rotated(out="torch.cat((a * cos - b * sin, a * sin + b * cos), -1).flip(-2).to(x.dtype)"),
                "do your tokens or your places run backwards?",
            ),
            "places in reverse": (
                rotated(places="torch.arange(start, start + n).flip(0)"),
                "do your tokens or your places run backwards?",
            ),
            "places from 2": (
                rotated(places="(torch.arange(start, start + n) + 2)"),
                "so 1, 0, 0, 0, 0, 0, 0, 0 stays; yours becomes",
            ),
            "written over": (
                rotated(
                    before="turned = x.clone()",
                    halves="turned.chunk(2, -1)",
                    out="[a.copy_(a * cos - b * sin), b.copy_(a * sin + b * cos), turned][2]",
                ),
                "the second half is computed from the already turned first half",
            ),
            "places in float16": (
                rotated(places="torch.arange(start, start + n, dtype=torch.float16)"),
                "places and angles must be worked out in float32 or better",
            ),
            "angles in float16": (
                ROTATE.replace("* speeds\n", "* speeds\n    angles = angles.half().float()\n").format(**ROTATED),
                "out in float32 or better",
            ),
            "start forgotten": (rotated(places="torch.arange(n)"), "tokens that come later, with start=4"),
            "start backwards": (
                rotated(places="torch.arange(n).sub(start)"),
                "tokens that come later, with start=4",
            ),
            "half the exponent": (rotated(speeds="base ** -(torch.arange(d // 2) / d)"), "yours is half of it"),
            "twice the exponent": (
                rotated(speeds="base ** -(2 * torch.arange(0, d, 2) / d)"),
                "yours is twice that",
            ),
            "faster and faster": (rotated(speeds="base ** (torch.arange(0, d, 2) / d)"), "yours is faster"),
            "all alike": (rotated(speeds="torch.ones(d // 2)"), "yours turn alike"),
            "base forgotten": (rotated(speeds="10000.0 ** -(torch.arange(0, d, 2) / d)"), "yours does not use base"),
            "heads instead of places": (
                rotated(
                    before="n = x.shape[1]",
                    out="torch.cat((a * cos[:, None] - b * sin[:, None], "
                    "a * sin[:, None] + b * cos[:, None]), -1).to(x.dtype)",
                ),
                "the places run along the length",
            ),
            "heads counted on": (
                rotated(
                    places="(torch.arange(start, start + n) + 0 * torch.arange(n))",
                    out="torch.cat([torch.cat((u * c - v * s, u * s + v * c), -1) for u, v, c, s in "
                    "((a[:, [i]], b[:, [i]], (angles * (i + 1)).cos(), (angles * (i + 1)).sin())"
                    " for i in range(a.shape[1]))], 1).to(x.dtype)",
                ),
                "all heads and all texts of a batch turn alike",
            ),
            "angles in the dtype of x": (
                rotated(
                    speeds="(base ** -(torch.arange(0, d, 2) / d)).to(x.dtype)",
                    places="torch.arange(start, start + n).to(x.dtype)",
                ),
                "places and angles must be worked out in float32",
            ),
            "float32 comes out": (rotated(before="x = x.float()"), "torch.float64 in, torch.float64 out"),
            "the wider dtype comes out": (
                rotated(out="torch.cat((a * cos - b * sin, a * sin + b * cos), -1)"),
                "torch.bfloat16 in, torch.bfloat16 out",
            ),
            "in place": (
                rotated(out="x.copy_(torch.cat((a * cos - b * sin, a * sin + b * cos), -1))"),
                "rotate changes the tensor that it was given",
            ),
            "detached": (rotated(halves="x.detach().chunk(2, -1)"), "no gradient reaches x"),
            "a halfway turn": (
                rotated(places="(torch.arange(start, start + n) / 2)"),
                "with head_dim 8 the pairs turn by",
            ),
            "length and heads swapped": (
                rotated(out="torch.cat((a * cos - b * sin, a * sin + b * cos), -1).transpose(1, 2).to(x.dtype)"),
                "keeps its shape",
            ),
        },
        "4.3": {
            "the way back": (laid(half=LAID["back"], back=LAID["half"]), "that is the way back"),
            "both the same": (laid(back=LAID["half"]), "to_interleaved_layout does the same"),
            "across the heads": (
                laid(half="torch.cat((weight[0::2], weight[1::2]))"),
                "each head is reordered on its own",
            ),
            "the second of each pair first": (
                laid(half=LAID["half"].replace(".transpose", ".flip(2).transpose")),
                "the first of each pair comes first",
            ),
            "columns": (
                laid(half="rearrange(weight, 'a (pairs two) -> a (two pairs)', two=2)"),
                "yours moves columns",
            ),
            "as it was": (laid(half="weight.clone()", back="weight.clone()"), "changes nothing"),
            "weights only": (
                laid(
                    half="rearrange(weight, '(h p two) m -> (h two p) m', h=n_heads, two=2)",
                    back="rearrange(weight, '(h two p) m -> (h p two) m', h=n_heads, two=2)",
                ),
                "is reordered like the rows of a weight: yours fails on it",
            ),
            "back across the heads": (
                laid(back="rearrange(weight, '(two p) ... -> (p two) ...', two=2)"),
                "the rows of each head of six come in the order 0 3 1 4 2 5",
            ),
            "heads swapped with pairs": (
                laid(half="rearrange(weight, '(h p two) ... -> (two h p) ...', h=n_heads, two=2)"),
                "each head is reordered on its own",
            ),
            "heads apart": (
                laid(half="rearrange(weight, '(h p two) ... -> h (two p) ...', h=n_heads, two=2)"),
                "keeps its shape",
            ),
            "in place": (
                laid(half="weight.copy_(" + LAID["half"] + ".clone())"),
                "to_half_layout changes the tensor that it was given",
            ),
            "a fixed head of six": (
                laid(
                    half="weight.reshape(n_heads, -1, *weight.shape[1:])[:, [0, 2, 4, 1, 3, 5]].reshape(weight.shape)"
                ),
                "Error",
            ),
        },
        "4.4": {
            "from h = 0": (sloped(powers="[2 ** (-8 * h / n) for h in range(n)]"), "the first head has h = 1, not 0"),
            "in reverse": (
                sloped(powers="[2 ** (-8 * h / n) for h in range(n, 0, -1)]"),
                "the first head has the steepest slope",
            ),
            "2 to the -h": (sloped(powers="[2.0 ** -h for h in range(1, n + 1)]"), "which is h for 8 heads only"),
            "the formula for every number": (sloped(slopes="powers(n_heads)"), "8h / n is for powers of two only"),
            "the even places": (
                sloped(slopes="powers(m) + powers(2 * m)[1::2][: n_heads - m]"),
                "the others are there already",
            ),
            "one after the other": (
                sloped(slopes="powers(m) + powers(2 * m)[: n_heads - m]"),
                "yours takes one after the other",
            ),
            "the next smaller power, of powers too": (
                sloped().replace("n_heads.bit_length() - 1", "max((n_heads - 1).bit_length() - 1, 0)"),
                "8 is a power of two itself",
            ),
            "sorted": (
                sloped(slopes="sorted(powers(m) + powers(2 * m)[0::2][: n_heads - m], reverse=True)"),
                "the right slopes in another order",
            ),
            "the fill in front": (
                sloped(slopes="powers(2 * m)[0::2][: n_heads - m] + powers(m)"),
                "the right slopes in another order",
            ),
            "the next larger power": (
                sloped(slopes="powers(n_heads if n_heads == m else 2 * m)[:n_heads]"),
                "those are the first slopes of the next larger power of two",
            ),
            "a power too many": (sloped(slopes="powers(m)"), "12 heads have 12 slopes"),
            "negative slopes": (
                sloped(powers="[-(2 ** (-8 * h / n)) for h in range(1, n + 1)]"),
                "the minus comes with the bias",
            ),
            "slopes in even steps": (
                sloped(powers="[1 - h / (n + 1) for h in range(n)]"),
                "8 heads have the exponents",
            ),
            "a reward": (
                sloped(bias="alibi_slopes(n_heads)[:, None, None] * distance"),
                "a key further away counts less",
            ),
            "counted from the first key, a reward": (
                sloped(distance="-torch.arange(key_length).expand(query_length, -1)"),
                "yours is counted from key 0 (the softmax would not notice",
            ),
            "counted from the first key": (
                sloped(distance="torch.arange(key_length).expand(query_length, -1)"),
                "yours is counted from key 0",
            ),
            "one too far": (
                sloped(distance=SLOPED["distance"] + " + 1"),
                "the key at the query's own place has the distance 0",
            ),
            "the first query at the first key": (
                sloped(distance="torch.arange(query_length)[:, None] - torch.arange(key_length)"),
                "yours puts the first query at the first key",
            ),
            "slopes along the queries": (
                sloped(bias="-alibi_slopes(n_heads)[None, :, None] * distance[None]"),
                "Error",
            ),
            "slopes squared": (
                sloped(bias="-(alibi_slopes(n_heads) ** torch.arange(1, n_heads + 1))[:, None, None] * distance"),
                "yours mixes up heads and places",
            ),
            "one head": (
                sloped(bias="-alibi_slopes(n_heads)[0] * distance"),
                "the bias is (n_heads, query_length, key_length)",
            ),
            "nan where hidden": (
                sloped(
                    bias="-alibi_slopes(n_heads)[:, None, None] * distance.float().masked_fill(distance < 0, math.nan)"
                ),
                "holds nan",
            ),
            "squared distances": (sloped(bias=SLOPED["bias"] + " ** 2"), "head 0 (slope 1/2)"),
        },
        "4.5": {
            "the other way round": (shaw(relative="-(" + SHAWS["relative"] + ")"), "yours is the other way round"),
            "no sign": (shaw(relative="(" + SHAWS["relative"] + ").abs()"), "you lose the sign"),
            "not moved": (
                shaw(index="r.clamp(-max_distance, max_distance)"),
                "yours is in row r",
            ),
            "not clipped": (shaw(index="r + max_distance"), "are not clipped"),
            "clipped above only": (shaw(index="r.clamp(max=max_distance) + max_distance"), "are not clipped"),
            "clipped to the table's length": (
                shaw(index="(r + max_distance).clamp(0, 2 * max_distance - 1)"),
                "the first query has the rows 2 3 4 4 4",
            ),
            "clipped one too soon": (
                shaw(index="r.clamp(1 - max_distance, max_distance - 1) + max_distance"),
                "the first query has the rows 2 3 4 4 4",
            ),
            "wrapped around": (
                shaw(index="(r + max_distance) % (2 * max_distance + 1)"),
                "the first query has the rows",
            ),
            "the first query at the first key": (
                shaw(relative="torch.arange(key_length) - torch.arange(query_length)[:, None]"),
                "yours puts the first query at the first key",
            ),
            "numbers, not int64": (
                shaw(index="(r.clamp(-max_distance, max_distance) + max_distance).float()"),
                "the index is int64",
            ),
            "the table unused": (shaw(scores="query @ key.mT / d**0.5"), "don't use the table at all"),
            "the table alone": (
                shaw(scores="(query @ table.T).gather(-1, index.expand(b, h, -1, -1)) / d**0.5"),
                "leave out query times key",
            ),
            "no scale": (shaw(scores=SHAWS["scores"].removesuffix(" / d**0.5")), "the scale is forgotten"),
            "only the keys scaled": (
                shaw(scores="query @ key.mT / d**0.5 + (query @ table.T).gather(-1, index.expand(b, h, -1, -1))"),
                "only query times key is scaled",
            ),
            "only the table scaled": (
                shaw(scores="query @ key.mT + (query @ table.T).gather(-1, index.expand(b, h, -1, -1)) / d**0.5"),
                "only the table's product is scaled",
            ),
            "the table upside down": (
                shaw(scores=SHAWS["scores"].replace("table.T", "table.flip(0).T")),
                "the table upside down",
            ),
            "keys times the table": (
                shaw(scores="(query @ key.mT + torch.einsum('bhkd,qkd->bhqk', key, table[index])) / d**0.5"),
                "your scores differ from those with a vector for each pair",
            ),
            "a vector for each pair": (
                shaw(scores="(query @ key.mT + torch.einsum('bhqd,qkd->bhqk', query, table[index])) / d**0.5"),
                "multiply the queries with the table first, then pick",
            ),
            "a vector for each pair, summed": (
                shaw(scores="(query[:, :, :, None] * (key[:, :, None] + table[index])).sum(-1) / d**0.5"),
                "multiply the queries with the table first, then pick",
            ),
            "detached": (
                shaw(scores=SHAWS["scores"].replace("table.T", "table.detach().T")),
                "no gradient reaches the table",
            ),
            "scales the query in place": (
                shaw(scores="(query.div_(d**0.5) @ key.mT + (query @ table.T).gather(-1, index.expand(b, h, -1, -1)))"),
                "shaw_scores changes a tensor that it was given",
            ),
            "float32 comes out": (shaw(scores="(" + SHAWS["scores"] + ").float()"), "yours are torch.float32"),
            "max_distance is the table's length": (shaw(distance="len(table)"), "Error"),
        },
        "4.6": {
            "the other sign": (bucket(relative="-relative_position"), "you count the keys after it"),
            "the other sign, encoder": (bucket(second="r < 0"), "yours is for those before it"),
            "the query's own key too": (bucket(second="r >= 0"), "only keys after the query get n more"),
            "one direction": (bucket(second="r > 9999"), "before and after have different buckets"),
            "all buckets in each direction": (bucket(half="n_buckets"), "keys after the query get 16 more, not 32"),
            "distances of both directions in a decoder": (
                bucket(distance="r.abs()"),
                "in a decoder keys after the query are in the bucket of distance 0",
            ),
            "all buckets exact": (bucket(exact="n - 1"), "the distances 16 and 17 are in bucket 16"),
            "a quarter exact": (bucket(exact="n // 4"), "the distances 0 to 15 have a bucket each"),
            "half of all exact in an encoder": (
                bucket(exact="n_buckets // 2"),
                "each direction has 16: the distances 0 to 7 have a bucket each",
            ),
            "rounded": (bucket(round=".round().long()"), "(round down)"),
            "rounded up": (bucket(round=".ceil().long()"), "(round down)"),
            "no end": (bucket(end="far"), "there are 32 buckets"),
            "an end too soon": (bucket(end="far.clamp(max=n - 2)"), "are in the last bucket, 31"),
            "an end too late": (bucket(end="far.clamp(max=n)"), "there are 32 buckets"),
            "the logarithm of max_distance": (bucket(log="math.log(max_distance)"), "are in the last bucket, 31"),
            "all steps": (bucket(steps="n"), "(round down)"),
            "steps without the last": (bucket(steps="(n - exact - 1)"), "the distances 127, 128, 129 and 100000"),
            "one distance less": (
                bucket(bucket="first + torch.where(distance <= exact, distance, far)", exact="n // 2 - 1"),
                "decoder",
            ),
            "not whole": (bucket(round=""), "buckets are int64"),
            "max_distance forgotten": (bucket(log="math.log(128 / exact)"), "max_distance"),
            "n_buckets forgotten": (
                bucket(half="16", exact="8 if bidirectional else 16"),
                "16 buckets",
            ),
            "the logarithm for all": (bucket(bucket="first + far"), "near distances have a bucket of their own"),
            "one at a time": (
                bucket(relative="relative_position.flatten()"),
                "the buckets have the shape of the positions",
            ),
            "in place": (bucket(relative="relative_position.neg_().neg()"), "t5_bucket changes the tensor"),
        },
        "4.7": {
            "times factor": (base("base * factor"), "the base itself grows by more than factor"),
            "turned over": (
                base("base * factor ** ((head_dim - 2) / head_dim)"),
                "the exponent of factor is turned over",
            ),
            "smaller": (base("base * factor ** -(head_dim / (head_dim - 2))"), "yours is smaller"),
            "divided": (base("base / factor"), "yours is smaller"),
            "squared": (base("base * factor ** 2"), "times slower"),
            "to the power of head_dim / 2": (base("base * factor ** (head_dim / 2)"), "times slower"),
            "to the power of head_dim": (base("base * factor ** head_dim"), "the new base is 160000; yours is"),
            "of pairs": (base("base * factor ** ((head_dim // 2) / (head_dim // 2 - 2 or 1))"), "times slower"),
            "rounded": (base("round(base * factor ** (head_dim / (head_dim - 2)))"), "don't round"),
            "whole": (base("int(base * factor ** (head_dim / (head_dim - 2)))"), "don't round"),
            "whole, as a float": (base("float(base * factor ** (head_dim / (head_dim - 2)) // 1)"), "don't round"),
            "a power of the base": (
                base("base ** (head_dim / (head_dim - 2)) * factor"),
                "the new base is 160000; yours is",
            ),
            "the speeds": (base("torch.tensor([base * factor])"), "ntk_base returns a number"),
        },
    }


def test_every_part_has_the_three_levels_of_hints_that_the_notebook_promises():
    assert {len(part.hints) for part in find_exercise("04").parts} == {3}


@pytest.fixture(scope="module")
def solution() -> dict[str, object]:
    return solution_names("04")


def test_the_solution_turns_as_llama_does(solution):
    x = torch.randn(2, 3, 5, 8)
    angles = torch.arange(7, 12)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
    angles = torch.cat((angles, angles), -1)[None]
    theirs, _ = llama_rotate(x, x, angles.cos(), angles.sin())
    torch.testing.assert_close(solution["rotate"](x, start=7), theirs)


def test_a_converted_projection_turns_as_gptj_does(solution):
    """Projected by interleaved weights and turned by GPT-J's function: the same scores as converted and turned here."""
    x, weights = torch.randn(6, 10), [torch.randn(2 * 8, 10) for _ in range(2)]
    angles = torch.arange(6)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
    theirs = [
        gptj_rotate((x @ weight.T).reshape(1, 6, 2, 8), angles.sin()[None], angles.cos()[None]).transpose(1, 2)
        for weight in weights
    ]
    ours = [
        solution["rotate"]((x @ solution["to_half_layout"](weight, 2).T).reshape(1, 6, 2, 8).transpose(1, 2))
        for weight in weights
    ]
    torch.testing.assert_close(ours[0] @ ours[1].mT, theirs[0] @ theirs[1].mT)


@settings(max_examples=60, deadline=None)
@given(
    buckets=st.sampled_from([8, 16, 32, 64]),
    distance=st.integers(40, 300),
    bidirectional=st.booleans(),
    positions=st.lists(st.integers(-500, 500), min_size=1),
)
def test_the_solutions_buckets_are_those_of_t5(solution, buckets, distance, bidirectional, positions):
    given = torch.tensor(positions)
    theirs = T5Attention._relative_position_bucket(given, bidirectional, buckets, distance)
    ours = solution["t5_bucket"](given, bidirectional=bidirectional, n_buckets=buckets, max_distance=distance)
    assert torch.equal(ours, theirs)
