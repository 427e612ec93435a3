"""Exercise 03: wrong answers that students may well give, right ones of other kinds; the solution against torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask

from minillm.exercises.folder import find_exercise
from minillm.exercises.testing import ExerciseTests, solution_names

SOFTMAX = """
def safe_softmax(scores):
    {before}
    e = torch.exp(scores - {largest})
    total = e.sum({over}, keepdim=True)
    return {result}
"""
SAFE = {
    "before": "",
    "largest": "scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)",
    "over": "-1",
    "result": "e / total.masked_fill(total == 0, 1.0)",
}
ATTENTION = """
def attention(query, key, value, *, mask=None, causal=False):
    n, k, d = query.shape[-2], key.shape[-2], query.shape[-1]
    {before}
    scores = {scores}
    if mask is not None:
        {mask}
    if causal:
        {causal}
    weights = {weights}
    {after}
    return weights @ value
"""
ATTENDED = {
    "before": "",
    "scores": "query @ key.mT / d**0.5",
    "mask": "scores = scores.masked_fill(~mask, -math.inf)",
    "causal": "scores = scores.masked_fill(~torch.ones(n, k, dtype=torch.bool).tril(k - n), -math.inf)",
    "weights": "safe_softmax(scores)",
    "after": "",
}


def softmax(**changes: str) -> str:
    """Part 3.1's answer, its softmax with some places filled in otherwise."""
    return SOFTMAX.format(**SAFE | changes) + ATTENTION.format(**ATTENDED)


def attended(**changes: str) -> str:
    """Part 3.1's answer, its attention with some places filled in otherwise."""
    return SOFTMAX.format(**SAFE) + ATTENTION.format(**ATTENDED | changes)


HEADS = """
def split_heads(x, n_heads):
    b, l, f = x.shape
    return {split}

def merge_heads(x):
    b, h, l, d = x.shape
    return {merge}

def multi_head_attention(x, qkv, output, n_heads, *, causal=False):
    b, l, d_model = x.shape
    {parts}
    {heads}
    {attend}
    return {out}
"""
SEVERAL = {
    "split": "x.reshape(b, l, n_heads, f // n_heads).transpose(1, 2)",
    "merge": "x.transpose(1, 2).reshape(b, l, h * d)",
    "parts": "query, key, value = qkv(x).chunk(3, -1)",
    "heads": "query, key, value = (split_heads(part, n_heads) for part in (query, key, value))",
    "attend": "found = attention(query, key, value, causal=causal)",
    "out": "output(merge_heads(found))",
}
OWN_ATTENTION = """scores = query @ key.mT / {scale}
    if causal: scores = scores.masked_fill(~torch.ones(l, l, dtype=torch.bool).tril(), -math.inf)
    found = scores.softmax(-1) @ value"""


def several(**changes: str) -> str:
    """Part 3.2's answer with some of its places filled in otherwise."""
    return HEADS.format(**SEVERAL | changes)


GROUPED = """
def grouped_query_attention(query, key, value, *, causal=False):
    b, h, n, d = query.shape
    kv, k = key.shape[1], key.shape[2]
    g = h // kv
    {body}
"""
FOLDED = """rows = {rows}
    mask = {mask}
    out = attention(rows, {key}, {value}, mask=mask)
    return {out}"""
FOLDS = {
    "rows": "query.reshape(b, kv, g * n, d)",
    "mask": "torch.ones(n, k, dtype=torch.bool).tril(k - n).repeat(g, 1) if causal else None",
    "key": "key",
    "value": "value",
    "out": "out.reshape(b, h, n, value.shape[-1])",
}


def grouped(**changes: str) -> str:
    """Part 3.3's answer, the queries of a group as rows, with some of its places filled in otherwise."""
    return GROUPED.format(body=FOLDED.format(**FOLDS | changes))


POOL = """
def mean_pool_qkv(weight, bias, n_heads, n_kv_heads):
    g = n_heads // n_kv_heads
    def pooled(rows, heads):
        d = heads.shape[0] // n_heads
        return {pooled}
    def convert(rows):
        q, k, v = rows.chunk(3)
        return {convert}
    return convert(weight), {bias}
"""
POOLED = {
    "pooled": "heads.reshape(n_kv_heads, g, d, *heads.shape[1:]).mean(1).flatten(0, 1)",
    "convert": "torch.cat((q, pooled(rows, k), pooled(rows, v)))",
    "bias": "None if bias is None else convert(bias)",
}


def pool(**changes: str) -> str:
    """Part 3.4's answer with some of its places filled in otherwise."""
    return POOL.format(**POOLED | changes)


WINDOW = """
def window_mask(query_length, key_length, window):
    behind = {behind}
    return {mask}
"""
BEHIND = {
    "behind": "torch.arange(key_length - query_length, key_length)[:, None] - torch.arange(key_length)",
    "mask": "(behind >= 0) & (behind < window)",
}


def windowed(**changes: str) -> str:
    """Part 3.5's answer with some of its places filled in otherwise."""
    return WINDOW.format(**BEHIND | changes)


KINDS = """
def block_kinds(query_length, key_length, window, block_size):
    rows = []
    for a in {a}:
        row = []
        for c in {c}:
            b, d = min(a + block_size, query_length) - 1, min(c + block_size, key_length) - 1
            nearest, farthest = a + {offset} - d, b + {offset} - c
            live = {live}
            full = {full}
            row.append(live + (live and full))
        rows.append(row)
    return {kinds}
"""
KIND = {
    "a": "range(0, query_length, block_size)",
    "c": "range(0, key_length, block_size)",
    "offset": "(key_length - query_length)",
    "live": "farthest >= 0 and nearest < window",
    "full": "nearest >= 0 and farthest < window",
    "kinds": "torch.tensor(rows)",
}
BLOCKS = """
def block_window_attention(query, key, value, window, block_size):
    n, k = query.shape[2], key.shape[2]
    kinds = block_kinds(n, k, window, block_size)
    outs = []
    for row, start in enumerate(range(0, n, block_size)):
        some = query[:, :, start:start + block_size]
        live = kinds[row].nonzero().flatten().tolist()
        if not live:
            outs.append(torch.zeros_like(some[..., :1]).expand(*some.shape[:3], value.shape[-1]))
            continue
        first, last = {first}, {last}
        behind = {behind}
        mask = {mask}
        outs.append({out})
    return torch.cat(outs, 2)
"""
BLOCK = {
    "first": "live[0] * block_size",
    "last": "(live[-1] + 1) * block_size",
    "behind": "torch.arange(start, start + some.shape[2])[:, None] + k - n - torch.arange(k)[first:last]",
    "mask": "(behind >= 0) & (behind < window)",
    "out": "attention(some, key[:, :, first:last], value[:, :, first:last], mask=mask)",
}


def kinds(**changes: str) -> str:
    """Part 3.6's answer, its kinds with some places filled in otherwise."""
    return KINDS.format(**KIND | changes) + BLOCKS.format(**BLOCK)


def blocks(**changes: str) -> str:
    """Part 3.6's answer, its attention with some places filled in otherwise."""
    return KINDS.format(**KIND) + BLOCKS.format(**BLOCK | changes)


CACHE = """
def kv_cache_bytes(n_layers, n_kv_heads, head_dim, tokens, *, sequences=1, bytes_per_number=2, window=None):
    kept = {kept}
    return {bytes}

def longest_context(memory_bytes, n_layers, n_kv_heads, head_dim, *, sequences=1, bytes_per_number=2):
    {token}
    return {longest}
"""
CACHED = {
    "kept": "tokens if window is None else min(tokens, window)",
    "bytes": "2 * n_layers * n_kv_heads * head_dim * bytes_per_number * kept * sequences",
    "token": "token = kv_cache_bytes(n_layers, n_kv_heads, head_dim, 1, sequences=sequences, "
    "bytes_per_number=bytes_per_number)",
    "longest": "memory_bytes // token",
}


def cached(**changes: str) -> str:
    """Part 3.7's answer with some of its places filled in otherwise."""
    return CACHE.format(**CACHED | changes)


RIGHT = {
    "einsum, a row at a time, in float64": (
        "3.1",
        """
def safe_softmax(scores):
    dtype, shape = scores.dtype, scores.shape
    rows = []
    for row in scores.double().reshape(-1, shape[-1]):
        top = row.max()
        if top == -math.inf:
            rows.append(row.detach().exp())
        else:
            e = (row - top).exp()
            rows.append(e / e.sum())
    return torch.stack(rows).reshape(shape).to(dtype)

def attention(query, key, value, *, mask=None, causal=False):
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * query.shape[3] ** -0.5
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if mask is not None:
        allowed = allowed & mask
    if causal:
        q, k = scores.shape[2:]
        for i in range(q):
            allowed[:, :, i, max(0, k - q + i + 1):] = False
    return torch.einsum("bhqk,bhkv->bhqv", safe_softmax(scores.masked_fill(~allowed, float("-inf"))), value)
""",
    ),
    "where, and a bias of -inf": (
        "3.1",
        """
def safe_softmax(scores):
    dead = torch.isneginf(scores).all(dim=-1, keepdim=True)
    alive = torch.where(dead, 0.0, scores)
    e = (alive - alive.max(dim=-1, keepdim=True).values.detach()).exp()
    return torch.where(dead, 0.0, e / e.sum(dim=-1, keepdim=True))

def attention(query, key, value, *, mask=None, causal=False):
    q, k = query.size(-2), key.size(-2)
    bias = torch.zeros(q, k, dtype=query.dtype)
    if causal:
        bias = bias + torch.full((q, k), -math.inf, dtype=query.dtype).triu(k - q + 1)
    if mask is not None:
        bias = bias + torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask.logical_not(), -math.inf)
    return safe_softmax((query / query.size(-1) ** 0.5) @ key.swapaxes(2, 3) + bias) @ value
""",
    ),
    "weights that are zero where forbidden, then normalised": (
        "3.1",
        """
def weigh(scores, allowed):
    top = scores.masked_fill(~allowed, -math.inf).amax(-1, keepdim=True)
    e = torch.exp((scores - torch.where(top.isinf(), torch.zeros_like(top), top)).masked_fill(~allowed, 0.0)) * allowed
    s = e.sum(-1, keepdim=True)
    return e / torch.where(s > 0, s, torch.ones_like(s))

def safe_softmax(scores):
    allowed = ~scores.isneginf()
    return weigh(scores.masked_fill(~allowed, 0.0), allowed)

def attention(query, key, value, *, mask=None, causal=False):
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    allowed = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand_as(scores)
    if causal:
        n, k = scores.shape[-2:]
        allowed = allowed & (torch.arange(k) <= torch.arange(k - n, k).unsqueeze(1))
    return weigh(scores, allowed) @ value
""",
    ),
    "by the logarithm of the sum": (
        "3.1",
        """
def safe_softmax(scores):
    top = scores.amax(-1, keepdim=True)
    top = torch.where(top == -math.inf, torch.zeros_like(top), top)
    total = torch.exp(scores - top).sum(-1, keepdim=True)
    return torch.exp(scores - (top + torch.log(total.masked_fill(total == 0, 1.0))))
"""
        + ATTENTION.format(**ATTENDED),
    ),
    "views and permutes, heads in a loop": (
        "3.2",
        """
def split_heads(x, n_heads):
    return torch.stack(x.chunk(n_heads, dim=-1), dim=1)

def merge_heads(x):
    return torch.cat(list(x.unbind(1)), dim=-1)

def multi_head_attention(x, qkv, output, n_heads, *, causal=False):
    d = qkv.out_features // 3 // n_heads
    projected = qkv(x)
    found = []
    for i in range(n_heads):
        q, k, v = (projected[..., (j * n_heads + i) * d:(j * n_heads + i + 1) * d] for j in range(3))
        weights = q @ k.transpose(1, 2) / math.sqrt(d)
        if causal:
            weights = weights + torch.full(weights.shape[1:], float("-inf")).triu(1)
        found.append(torch.softmax(weights, -1) @ v)
    return output(torch.cat(found, -1))
""",
    ),
    "one rearrange for queries, keys and values": (
        "3.2",
        """
def split_heads(x, n_heads):
    return x.unflatten(2, (n_heads, -1)).permute(0, 2, 1, 3)

def merge_heads(x):
    return x.permute(0, 2, 1, 3).flatten(2)

def multi_head_attention(x, qkv, output, n_heads, *, causal=False):
    query, key, value = rearrange(qkv(x), "b l (three h d) -> three b h l d", three=3, h=n_heads)
    return output(rearrange(attention(query, key, value, causal=causal), "b h l d -> b l (h d)"))
""",
    ),
    "a loop over the query heads": (
        "3.3",
        """
def grouped_query_attention(query, key, value, *, causal=False):
    group = query.shape[1] // key.shape[1]
    heads = []
    for i in range(query.shape[1]):
        j = i // group
        heads.append(attention(query[:, i:i + 1], key[:, j:j + 1], value[:, j:j + 1], causal=causal))
    return torch.cat(heads, dim=1)
""",
    ),
    "einsum over groups": (
        "3.3",
        """
def grouped_query_attention(query, key, value, *, causal=False):
    q = rearrange(query, "b (kv g) n d -> b kv g n d", kv=key.shape[1])
    scores = torch.einsum("bxgnd,bxkd->bxgnk", q, key) / q.shape[-1] ** 0.5
    n, k = scores.shape[-2:]
    if causal:
        scores = scores.masked_fill(torch.ones(n, k, dtype=torch.bool).triu(k - n + 1), -math.inf)
    return torch.einsum("bxgnk,bxkd->bxgnd", safe_softmax(scores), value).flatten(1, 2)
""",
    ),
    "a loop over the key heads, groups as a batch of rows": (
        "3.3",
        """
def grouped_query_attention(query, key, value, *, causal=False):
    n, k = query.shape[2], key.shape[2]
    groups = []
    for mine, keys, values in zip(query.chunk(key.shape[1], 1), key.unbind(1), value.unbind(1)):
        scores = mine.flatten(1, 2) @ keys.mT / math.sqrt(mine.shape[-1])
        scores = scores.unflatten(1, (-1, n))
        if causal:
            scores = scores.masked_fill(~window_free(n, k), -math.inf)
        groups.append((torch.softmax(scores, -1).flatten(1, 2) @ values).unflatten(1, (-1, n)))
    return torch.cat(groups, 1)

def window_free(n, k):
    return torch.arange(k)[None] <= torch.arange(k - n, k)[:, None]
""",
    ),
    "rows of a group side by side, the mask repeated": (
        "3.3",
        grouped(
            rows="rearrange(query, 'b (kv g) n d -> b kv (n g) d', kv=kv)",
            mask="torch.ones(n, k, dtype=torch.bool).tril(k - n).repeat_interleave(g, 0) if causal else None",
            out="rearrange(out, 'b kv (n g) d -> b (kv g) n d', n=n)",
        ),
    ),
    "a list of both": ("3.4", pool().replace("return convert(weight), ", "return [convert(weight), ") + "]\n"),
    "a loop over groups": (
        "3.4",
        """
def mean_pool_qkv(weight, bias, n_heads, n_kv_heads):
    d, group = weight.shape[0] // (3 * n_heads), n_heads // n_kv_heads
    made = []
    for tensor in (weight, bias):
        if tensor is None:
            made.append(None)
            continue
        rows = [tensor[: n_heads * d]]
        for block in (1, 2):
            heads = tensor[block * n_heads * d:(block + 1) * n_heads * d].split(d)
            rows += [sum(heads[j * group:(j + 1) * group]) / group for j in range(n_kv_heads)]
        made.append(torch.cat(rows))
    return made[0], made[1]
""",
    ),
    "a matrix that averages": (
        "3.4",
        """
def mean_pool_qkv(weight, bias, n_heads, n_kv_heads):
    d, group = weight.shape[0] // (3 * n_heads), n_heads // n_kv_heads
    mean = torch.kron(torch.eye(n_kv_heads), torch.full((1, group), 1 / group))
    pool = torch.block_diag(torch.eye(n_heads), mean, mean).to(weight.dtype)
    pool = torch.kron(pool, torch.eye(d, dtype=weight.dtype))
    if n_heads == n_kv_heads:
        return weight.clone(), None if bias is None else bias.clone()
    return pool.double().matmul(weight.double()).to(weight.dtype), None if bias is None else pool @ bias
""",
    ),
    "einops reduce": (
        "3.4",
        """
from einops import reduce

def mean_pool_qkv(weight, bias, n_heads, n_kv_heads):
    if bias is not None:
        joined, _ = mean_pool_qkv(torch.cat((weight, bias[:, None]), 1), None, n_heads, n_kv_heads)
        return joined[:, :-1], joined[:, -1]
    rows = rearrange(weight, "(three h d) m -> three h d m", three=3, h=n_heads)
    pooled = reduce(rows[1:], "two (kv g) d m -> (two kv d) m", "mean", kv=n_kv_heads)
    return torch.cat([weight[: len(weight) // 3], pooled]), None
""",
    ),
    "two triangles": (
        "3.5",
        """
def window_mask(query_length, key_length, window):
    shift = key_length - query_length
    return torch.ones(query_length, key_length).tril(shift).triu(shift - window + 1).bool()
""",
    ),
    "pair by pair": (
        "3.5",
        """
def window_mask(query_length, key_length, window):
    mask = torch.full((query_length, key_length), False)
    for i in range(query_length):
        place = i + key_length - query_length
        for j in range(max(0, place - window + 1), place + 1):
            mask[i, j] = True
    return mask
""",
    ),
    "an online softmax, block by block": (
        "3.6",
        """
def block_kinds(query_length, key_length, window, block_size):
    shift = key_length - query_length
    kinds = torch.zeros(-(-query_length // block_size), -(-key_length // block_size), dtype=torch.long)
    for r in range(kinds.shape[0]):
        for c in range(kinds.shape[1]):
            q0, q1 = r * block_size + shift, min((r + 1) * block_size, query_length) - 1 + shift
            k0, k1 = c * block_size, min((c + 1) * block_size, key_length) - 1
            if q1 < k0 or q0 - k1 > window - 1:
                continue
            kinds[r, c] = 2 if q0 >= k1 and q1 - k0 < window else 1
    return kinds

def block_window_attention(query, key, value, window, block_size):
    kinds = block_kinds(query.shape[2], key.shape[2], window, block_size)
    shift = key.shape[2] - query.shape[2]
    outs = []
    for r in range(kinds.shape[0]):
        q = query[:, :, r * block_size:(r + 1) * block_size]
        top = torch.full_like(q[..., :1], -1e300 if q.dtype == torch.float64 else -1e30)
        total, found = torch.zeros_like(top), 0.0
        for c in range(kinds.shape[1]):
            if kinds[r, c] == 0:
                continue
            k, v = (t[:, :, c * block_size:(c + 1) * block_size] for t in (key, value))
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            if kinds[r, c] == 1:
                behind = (torch.arange(q.shape[2]) + r * block_size + shift)[:, None]
                behind = behind - torch.arange(k.shape[2]) - c * block_size
                scores = scores.masked_fill((behind < 0) | (behind >= window), -math.inf)
            new = torch.maximum(top, scores.amax(-1, keepdim=True))
            e = torch.exp(scores - new)
            total = total * torch.exp(top - new) + e.sum(-1, keepdim=True)
            found = found * torch.exp(top - new) + e @ v
            top = new
        found = found + torch.zeros(*q.shape[:3], value.shape[3], dtype=q.dtype)
        outs.append(found / total.masked_fill(total == 0, 1.0))
    return torch.cat(outs, 2)
""",
    ),
    "each query takes its own keys": (
        "3.6",
        """
def block_kinds(query_length, key_length, window, block_size):
    q = torch.arange(query_length) + key_length - query_length
    first = torch.stack([part.min() for part in q.split(block_size)])[:, None]
    last = torch.stack([part.max() for part in q.split(block_size)])[:, None]
    low = torch.stack([part.min() for part in torch.arange(key_length).split(block_size)])
    high = torch.stack([part.max() for part in torch.arange(key_length).split(block_size)])
    kinds = torch.ones(len(first), len(low), dtype=torch.int64)
    kinds[(last < low) | (first - high >= window)] = 0
    kinds[(first >= high) & (last - low < window)] = 2
    return kinds

def block_window_attention(query, key, value, window, block_size):
    out = torch.zeros(*query.shape[:3], value.shape[3], dtype=query.dtype)
    rows = []
    for i in range(query.shape[2]):
        place = i + key.shape[2] - query.shape[2]
        mine = slice(max(0, place - window + 1), max(0, place + 1))
        if place < 0:
            rows.append(out[:, :, i:i + 1])
        else:
            rows.append(attention(query[:, :, i:i + 1], key[:, :, mine], value[:, :, mine]))
    return torch.cat(rows, 2)
""",
    ),
    "the window mask of a slice": (
        "3.6",
        KINDS.format(**KIND)
        + """
def block_window_attention(query, key, value, window, block_size):
    shift = key.shape[2] - query.shape[2]
    outs = []
    for start in range(0, query.shape[2], block_size):
        some = query[:, :, start:start + block_size]
        end = start + some.shape[2] + shift
        first = max(0, start + shift - window + 1)
        if end <= 0:
            outs.append(value.new_zeros(*some.shape[:3], value.shape[3]))
            continue
        mask = window_mask(some.shape[2], end - first, window)
        outs.append(attention(some, key[:, :, first:end], value[:, :, first:end], mask=mask))
    return torch.cat(outs, 2)
""",
    ),
    "counted up token by token": (
        "3.7",
        """
def kv_cache_bytes(n_layers, n_kv_heads, head_dim, tokens, *, sequences=1, bytes_per_number=2, window=None):
    kept = min([tokens] + [window] * (window is not None))
    return sum(2 * bytes_per_number * head_dim for _ in range(n_layers * n_kv_heads)) * kept * sequences

def longest_context(memory_bytes, n_layers, n_kv_heads, head_dim, *, sequences=1, bytes_per_number=2):
    low, high = 0, memory_bytes + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = middle * sequences * n_layers * n_kv_heads * head_dim * 2 * bytes_per_number <= memory_bytes
        low, high = (middle, high) if fits else (low, middle)
    return low
""",
    ),
}


class TestExercise03(ExerciseTests):
    exercise = "03"
    right_answers = RIGHT
    wrong_answers = {  # noqa: RUF012
        "3.1": {
            "nothing subtracted": (softmax(largest="0.0"), "e^1000 is infinite"),
            "the mean subtracted": (
                softmax(largest="scores.nan_to_num(neginf=0.0).mean(-1, keepdim=True)"),
                "the mean is too little",
            ),
            "the largest of all": (
                softmax(largest="scores.max()"),
                "each row subtracts its own largest score, not the largest of all",
            ),
            "scores cut off": (
                softmax(before="scores = scores.clamp(max=80.0)", largest="0.0"),
                "only differences matter",
            ),
            "over the columns": (softmax(over="0"), "you add up over the rows"),
            "one sum for all": (softmax(result="e / e.sum()"), "you divide all rows by one sum"),
            "not divided": (softmax(result="e"), "have the weights 0.25 and 0.75"),
            "nan in a dead row": (
                softmax(largest="scores.amax(-1, keepdim=True)"),
                "-inf - (-inf) is nan",
            ),
            "0 / 0 in a dead row": (softmax(result="e / total"), "0 / 0"),
            "a dead row gets equal weights": (
                softmax(before="scores = scores.clamp(min=-1e30)"),
                "as if every key could be seen",
            ),
            "nan replaced afterwards": (
                softmax(largest="scores.amax(-1, keepdim=True)", result="(e / total).nan_to_num(0.0)"),
                "the gradient of a row of -inf only is nan",
            ),
            "where afterwards": (
                softmax(
                    largest="scores.amax(-1, keepdim=True)",
                    result="torch.where((scores == -math.inf).all(-1, keepdim=True), torch.zeros_like(e), e / total)",
                ),
                "the gradient of a row of -inf only is nan",
            ),
            "something added to the sum": (softmax(result="e / (total + 1e-7)"), "is a small number added to the sum?"),
            "something small added to the sum": (
                softmax(result="e / (total.masked_fill(total == 0, 1.0) + 2e-10)"),
                "is a small number added to the sum?",
            ),
            "a limit under the largest score": (
                softmax(largest="scores.amax(-1, keepdim=True).clamp(min=-1e4)"),
                "does a large negative number (a limit, a clamp) stand in the place of -inf?",
            ),
            "a large negative number, its weight taken away afterwards": (
                softmax(
                    before="dead = scores == -math.inf; scores = scores.masked_fill(dead, -60000.0)",
                    largest="scores.amax(-1, keepdim=True)",
                    result="e / total * ~dead",
                ),
                "does a large negative number (a limit, a clamp) stand in the place of -inf?",
            ),
            "scores clamped": (
                softmax(
                    before="dead = scores == -math.inf; scores = scores.clamp(min=-1e9)",
                    largest="scores.amax(-1, keepdim=True)",
                    result="e / total * ~dead",
                ),
                "does a large negative number (a limit, a clamp) stand in the place of -inf?",
            ),
            "a limit that half precision cannot hold": (
                softmax(largest="scores.amax(-1, keepdim=True).clamp(min=-1e30)"),
                "your safe_softmax fails on scores in torch.float16",
            ),
            "in float32, cast back": (
                softmax(
                    before="dtype = scores.dtype; scores = scores.float()",
                    result="(e / total.masked_fill(total == 0, 1.0)).to(dtype)",
                ),
                "do you work in float32 where the scores are float64?",
            ),
            "attention in float32, cast back": (
                attended(
                    before="query, key, value = query.float(), key.float(), value.float()",
                    after="weights, value = weights.double(), value.double()",
                ),
                "do you work in float32 where they are float64?",
            ),
            "changes its scores": (
                softmax(before="scores -= scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)"),
                "safe_softmax changes the scores",
            ),
            "in float32": (softmax(before="scores = scores.float()"), "give weights in torch.float64"),
            "detached": (softmax(before="scores = scores.detach()"), "no gradient reaches the scores"),
            "the sum detached": (
                softmax(result="e / total.masked_fill(total == 0, 1.0).detach()"),
                "their gradient is not that of the softmax",
            ),
            "torch's own": ("def safe_softmax(scores):\n    return scores.softmax(-1)", "uses softmax"),
            "torch's own, through F": (
                softmax(result="F.softmax(scores, -1)"),
                "uses torch.nn.functional.softmax",
            ),
            "torch's own attention": (
                "def attention(query, key, value, *, mask=None, causal=False):\n"
                "    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)",
                "uses torch.nn.functional.scaled_dot_product_attention",
            ),
            "no scale": (attended(scores="query @ key.mT"), "the scale is forgotten"),
            "divided by head_dim": (attended(scores="query @ key.mT / d"), "square root of head_dim, not by head_dim"),
            "multiplied": (attended(scores="query @ key.mT * d**0.5"), "you multiply by it"),
            "the root of the number of keys": (
                attended(scores="query @ key.mT / k**0.5"),
                "the scale is not that of head_dim",
            ),
            "over the queries": (
                attended(weights="safe_softmax(scores.mT).mT"),
                "your softmax runs over the queries",
            ),
            "True is forbidden": (
                attended(mask="scores = scores.masked_fill(mask, -math.inf)"),
                "True means that a query may look",
            ),
            "masked after the softmax": (
                attended(mask="pass", after="weights = weights if mask is None else weights * mask"),
                "you mask after the softmax",
            ),
            "scores multiplied by the mask": (
                attended(mask="scores = scores * mask"),
                "a forbidden key still has a weight",
            ),
            "scores of -10": (
                attended(mask="scores = scores.masked_fill(~mask, -10.0)"),
                "a forbidden key still has a weight",
            ),
            "a large negative number": (
                attended(mask="scores = scores.masked_fill(~mask, -1e9)"),
                "a query that may see no key gives zeros",
            ),
            "a large negative number added": (
                attended(mask="scores = scores - 1e4 * ~mask"),
                "a query that may see no key gives zeros",
            ),
            "a large negative number, the mask once more afterwards": (
                attended(
                    mask="scores = scores.masked_fill(~mask, -1e4)",
                    after="weights = weights if mask is None else weights * mask",
                ),
                "with a mask, query 0 may see key 0 alone, whose score is -1e12",
            ),
            "a large negative number, causal": (
                attended(causal=ATTENDED["causal"].replace("-math.inf", "-1e9")),
                "yours share their weight out evenly, since a large negative number",
            ),
            "the smallest number, causal": (
                attended(causal=ATTENDED["causal"].replace("-math.inf", "torch.finfo(scores.dtype).min")),
                "yours share their weight out evenly, since a large negative number",
            ),
            "a large negative number, causal once more afterwards": (
                attended(
                    causal=ATTENDED["causal"].replace("-math.inf", "-1e9"),
                    after="weights = weights.tril(k - n) if causal else weights",
                ),
                "causal, query 0 may see key 0 alone, whose score is -1e12",
            ),
            "no query before the first key": (
                attended(causal=ATTENDED["causal"].replace("k - n", "max(k - n, 0)")),
                "queries 0 and 1 stand before the first key, see nothing and get zeros",
            ),
            "queries before the first key at the first key": (
                attended(
                    causal="later = torch.arange(k) > (torch.arange(n) + k - n).clamp(min=0)[:, None]\n"
                    "        scores = scores.masked_fill(later, -math.inf)"
                ),
                "your four queries see [1, 1, 1, 2] keys",
            ),
            "nan for queries before the first key": (
                attended(
                    causal="scores = scores.masked_fill(~torch.ones(n, k, dtype=torch.bool).tril(k - n), -math.inf)",
                    weights="scores.exp() if mask is None else safe_softmax(scores)",
                    after="weights = weights / weights.sum(-1, keepdim=True) if mask is None else weights",
                ),
                "see nothing and get zeros; yours get nan",
            ),
            "a score of 0 is forbidden": (
                attended(mask="scores = scores * mask\n        scores = scores.masked_fill(scores == 0, -math.inf)"),
                "have the weight 1/3 each",
            ),
            "a score of 0 is forbidden, causal": (
                attended(
                    causal="scores = scores.tril(k - n)\n        scores = scores.masked_fill(scores == 0, -math.inf)"
                ),
                "is a score of 0 taken for a forbidden one?",
            ),
            "scores multiplied by -inf": (
                attended(mask="scores = scores * torch.where(mask, 1.0, -math.inf)"),
                "with a mask your weights hold nan",
            ),
            "the first query at the first key": (
                attended(causal=ATTENDED["causal"].replace("k - n", "0")),
                "you put the first query at the first key",
            ),
            "not itself": (
                attended(causal=ATTENDED["causal"].replace("k - n", "k - n - 1")),
                "a query may look at the key at its own place",
            ),
            "upside down": (
                attended(
                    causal="scores = scores.masked_fill(torch.ones(n, k, dtype=torch.bool).tril(k - n - 1), -math.inf)"
                ),
                "upside down",
            ),
            "causal ignored": (attended(causal="pass"), "causal=True changes nothing"),
            "a mask replaces causal": (
                attended(causal=ATTENDED["causal"] + " if mask is None else scores"),
                "you forget causal when there is a mask",
            ),
            "causal replaces a mask": (
                attended(mask="scores = scores if causal else scores.masked_fill(~mask, -math.inf)"),
                "you forget the mask when causal is set",
            ),
            "changes the mask": (
                attended(mask="mask.logical_not_()\n        scores = scores.masked_fill(mask, -math.inf)"),
                "attention changes a tensor that it was given",
            ),
            "scales the query in place": (
                attended(before="query /= d**0.5", scores="query @ key.mT"),
                "attention changes a tensor that it was given",
            ),
            "the batch is lost": (
                attended(before="query, key, value = query[0], key[0], value[0]"),
                "give an output (1, 1, 2, 3); yours is (1, 2, 3)",
            ),
            "keys are not transposed": (attended(scores="query @ key / d**0.5"), "RuntimeError"),
            "values detached": (attended(after="value = value.detach()"), "no gradient reaches the value"),
            "query detached": (attended(before="query = query.detach()"), "no gradient reaches the query"),
            "float32 comes out": (
                attended(after="value, weights = value.float(), weights.float()"),
                "give torch.float64; yours is torch.float32",
            ),
            "the weights too": (attended().replace("weights @ value", "weights @ value, weights"), "yours is a tuple"),
            "made anew": (
                attended(before="query, key, value = (torch.tensor(t.tolist()) for t in (query, key, value))"),
                "yours is torch.float32",
            ),
            "made anew in float64": (
                attended(
                    before="query, key, value = "
                    "(torch.tensor(t.tolist(), dtype=torch.float64) for t in (query, key, value))"
                ),
                "was a tensor detached or made anew from numbers?",
            ),
        },
        "3.2": {
            "reshaped at once": (several(split="x.reshape(b, n_heads, l, f // n_heads)"), "split_heads mixes tokens"),
            "reshaped at once, both ways": (
                several(split="x.reshape(b, n_heads, l, f // n_heads)", merge="x.reshape(b, l, h * d)"),
                "split_heads mixes tokens",
            ),
            "not swapped": (
                several(split="x.reshape(b, l, n_heads, f // n_heads)"),
                "the heads come before the length",
            ),
            "heads interleaved": (
                several(split="rearrange(x, 'b l (d h) -> b h l d', h=n_heads)"),
                "yours takes every second one",
            ),
            "heads and head_dim swapped": (
                several(split="rearrange(x, 'b l (h d) -> b d l h', h=n_heads)"),
                "dimensions are swapped",
            ),
            "keys' shape": (
                several(split="rearrange(x, 'b l (h d) -> b h d l', h=n_heads)"),
                "dimensions are swapped",
            ),
            "heads in reverse": (
                several(split="x.reshape(b, l, n_heads, f // n_heads).transpose(1, 2).flip(1)"),
                "numbers in the wrong place",
            ),
            "heads into the batch": (
                several(split="rearrange(x, 'b l (h d) -> (b h) l d', h=n_heads)"),
                "becomes (2, 2, 3, 4); yours is (4, 3, 4)",
            ),
            "merged without swapping": (several(merge="x.reshape(b, l, h * d)"), "merge_heads mixes tokens"),
            "merged number by number": (
                several(merge="rearrange(x, 'b h l d -> b l (d h)')"),
                "merge_heads joins the heads number by number",
            ),
            "merged, length first": (several(merge="rearrange(x, 'b h l d -> b (h d) l')"), "merge_heads turns"),
            "scaled by d_model": (
                several(attend=OWN_ATTENTION.format(scale="d_model**0.5")),
                "a head compares vectors of head_dim numbers",
            ),
            "not scaled": (several(attend=OWN_ATTENTION.format(scale="1.0")), "the scores are not scaled"),
            "scaled twice": (
                several(attend="found = attention(query / query.shape[-1]**0.5, key, value, causal=causal)"),
                "the scores are scaled twice",
            ),
            "the output layer forgotten": (several(out="merge_heads(found)"), "the layer `output` comes last"),
            "float32 comes out": (several(out="output(merge_heads(found)).float()"), "yours is torch.float32"),
            "one head": (
                several(
                    heads="query, key, value = (part[:, None] for part in (query, key, value))",
                    out="output(found[:, 0])",
                ),
                "that of a single head",
            ),
            "queries, keys and values of each head together": (
                several(parts="", heads="query, key, value = split_heads(qkv(x), n_heads).chunk(3, -1)"),
                "first all queries, then all keys, then all values",
            ),
            "qkv cut by threes": (
                several(parts="query, key, value = qkv(x)[..., 0::3], qkv(x)[..., 1::3], qkv(x)[..., 2::3]"),
                "first all queries, then all keys, then all values",
            ),
            "keys before queries": (
                several(parts="key, query, value = qkv(x).chunk(3, -1)"),
                "queries and keys are swapped",
            ),
            "values first": (
                several(parts="value, key, query = qkv(x).chunk(3, -1)"),
                "the last third of qkv's outputs",
            ),
            "split for another head_dim": (
                several(parts="query, key, value = qkv(x).split(d_model, dim=2)"),
                "head_dim need not be d_model / n_heads",
            ),
            "x detached": (several(parts="query, key, value = qkv(x.detach()).chunk(3, -1)"), "no gradient reaches x"),
            "under no_grad": (
                several(attend="with torch.no_grad(): found = attention(query, key, value, causal=causal)"),
                "no gradient reaches x",
            ),
            "all under no_grad": (
                several(out="output(merge_heads(found)).detach()"),
                "carries no gradient: was it detached, or made under no_grad?",
            ),
            "the heads detached": (
                several(heads="query, key, value = (split_heads(p.detach(), n_heads) for p in (query, key, value))"),
                "no gradient reaches x",
            ),
            "the keys detached": (
                several(attend="found = attention(query, key.detach(), value, causal=causal)"),
                "were queries, keys or values detached?",
            ),
            "split in place": (
                several(split="x.clone().reshape(b, l, n_heads, f // n_heads).transpose(1, 2) + 0 * x.zero_().sum()"),
                "split_heads changes the tensor",
            ),
            "merged in place": (
                several(merge="x.clone().transpose(1, 2).reshape(b, l, h * d) + 0 * x.zero_().sum()"),
                "merge_heads changes the tensor",
            ),
            "x changed": (several(attend=SEVERAL["attend"] + "; x.zero_()"), "multi_head_attention changes x"),
            "the weights changed": (
                several(attend=SEVERAL["attend"] + "; qkv.weight.data.zero_()"),
                "multi_head_attention changes x or the weights",
            ),
            "qkv taken to pieces": (
                several(
                    parts="query, key, value = (x @ w.T + c for w, c in zip(qkv.weight.chunk(3), qkv.bias.chunk(3)))"
                ),
                "a layer qkv without a bias must do too",
            ),
            "causal forgotten": (several(attend="found = attention(query, key, value)"), "hand it on"),
            "always causal": (
                several(attend="found = attention(query, key, value, causal=True)"),
                "differs from torch's nn.MultiheadAttention",
            ),
            "the weights only": (
                several(parts="query, key, value = (x @ qkv.weight.T).chunk(3, -1)"),
                "differs from torch's nn.MultiheadAttention",
            ),
            "head_dim from d_model": (
                several(
                    parts="e, y = d_model, qkv(x)\n    query, key, value = y[..., :e], y[..., e:2 * e], y[..., 2 * e:]"
                ),
                "head_dim need not be d_model / n_heads",
            ),
        },
        "3.3": {
            "minillm's own": (
                "from minillm.layers import scaled_dot_product_attention as grouped_query_attention",
                "uses minillm.layers.scaled_dot_product_attention",
            ),
            "every second head": (
                grouped(
                    rows="rearrange(query, 'b (g kv) n d -> b kv (g n) d', kv=kv)",
                    out="rearrange(out, 'b kv (g n) d -> b (g kv) n d', n=n)",
                ),
                "so neighbours do not share a head",
            ),
            "repeated": (
                GROUPED.format(
                    body="key, value = (t.repeat(1, g, 1, 1) for t in (key, value))\n"
                    "    return attention(query, key, value, causal=causal)"
                ),
                "so neighbours do not share a head",
            ),
            "repeated by neighbours": (
                GROUPED.format(
                    body="key, value = (t[:, :, None].repeat(1, 1, g, 1, 1).flatten(1, 2) for t in (key, value))\n"
                    "    return attention(query, key, value, causal=causal)"
                ),
                "keys or values are repeated",
            ),
            "repeat_interleave": (
                GROUPED.format(
                    body="return attention(query, key.repeat_interleave(g, 1), value.repeat_interleave(g, 1), "
                    "causal=causal)"
                ),
                "keys or values are repeated",
            ),
            "expanded and reshaped": (
                GROUPED.format(
                    body="key, value = (t[:, :, None].expand(-1, -1, g, -1, -1).reshape(b, h, k, -1)"
                    " for t in (key, value))\n    return attention(query, key, value, causal=causal)"
                ),
                "keys or values are repeated",
            ),
            "indexed": (
                GROUPED.format(
                    body="heads = torch.arange(h) // g\n"
                    "    return attention(query, key[:, heads], value[:, heads], causal=causal)"
                ),
                "keys or values are repeated",
            ),
            "a product that broadcasts": (
                GROUPED.format(
                    body="out = attention(query.reshape(b, kv, g, n, d), key[:, :, None], value[:, :, None],"
                    " causal=causal)\n    return out.reshape(b, h, n, -1)"
                ),
                "a product that broadcasts them",
            ),
            "repeated group by group": (
                GROUPED.format(
                    body="outs = [attention(query[:, i * g:(i + 1) * g], key[:, i:i + 1].repeat(1, g, 1, 1), "
                    "value[:, i:i + 1].repeat(1, g, 1, 1), causal=causal) for i in range(kv)]\n"
                    "    return torch.cat(outs, 1)"
                ),
                "keys or values are repeated",
            ),
            "causal handed on": (
                grouped().replace("mask=mask", "causal=causal"),
                "causal, only the last head of each group is right",
            ),
            "causal forgotten": (grouped(mask="None"), "causal=True changes nothing"),
            "the mask of rows that lie otherwise": (
                grouped(mask=FOLDS["mask"].replace(".repeat(g, 1)", "[:, None].expand(n, g, k).reshape(n * g, k)")),
                "is each row of queries at its own place",
            ),
            "the first query at the first key": (
                grouped(mask=FOLDS["mask"].replace("k - n", "0")),
                "the last one at the last key",
            ),
            "always causal": (grouped(mask=FOLDS["mask"].replace(" if causal else None", "")), "without a mask"),
            "heads come back in another order": (
                grouped(out="rearrange(out, 'b kv (g n) d -> b (g kv) n d', n=n)"),
                "so neighbours do not share a head",
            ),
            "rows come back in another order": (
                grouped(out="rearrange(out, 'b kv (n g) d -> b (kv g) n d', n=n)"),
                "do the heads and the rows come back in their order",
            ),
            "heads and rows swapped": (
                grouped(out="out.reshape(b, n, h, -1).transpose(1, 2)"),
                "do the heads and the rows come back in their order",
            ),
            "float32 comes out": (grouped(out=FOLDS["out"] + ".float()"), "yours is torch.float32"),
            "key head 0 for all": (
                GROUPED.format(
                    body="return torch.cat([attention(query[:, i:i + 1], key[:, :1], value[:, :1], causal=causal)"
                    " for i in range(h)], 1)"
                ),
                "all your query heads use key head 0",
            ),
            "group and key heads confused": (
                GROUPED.format(
                    body="return torch.cat([attention(query[:, i:i + 1], key[:, [min(i // kv, kv - 1)]],"
                    " value[:, [min(i // kv, kv - 1)]], causal=causal) for i in range(h)], 1)"
                ),
                "the query heads use the heads",
            ),
            "the mean of the queries of a group": (
                GROUPED.format(
                    body="return attention(query.reshape(b, kv, g, n, d).mean(2), key, value, causal=causal)"
                ),
                "8 query heads give 8 heads",
            ),
            "values detached": (
                grouped(value="value.detach()"),
                "no gradient reaches the value",
            ),
        },
        "3.4": {
            "the sum": (pool(pooled=POOLED["pooled"].replace("mean", "sum")), "you add the heads up"),
            "every second head": (
                pool(pooled="heads.reshape(g, n_kv_heads, d, *heads.shape[1:]).mean(0).flatten(0, 1)"),
                "every second one together",
            ),
            "the first head of each group": (
                pool(pooled="heads.reshape(n_kv_heads, g, d, *heads.shape[1:])[:, 0].flatten(0, 1)"),
                "you keep the first head of each group",
            ),
            "the first heads": (pool(pooled="heads[: n_kv_heads * d]"), "you keep the first heads and drop the others"),
            "queries too": (
                pool(convert="torch.cat((pooled(rows, q), pooled(rows, k), pooled(rows, v)))"),
                "the queries keep all their heads",
            ),
            "keys only": (
                pool(convert="torch.cat((q, pooled(rows, k), v))"),
                "give a weight of 8 rows; yours is (10, 2)",
            ),
            "first value heads kept": (
                pool(convert="torch.cat((q, pooled(rows, k), v[: len(v) // g]))"),
                "the values are pooled like the keys",
            ),
            "keys and values swapped": (
                pool(convert="torch.cat((q, pooled(rows, v), pooled(rows, k)))"),
                "keys and values are swapped",
            ),
            "queries behind": (
                pool(convert="torch.cat((pooled(rows, k), pooled(rows, v), q))"),
                "the queries stay as they are, in front",
            ),
            "divided by the number of key heads": (
                pool(pooled="heads.reshape(n_kv_heads, g, d, *heads.shape[1:]).sum(1).flatten(0, 1) / n_kv_heads"),
                "divide by the number of heads in a group",
            ),
            "neighbouring rows": (
                pool(pooled="heads.reshape(n_kv_heads * d, g, *heads.shape[1:]).mean(1)"),
                "not neighbouring rows",
            ),
            "head_dim first": (
                pool(pooled="heads.reshape(d, n_kv_heads, g, *heads.shape[1:]).mean(2).flatten(0, 1)"),
                "not neighbouring rows",
            ),
            "the bias as it was": (pool(bias="bias"), "the bias has one number for each row of the weight"),
            "the bias lost": (pool(bias="None"), "you lose the bias"),
            "no bias made into one": (
                pool(bias="convert(torch.zeros(len(weight)) if bias is None else bias)"),
                "a layer without a bias stays without one",
            ),
            "the first biases": (
                pool(bias="None if bias is None else bias[: (n_heads + 2 * n_kv_heads) * (len(bias) // 3 // n_heads)]"),
                "the bias is pooled like the rows of the weight",
            ),
            "the bias over neighbouring rows": (
                pool(
                    pooled="heads.reshape(n_kv_heads * d, g).mean(1) if heads.ndim == 1 else " + POOLED["pooled"],
                ),
                "the weight is right and the bias is not",
            ),
            "fails without a bias": (pool(bias="convert(bias)"), "AttributeError"),
            "the weight only": (
                pool().replace("return convert(weight), ", "return convert(weight) #"),
                "returns two things",
            ),
            "in place": (
                pool(convert="torch.cat((q, pooled(rows, k.mul_(2)) / 2, pooled(rows, v)))"),
                "changes the weight or bias",
            ),
            "in float32": (pool().replace("convert(weight)", "convert(weight.float())"), "stays in torch.float64"),
        },
        "3.5": {
            "one key too many": (windowed(mask="(behind >= 0) & (behind <= window)"), "one key too many"),
            "one key too few": (windowed(mask="(behind >= 0) & (behind < window - 1)"), "one key too few"),
            "forwards too": (windowed(mask="behind.abs() < window"), "the window reaches backwards only"),
            "forwards only": (windowed(mask="(behind <= 0) & (behind > -window)"), "the window reaches backwards only"),
            "the first query at the first key": (
                windowed(behind="torch.arange(query_length)[:, None] - torch.arange(key_length)"),
                "yours puts the first query at the first",
            ),
            "True is forbidden": (
                windowed(mask="(behind < 0) | (behind >= window)"),
                "True means that a query may look",
            ),
            "no window": (windowed(mask="behind >= 0"), "your mask has no window"),
            "not itself": (windowed(mask="(behind > 0) & (behind <= window)"), "a query sees the key at its own place"),
            "numbers": (windowed(mask="((behind >= 0) & (behind < window)).float()"), "the mask is boolean"),
            "square": (
                windowed(behind="torch.arange(key_length)[:, None] - torch.arange(key_length)"),
                "give a mask (3, 6); yours is (6, 6)",
            ),
            "queries and keys swapped": (
                windowed(mask="((behind >= 0) & (behind < window)).T"),
                "the window reaches backwards only",
            ),
            "blocks of the window": (
                windowed(
                    behind="torch.arange(key_length - query_length, key_length)[:, None]",
                    mask="(behind // window == torch.arange(key_length) // window)"
                    " & (torch.arange(key_length) <= behind)",
                ),
                "query 3 of six queries and six keys sees the keys 1, 2, 3",
            ),
            "queries before the first key at the first key": (
                windowed(
                    behind="torch.arange(key_length - query_length, key_length).clamp(min=0)[:, None] "
                    "- torch.arange(key_length)"
                ),
                "of the keys query 0 should see none; yours sees [0]",
            ),
            "a list": (windowed(mask="((behind >= 0) & (behind < window)).tolist()"), "returns a tensor"),
            "fails with more queries than keys": (
                windowed(
                    behind="torch.arange(key_length)[key_length - query_length:, None] - torch.arange(key_length)"
                ),
                "give a mask",
            ),
        },
        "3.6": {
            "transposed": (kinds(kinds="torch.tensor(rows).T"), "rows are blocks of queries"),
            "one allowed pair at the far edge overlooked": (
                kinds(live="farthest >= 0 and nearest < window - 1"),
                "so it is partial (1); yours says dead (0)",
            ),
            "one pair too many at the far edge": (
                kinds(live="farthest >= 0 and nearest <= window"),
                "so it is dead (0); yours says partial (1)",
            ),
            "the diagonal overlooked": (
                kinds(live="farthest > 0 and nearest < window"),
                "yours says dead (0)",
            ),
            "full one too soon": (
                kinds(full="nearest >= 0 and farthest <= window"),
                "so it is partial (1); yours says full (2)",
            ),
            "full one too late": (
                kinds(full="nearest > 0 and farthest < window"),
                "so it is full (2); yours says partial (1)",
            ),
            "full whatever the window": (kinds(full="nearest >= 0"), "so it is partial (1); yours says full (2)"),
            "judged by the corner": (
                kinds(live="a + key_length - query_length - c >= 0 and a + key_length - query_length - c < window"),
                "so it is",
            ),
            "never full": (kinds(full="False"), "so it is full (2); yours says partial (1)"),
            "never dead below the window": (kinds(live="farthest >= 0"), "so it is dead (0); yours says partial (1)"),
            "the first query at the first key": (kinds(offset="0"), "yours puts the first query at the first key"),
            "the smaller last blocks left out": (
                kinds(a="range(0, query_length - block_size + 1, block_size)"),
                "a last, smaller block counts too",
            ),
            "last blocks as if they were whole": (
                kinds().replace(
                    "b, d = min(a + block_size, query_length) - 1, min(c + block_size, key_length) - 1",
                    "b, d = a + block_size - 1, c + block_size - 1",
                ),
                "yours says",
            ),
            "booleans": (kinds(kinds="torch.tensor(rows) > 0"), "the kinds are int64"),
            "the whole mask": (
                "def block_kinds(n, k, window, size):\n"
                "    mask = window_mask(n, k, window).float()[None]\n"
                "    live = F.max_pool2d(mask, size, ceil_mode=True)[0]\n"
                "    full = -F.max_pool2d(-mask, size, ceil_mode=True)[0]\n"
                "    return (live + full).long()\n" + "from torch.nn import functional as F\n" + BLOCKS.format(**BLOCK),
                "a tensor as large as the whole mask is made",
            ),
            "dense with a mask": (
                KINDS.format(**KIND) + "def block_window_attention(query, key, value, window, block_size):\n"
                "    return attention(query, key, value, mask=window_mask(query.shape[2], key.shape[2], window))\n",
                "compute no score in a dead block",
            ),
            "the whole mask, from a list": (
                "def block_kinds(n, k, window, size):\n"
                "    mask = torch.tensor([[0.0 <= i + k - n - j < window for j in range(k)] for i in range(n)])\n"
                "    mask = F.pad(mask.float(), (0, -k % size, 0, -n % size), value=2.0)\n"
                "    parts = mask.unfold(0, size, size).unfold(1, size, size).flatten(2)\n"
                "    return (parts == 1).any(2).long() + ((parts > 0).all(2) & (parts == 1).any(2)).long()\n"
                "from torch.nn import functional as F\n" + BLOCKS.format(**BLOCK),
                "a tensor as large as the whole mask is made",
            ),
            "every pair, strip by strip": (
                "def block_kinds(n, k, window, size):\n"
                "    rows = []\n"
                "    for start in range(0, n, size):\n"
                "        behind = torch.arange(start, min(start + size, n))[:, None] + k - n - torch.arange(k)\n"
                "        parts = ((behind >= 0) & (behind < window)).split(size, dim=1)\n"
                "        rows.append([int(part.any()) + int(part.all()) for part in parts])\n"
                "    return torch.tensor(rows)\n" + BLOCKS.format(**BLOCK),
                "every pair of a query and a key is looked at, part by part",
            ),
            "not scaled": (
                blocks(
                    out="safe_softmax((some @ key[:, :, first:last].mT).masked_fill(~mask, -math.inf)) "
                    "@ value[:, :, first:last]"
                ),
                "the scale is not: divide the scores by the square root of head_dim, you don't divide",
            ),
            "divided by head_dim": (
                blocks(
                    out="safe_softmax((some @ key[:, :, first:last].mT / 8).masked_fill(~mask, -math.inf)) "
                    "@ value[:, :, first:last]"
                ),
                "you divide by head_dim",
            ),
            "all keys, without a matrix product": (
                KINDS.format(**KIND) + "def block_window_attention(query, key, value, window, block_size):\n"
                "    n, k = query.shape[2], key.shape[2]\n"
                "    outs = []\n"
                "    for i in range(0, n, 2):\n"
                "        scores = (query[:, :, i:i + 2, None] * key[:, :, None]).sum(-1) / query.shape[-1] ** 0.5\n"
                "        behind = torch.arange(i, i + scores.shape[2])[:, None] + k - n - torch.arange(k)\n"
                "        weights = safe_softmax(scores.masked_fill((behind < 0) | (behind >= window), -math.inf))\n"
                "        outs.append(weights @ value)\n"
                "    return torch.cat(outs, 2)\n",
                "compute no score in a dead block",
            ),
            "all keys up to the block": (blocks(first="0"), "compute no score in a dead block"),
            "the whole mask, cut": (
                blocks(mask="window_mask(n, k, window)[start:start + block_size, first:last]"),
                "a tensor as large as the whole mask is made: make masks block by block",
            ),
            "no mask in partial blocks": (blocks(mask="None"), "a partial block still needs its mask"),
            "causal only": (
                blocks(first="0", mask="behind >= 0"),
                "that of causal attention without a window",
            ),
            "the causal mask in live blocks": (blocks(mask="behind >= 0"), "is wrong"),
            "places without the cache": (
                blocks(behind="torch.arange(start, start + some.shape[2])[:, None] - torch.arange(k)[first:last]"),
                "each query stands at its own place",
            ),
            "a softmax for each block": (
                blocks(
                    out="sum(attention(some, key[:, :, c * block_size:(c + 1) * block_size], "
                    "value[:, :, c * block_size:(c + 1) * block_size], "
                    "mask=mask[:, (c - live[0]) * block_size:(c - live[0] + 1) * block_size]) for c in live)"
                ),
                "a query's weights must add up to 1 over all its live blocks together",
            ),
            "float32 comes out": (blocks(out=BLOCK["out"] + ".float()"), "yours is torch.float32"),
            "the last live block left out": (blocks(last="max(live[-1], 1) * block_size"), "is wrong"),
            "the values detached": (
                blocks(out=BLOCK["out"].replace("value[:, :, first:last]", "value[:, :, first:last].detach()")),
                "no gradient reaches the value",
            ),
            "no zeros for queries without keys": (
                blocks().replace("if not live:", "if not live: continue\n        if not live:"),
                "here (2, 2, 9, 5); yours is (2, 2, 5, 5)",
            ),
            "fails on queries without keys": (
                blocks().replace("if not live:", "if False:"),
                "a block of queries without live keys",
            ),
        },
        "3.7": {
            "keys only": (
                cached(bytes="n_layers * n_kv_heads * head_dim * bytes_per_number * kept * sequences"),
                "you count one of the two",
            ),
            "bytes forgotten": (
                cached(bytes="2 * n_layers * n_kv_heads * head_dim * kept * sequences"),
                "you count one of the two",
            ),
            "always 2 bytes": (
                cached(bytes="4 * n_layers * n_kv_heads * head_dim * kept * sequences"),
                "the same model with 1 byte a number takes 32 bytes; yours takes 64",
            ),
            "sequences forgotten": (
                cached(bytes="2 * n_layers * n_kv_heads * head_dim * bytes_per_number * kept"),
                "the same model with 4 sequences takes 256 bytes; yours takes 64",
            ),
            "layers forgotten": (
                cached(bytes="2 * n_kv_heads * head_dim * bytes_per_number * kept * sequences"),
                "one of the two",
            ),
            "the window ignored": (cached(kept="tokens"), "with a window of 10 only 10 of 100 tokens are kept"),
            "always the window": (cached(kept="tokens if window is None else window"), "keeps its own tokens only"),
            "the window kept beside": (
                cached(kept="tokens if window is None else max(tokens - window, window)"),
                "with a window of 10, 100 tokens take 640 bytes",
            ),
            "a float": (cached(bytes=CACHED["bytes"] + " / 1"), "bytes are a whole number"),
            "tokens as a float": (cached(longest="memory_bytes / token"), "tokens are a whole number"),
            "a window for all texts together": (
                cached(
                    kept="tokens * sequences if window is None else min(tokens * sequences, window)",
                    bytes=CACHED["bytes"].replace(" * sequences", ""),
                ),
                "each text has its own window",
            ),
            "the last token never fits": (
                cached(longest="(memory_bytes - 1) // token"),
                "a token that just fits, fits",
            ),
            "rounded up, less one": (
                cached(longest="math.ceil(memory_bytes / token) - 1"),
                "a token that just fits, fits",
            ),
            "rounded up": (cached(longest="-(-memory_bytes // token)"), "round down"),
            "rounded": (cached(longest="round(memory_bytes / token)"), "round down"),
            "one text only": (
                cached(
                    token="token = kv_cache_bytes(n_layers, n_kv_heads, head_dim, 1, bytes_per_number=bytes_per_number)"
                ),
                "two texts share the 1000 bytes",
            ),
            "all texts together": (
                cached(longest="sequences * (memory_bytes // token)"),
                "two texts share the 1000 bytes",
            ),
            "bytes of a number forgotten in the context": (
                cached(token="token = kv_cache_bytes(n_layers, n_kv_heads, head_dim, 1, sequences=sequences)"),
                "in 1 byte a number",
            ),
        },
    }


def test_every_part_has_the_three_levels_of_hints_that_the_notebook_promises():
    assert {len(part.hints) for part in find_exercise("03").parts} == {3}


@pytest.fixture(scope="module")
def solution() -> dict[str, object]:
    return solution_names("03")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_solution_attends_as_torch_does(solution, dtype, causal):
    query, key, value = (torch.randn(2, heads, n, 16, dtype=dtype) for heads, n in ((4, 5), (2, 9), (2, 9)))
    allowed = torch.ones(5, 9, dtype=torch.bool).tril(4 if causal else 9)
    theirs = F.scaled_dot_product_attention(query, key, value, allowed, enable_gqa=True)
    ours = solution["grouped_query_attention"](query, key, value, causal=causal)
    torch.testing.assert_close(ours, theirs, atol=2e-2 if dtype != torch.float32 else 1e-5, rtol=2e-2)


@settings(max_examples=40, deadline=None)
@given(
    keys=st.integers(1, 40), queries=st.integers(1, 40), window=st.integers(1, 45), size=st.sampled_from([1, 3, 8, 16])
)
def test_the_solutions_blocks_are_those_of_flex_attention(solution, keys, queries, window, size):
    """torch's own `create_block_mask`, which looks at every pair (and knows full blocks only where none is smaller)."""
    keys = max(1, keys // size) * size
    queries = min(keys, max(1, queries // size) * size)

    def allowed(b, h, q, k):
        behind = q + keys - queries - k
        return (behind >= 0) & (behind < window)

    theirs = create_block_mask(allowed, None, None, queries, keys, device="cpu", BLOCK_SIZE=size)
    ours = solution["block_kinds"](queries, keys, window, size)
    assert torch.equal((ours > 0).long(), theirs.to_dense()[0, 0].long())
    full = torch.zeros_like(ours)
    for row, (count, where) in enumerate(
        zip(theirs.full_kv_num_blocks[0, 0], theirs.full_kv_indices[0, 0], strict=True)
    ):
        full[row, where[:count].long()] = 1
    assert torch.equal((ours == 2).long(), full)
