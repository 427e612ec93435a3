"""Exercise 09: wrong answers that students may well give, right ones of other kinds; torch's attention as oracle."""

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from minillm.exercises.folder import find_exercise
from minillm.exercises.testing import ExerciseTests, solution_names

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which has Linux wheels only")

STATISTICS = """
def row_statistics(blocks):
    m = total = None
    for block in {blocks}:
        x = {convert}
        if m is None:
            m, total = {start}
        top = {top}
        new = {new}
        base = {base}
        {update}
        m = new
    return {out}
"""
STATED = {
    "blocks": "blocks",
    "convert": "block.to(torch.promote_types(block.dtype, torch.float32))",
    "start": "torch.full_like(x[:, 0], -math.inf), torch.zeros_like(x[:, 0])",
    "top": "x.amax(1)",
    "new": "torch.maximum(m, top)",
    "base": "new.masked_fill(new == -math.inf, 0.0)",
    "update": "total = total * torch.exp(m - base) + torch.exp(x - base[:, None]).sum(1)",
    "out": "m, total",
}


def statistics(**changes: str) -> str:
    """Part 9.1's answer with some of its places filled in otherwise."""
    return STATISTICS.format(**STATED | changes)


MERGE = """
def merge(output_a, lse_a, output_b, lse_b):
    {before}
    top = {top}
    base = {base}
    a, b = {weights}
    total = a + b
    share_a, share_b = {shares}
    output = {output}
    return {out}, {lse}
"""
MERGED = {
    "before": "",
    "top": "torch.maximum(lse_a, lse_b)",
    "base": "top.masked_fill(top == -math.inf, 0.0)",
    "weights": "torch.exp(lse_a - base), torch.exp(lse_b - base)",
    "shares": "a / total.masked_fill(total == 0, 1.0), b / total.masked_fill(total == 0, 1.0)",
    "output": "share_a[..., None] * output_a.to(a.dtype) + share_b[..., None] * output_b.to(a.dtype)",
    "out": "output.to(output_a.dtype)",
    "lse": "base + torch.log(total)",
}


def merging(**changes: str) -> str:
    """Part 9.2's answer with some of its places filled in otherwise."""
    return MERGE.format(**MERGED | changes)


ATTEND = """
def attend(query, key, value, tile, *, scale=None):
    dtype = {dtype}
    scale = {scale}
    q = {query}
    m, total = {start}
    output = q.new_zeros(len(query), value.shape[1])
    for start in range({range}):
        k, v = {tile}
        scores = {scores}
        new = torch.maximum(m, scores.amax(1))
        p = torch.exp(scores - new[:, None])
        f = torch.exp(m - new)
        {update}
        m = new
    return {out}, {lse}
"""
ATTENDED = {
    "dtype": "torch.promote_types(query.dtype, torch.float32)",
    "scale": "query.shape[1] ** -0.5 if scale is None else scale",
    "query": "query.to(dtype)",
    "start": "q.new_full((len(q),), -math.inf), q.new_zeros(len(q))",
    "range": "0, len(key), tile",
    "tile": "key[start : start + tile].to(dtype), value[start : start + tile].to(dtype)",
    "scores": "q @ k.T * scale",
    "update": "total, output = total * f + p.sum(1), output * f[:, None] + p @ v",
    "out": "(output / total[:, None]).to(query.dtype)",
    "lse": "m + total.log()",
}


def attending(**changes: str) -> str:
    """Part 9.3's answer with some of its places filled in otherwise."""
    return ATTEND.format(**ATTENDED | changes)


TILES = """
def visited_tiles(first, stop, query_length, key_length, tile, *, window=None):
    offset = {offset}
    lowest, highest = {places}
    w = {window}
    some, every = {some}, {every}
    tiles = []
    for start in range({range}):
        end = {end}
        tiles.append((start, end, {masked}))
    return {out}
"""
VISITED = {
    "offset": "key_length - query_length",
    "places": "first + offset, stop - 1 + offset",
    "window": "key_length + query_length if window is None else window",
    "some": "max(0, lowest - w + 1)",
    "every": "highest - w + 1",
    "range": "some // tile * tile, highest + 1, tile",
    "end": "min(start + tile, key_length)",
    "masked": "start < every or end - 1 > lowest",
    "out": "tiles",
}


def visiting(**changes: str) -> str:
    """Part 9.4's answer with some of its places filled in otherwise."""
    return TILES.format(**VISITED | changes)


GRADIENTS = """
def row_delta(output, d_output):
    dtype = torch.promote_types(output.dtype, torch.float32)
    return {delta}

def tile_gradients(query, key, value, d_output, lse, delta, scale, *, seen=None):
    dtype = {dtype}
    q, k, v, do = (a.to(dtype) for a in (query, key, value, d_output))
    s = {scores}
    if seen is not None:
        s = {mask}
    base = {base}
    p = {p}
    dp = {dp}
    ds = {ds}
    return {dq}, {dk}, {dv}
"""
DERIVED = {
    "delta": "(output.to(dtype) * d_output.to(dtype)).sum(1)",
    "dtype": "torch.promote_types(query.dtype, torch.float32)",
    "scores": "scale * q @ k.T",
    "mask": "s.masked_fill(~seen, -math.inf)",
    "base": "lse.masked_fill(lse == -math.inf, 0.0)",
    "p": "torch.exp(s - base[:, None])",
    "dp": "do @ v.T",
    "ds": "p * (dp - delta[:, None])",
    "dq": "scale * ds @ k",
    "dk": "scale * ds.T @ q",
    "dv": "p.T @ do",
}


def deriving(**changes: str) -> str:
    """Part 9.5's answer with some of its places filled in otherwise."""
    return GRADIENTS.format(**DERIVED | changes)


SOFTMAX = """
@triton.jit
def softmax_kernel(x_ptr, y_ptr, n_columns, x_row_stride, x_column_stride, y_row_stride, BLOCK: tl.constexpr):
    row = {row}
    columns = tl.arange(0, BLOCK)
    inside = columns < n_columns
    x = tl.load({x}, {load}){convert}
    top = tl.max(x, axis=0)
    top = {top}
    e = {e}
    total = tl.sum(e, axis=0)
    total = {total}
    tl.store({y}, {value}, {store})

def fused_softmax(x):
    {before}
    y = {out}
    if len(x):
        {launch}
    return y
"""
FUSED = {
    "row": "tl.program_id(0).to(tl.int64)",
    "x": "x_ptr + row * x_row_stride + columns * x_column_stride",
    "load": "mask=inside, other=-float('inf')",
    "convert": ".to(tl.float32)",
    "top": "tl.where(top == -float('inf'), 0.0, top)",
    "e": "tl.exp(x - top)",
    "total": "tl.where(total == 0.0, 1.0, total)",
    "y": "y_ptr + row * y_row_stride + columns",
    "value": "e / total",
    "store": "mask=inside",
    "before": "",
    "out": "torch.empty(x.shape, dtype=x.dtype, device=x.device)",
    "launch": "softmax_kernel[(len(x),)](x, y, x.shape[1], *x.stride(), y.stride(0), "
    "BLOCK=triton.next_power_of_2(x.shape[1]))",
}


def fusing(**changes: str) -> str:
    """Part 9.6's answer with some of its places filled in otherwise."""
    return SOFTMAX.format(**FUSED | changes)


PRODUCT = """
@triton.jit
def product_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, a_row_stride, a_column_stride, b_row_stride, b_column_stride, c_row_stride,
    c_column_stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    rows = {rows}
    columns = {columns}
    sums = tl.zeros((BLOCK_M, BLOCK_N), {sums})
    for start in range({range}):
        places = {places}
        a = tl.load({a}, {load_a})
        b = tl.load({b}, {load_b})
        {add}
    tl.store({c}, sums, {store})

def product(a, b, block_m=32, block_n=32, block_k=32):
    c = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    grid = triton.cdiv(c.shape[0], block_m), triton.cdiv(c.shape[1], block_n)
    strides = *a.stride(), *b.stride(), *c.stride()
    product_kernel[grid](a, b, c, *c.shape, a.shape[1], *strides, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k)
    return c
"""
PRODUCED = {
    "rows": "tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)",
    "columns": "tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)",
    "sums": "tl.float32",
    "range": "0, K, BLOCK_K",
    "places": "start + tl.arange(0, BLOCK_K)",
    "a": "a_ptr + rows[:, None] * a_row_stride + places[None, :] * a_column_stride",
    "load_a": "mask=(rows < M)[:, None] & (places < K)[None, :], other=0.0",
    "b": "b_ptr + places[:, None] * b_row_stride + columns[None, :] * b_column_stride",
    "load_b": "mask=(places < K)[:, None] & (columns < N)[None, :], other=0.0",
    "add": "sums += tl.dot(a, b, input_precision='ieee')",
    "c": "c_ptr + rows[:, None] * c_row_stride + columns[None, :] * c_column_stride",
    "store": "mask=(rows < M)[:, None] & (columns < N)[None, :]",
}


def producing(**changes: str) -> str:
    """Part 9.7's answer with some of its places filled in otherwise."""
    return PRODUCT.format(**PRODUCED | changes)


RIGHT = {
    "the template of 9.1": ("9.1", statistics()),
    "the first block apart": (
        "9.1",
        """
def row_statistics(blocks):
    blocks = iter(blocks)
    def convert(x):
        return x.double() if x.dtype == torch.float64 else x.float()
    x = convert(next(blocks))
    m = x.max(1).values
    l = torch.exp(x - m[:, None]).nan_to_num(0.0).sum(1)
    for block in blocks:
        x = convert(block)
        new = torch.maximum(m, x.max(1).values)
        l = (l * torch.exp(m - new)).nan_to_num(0.0) + torch.exp(x - new[:, None]).nan_to_num(0.0).sum(1)
        m = new
    return m, l
""",
    ),
    "each block's own sum, brought to the new maximum": (
        "9.1",
        statistics(
            base="top.masked_fill(top == -math.inf, 0.0)",
            update="own = torch.exp(x - base[:, None]).sum(1); "
            "total = torch.where(new == -math.inf, 0.0, total * torch.exp(m - new) + own * torch.exp(top - new))",
        ),
    ),
    "column by column": (
        "9.1",
        """
def row_statistics(blocks):
    m = None
    for block in blocks:
        for x in block.to(torch.promote_types(block.dtype, torch.float32)).unbind(1):
            if m is None:
                m, l = torch.full_like(x, -math.inf), torch.zeros_like(x)
            new = torch.where(x > m, x, m)
            grown = l * torch.exp(m - new) + torch.exp(x - new)
            m, l = new, torch.where(new > -math.inf, grown, 0)
    return m, l
""",
    ),
    "kept sums and maxima of the blocks": (
        "9.1",
        """
def row_statistics(blocks):
    tops, sums = [], []
    for block in blocks:
        x = block.to(torch.promote_types(block.dtype, torch.float32))
        tops.append(x.amax(1))
        sums.append(torch.exp(x - tops[-1].nan_to_num(neginf=0.0)[:, None]).sum(1))
    m = torch.stack(tops).amax(0)
    base = m.nan_to_num(neginf=0.0)
    return [m, sum(l * torch.exp(top - base) for top, l in zip(tops, sums, strict=True))]
""",
    ),
    "the template of 9.2": ("9.2", merging()),
    "query by query": (
        "9.2",
        """
def merge(output_a, lse_a, output_b, lse_b):
    if lse_a.dim():
        found = [merge(*each) for each in zip(output_a, lse_a, output_b, lse_b, strict=True)]
        return tuple(map(torch.stack, zip(*found, strict=True)))
    lse = torch.logaddexp(lse_a, lse_b)
    a, b = (math.exp(one - lse) if one > -math.inf else 0.0 for one in (lse_a.item(), lse_b.item()))
    wide = torch.promote_types(output_a.dtype, torch.float32)
    return (a * output_a.to(wide) + b * output_b.to(wide)).to(output_a.dtype), lse
""",
    ),
    "logaddexp": (
        "9.2",
        """
def merge(output_a, lse_a, output_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    a, b = (torch.exp(one - lse).nan_to_num(0.0).unsqueeze(-1) for one in (lse_a, lse_b))
    return (a * output_a + b * output_b).to(output_a.dtype), lse
""",
    ),
    "one softmax of two": (
        "9.2",
        """
def merge(output_a, lse_a, output_b, lse_b):
    both = torch.stack((lse_a, lse_b))
    weights = both.softmax(0).nan_to_num(0.0)[..., None]
    outputs = torch.stack((output_a, output_b)).to(weights.dtype)
    return (weights * outputs).sum(0).to(output_a.dtype), both.logsumexp(0)
""",
    ),
    "a sigmoid of the difference": (
        "9.2",
        """
def merge(output_a, lse_a, output_b, lse_b):
    nothing = (lse_a == -math.inf) & (lse_b == -math.inf)
    share = torch.sigmoid(torch.where(nothing, 0.0, lse_b - lse_a)).unsqueeze(-1)
    output = output_a.to(share.dtype) * (1 - share) + share * output_b.to(share.dtype)
    low, high = torch.minimum(lse_a, lse_b), torch.maximum(lse_a, lse_b)
    lse = high + torch.log1p(torch.exp(torch.where(nothing, -math.inf, low - high)))
    return output.to(output_a.dtype), lse
""",
    ),
    "the template of 9.3": ("9.3", attending()),
    "divided in every tile": (
        "9.3",
        """
def attend(query, key, value, tile, *, scale=None):
    wide = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[1] ** -0.5 if scale is None else scale
    lse, output = torch.full((len(query),), -math.inf, dtype=wide), torch.zeros(len(query), value.shape[1], dtype=wide)
    for k, v in reversed(list(zip(key.to(wide).split(tile), value.to(wide).split(tile), strict=True))):
        scores = torch.einsum("md,nd->mn", query.to(wide), k) * scale
        top = scores.amax(1)
        new = torch.logaddexp(lse, top + torch.exp(scores - top[:, None]).sum(1).log())
        output = output * torch.exp(lse - new)[:, None] + torch.exp(scores - new[:, None]) @ v
        lse = new
    return output.to(query.dtype), lse
""",
    ),
    "a quotient in every tile, as FlashAttention-1 has it": (
        "9.3",
        attending(
            update="grown = total * f + p.sum(1); "
            "output = output * (total * f / grown)[:, None] + (p / grown[:, None]) @ v; total = grown",
            out="output.to(query.dtype)",
        ),
    ),
    "key by key in the last tile, split": (
        "9.3",
        attending(
            range="0, (len(key) + tile - 1) // tile",
            tile="key[start * tile :][:tile].to(dtype), value[start * tile :][:tile].to(dtype)",
        ),
    ),
    "a tile padded with -inf": (
        "9.3",
        attending(
            tile="torch.nn.functional.pad(key[start:start + tile].to(dtype), "
            "(0, 0, 0, max(0, start + tile - len(key)))), "
            "torch.nn.functional.pad(value[start:start + tile].to(dtype), "
            "(0, 0, 0, max(0, start + tile - len(key))))",
            scores="(q @ k.T * scale).masked_fill(torch.arange(start, start + tile) >= len(key), -math.inf)",
        ),
    ),
    "powers of two": (
        "9.3",
        attending(
            scores="q @ k.T * (scale / math.log(2))",
            update="p, f = torch.exp2(scores - new[:, None]), torch.exp2(m - new); "
            "total, output = total * f + p.sum(1), output * f[:, None] + p @ v",
            lse="(m + total.log2()) * math.log(2)",
        ),
    ),
    "the template of 9.4": ("9.4", visiting()),
    "tile by tile while one is seen": (
        "9.4",
        """
def visited_tiles(first, stop, query_length, key_length, tile, *, window=None):
    low = key_length - query_length + first
    high = low + stop - first - 1
    t = 0 if window is None or low < window else (low - window + 1) // tile
    found = []
    while t * tile <= high:
        a, b = t * tile, min(key_length, (t + 1) * tile)
        whole = b <= low + 1 and (window is None or a > high - window)
        found.append([a, b, not whole])
        t += 1
    return found
""",
    ),
    "the template of 9.5": ("9.5", deriving()),
    "row by row": (
        "9.5",
        """
def row_delta(output, d_output):
    wide = torch.promote_types(output.dtype, torch.float32)
    return torch.einsum("ic,ic->i", output.to(wide), d_output.to(wide))

def tile_gradients(query, key, value, d_output, lse, delta, scale, *, seen=None):
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key, value, d_output = query.to(wide), key.to(wide), value.to(wide), d_output.to(wide)
    dq, dk, dv = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for i in range(len(query)):
        for j in range(len(key)):
            if seen is None or seen[i, j]:
                p = torch.exp((query[i] * key[j]).sum() * scale - lse[i])
                ds = p * ((d_output[i] * value[j]).sum() - delta[i])
                dq[i] += ds * key[j] * scale
                dk[j] += ds * query[i] * scale
                dv[j] += p * d_output[i]
    return dq, dk, dv
""",
    ),
    "zeros after the exponential": (
        "9.5",
        deriving(
            mask="s",
            base="lse",
            p="torch.where(seen, torch.exp(s - base[:, None]), 0.0) if seen is not None "
            "else torch.exp(s - base[:, None])",
        ),
    ),
    "the scale on the queries": (
        "9.5",
        deriving(scores="(q := q * scale) @ k.T", dk="ds.T @ q"),
    ),
    "the template of 9.6": ("9.6", fusing()),
    "the maximum by where, the sum by where": (
        "9.6",
        fusing(
            load="mask=inside, other=0.0",
            top="tl.max(tl.where(inside, x, -float('inf')), axis=0)",
            e="tl.where(inside & (x > -float('inf')), tl.exp(x - top), 0.0)",
        ),
    ),
    "powers of two in the kernel": ("9.6", fusing(e="tl.exp2((x - top) * 1.4426950408889634)")),
    "pointers first": (
        "9.6",
        fusing(
            row="tl.program_id(0).to(tl.int64); x_ptr += row * x_row_stride; y_ptr += row * y_row_stride",
            x="x_ptr + columns * x_column_stride",
            y="y_ptr + columns",
        ),
    ),
    "the template of 9.7": ("9.7", producing()),
    "pointers that move on": (
        "9.7",
        producing(
            sums="tl.float32); inner = tl.arange(0, BLOCK_K); "
            "a_tile = a_ptr + rows[:, None] * a_row_stride + inner[None, :] * a_column_stride; "
            "b_tile = b_ptr + inner[:, None] * b_row_stride + columns[None, :] * b_column_stride; (0",
            range="0, tl.cdiv(K, BLOCK_K)",
            places="inner + start * BLOCK_K",
            a="a_tile",
            b="b_tile",
            add="sums = tl.dot(a, b, sums, input_precision='ieee'); a_tile += BLOCK_K * a_column_stride; "
            "b_tile += BLOCK_K * b_row_stride",
        ),
    ),
}


class TestExercise09(ExerciseTests):
    exercise = "09"
    right_answers = RIGHT
    wrong_answers = {  # noqa: RUF012
        "9.1": {
            "a large number, -inf put back at the end": (
                statistics(
                    start="torch.full_like(x[:, 0], -1e9), torch.zeros_like(x[:, 0])",
                    out="m.masked_fill(total == 0, -math.inf), total",
                ),
                "a negative number, however large, is not",
            ),
            "a small number, large enough to see": (statistics(out="m, total + 1e-6"), "is a small number added?"),
            "float32 on the way": (
                statistics(
                    convert="block.float()",
                    out="[one.to(torch.promote_types(block.dtype, torch.float32)) for one in (m, total)]",
                ),
                "your m is right to a few digits only",
            ),
            "as wide as the first block": (
                statistics(
                    start="torch.full_like(x, -math.inf), torch.zeros_like(x)",
                    top="x",
                    update="total = total * torch.exp(m - base) + torch.exp(x - base)",
                    out="(m.amax(1), (total * torch.exp(m - m.amax(1, keepdim=True).nan_to_num(neginf=0))).sum(1))",
                ),
                "as wide as the first",
            ),
            "two blocks only": (
                statistics(blocks="[one for _, one in zip(range(2), blocks)]"),
                "does every block count",
            ),
            "the sum not rescaled": (
                statistics(update="total = total + torch.exp(x - base[:, None]).sum(1)"),
                "the sum so far belongs to the old maximum",
            ),
            "rescaled the wrong way round": (
                statistics(update="total = total * torch.exp(base - m) + torch.exp(x - base[:, None]).sum(1)"),
                "but exp(m_new - m) is inf",
            ),
            "rescaled the wrong way round after the first block": (
                statistics(
                    update="total = torch.where(m == -math.inf, 0.0, total * torch.exp(base - m)) "
                    "+ torch.exp(x - base[:, None]).sum(1)"
                ),
                "exp(m_new - m), the wrong way round",
            ),
            "both rescaled": (
                statistics(update="total = (total + torch.exp(x - base[:, None]).sum(1)) * torch.exp(m - base)"),
                "the new block's sum is rescaled too",
            ),
            "the old maximum for the new block": (
                statistics(update="total = total * torch.exp(m - base) + torch.exp(x - m[:, None]).sum(1)"),
                "the old maximum, which is -inf before any block",
            ),
            "the block's own maximum": (
                statistics(update="total = total * torch.exp(m - base) + torch.exp(x - top[:, None]).sum(1)"),
                "with its own maximum, not with m_new",
            ),
            "every block its own": (
                statistics(update="total = total + torch.exp(x - top[:, None]).sum(1)"),
                "the sum so far belongs to the old maximum",
            ),
            "the last block only": (
                statistics(update="total = torch.exp(x - base[:, None]).sum(1)"),
                "only the last block",
            ),
            "the last block's maximum": (statistics(new="top"), "that of the last block"),
            "the first block's maximum": (
                statistics(new="torch.where(m == -math.inf, top, m)"),
                "that of the first block",
            ),
            "no maximum": (
                statistics(update="total = total + torch.exp(x).sum(1)"),
                "the maximum is not taken off",
            ),
            "begins at 0": (
                statistics(start="torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0])"),
                "before any block m is -inf, not 0",
            ),
            "begins with 1": (
                statistics(
                    update="total = torch.where(m == -math.inf, 1.0, total * torch.exp(m - base)) "
                    "+ torch.exp(x - base[:, None]).sum(1)"
                ),
                "before any block l is 0",
            ),
            "the log-sum-exp": (statistics(out="m, m + total.log()"), "that is the log-sum-exp"),
            "the logarithm": (statistics(out="m, total.log()"), "that is the logarithm"),
            "one maximum for all rows": (statistics(top="x.max().expand(len(x))"), "each row has its own"),
            "-inf less -inf": (statistics(base="new"), "NaN; is that exp(inf - inf)?"),
            "-inf known for all rows or none": (
                statistics(
                    base="new",
                    update="total = 0 * total if (new == -math.inf).any() else "
                    "total * torch.exp(m - base) + torch.exp(x - base[:, None]).sum(1)",
                ),
                "row by row",
            ),
            "a large number instead of -inf": (
                statistics(start="torch.full_like(x[:, 0], -1e9), torch.zeros_like(x[:, 0])"),
                "m is -inf",
            ),
            "clamped": (statistics(base="new.clamp(-80, 80)"), "does an exponential overflow"),
            "the dtype of the blocks": (statistics(convert="block"), "float32; yours is in torch.bfloat16"),
            "converted at the end": (
                statistics(
                    convert="block", out="(m.float(), total.float()) if m.dtype == torch.bfloat16 else (m, total)"
                ),
                "bfloat16 cannot count that far",
            ),
            "exponentials in half precision": (
                statistics(
                    start="(torch.full_like(x[:, 0], -math.inf), torch.zeros_like(x[:, 0]))",
                    update="total = total * torch.exp(m - base) "
                    "+ torch.exp((x - base[:, None]).to(block.dtype)).to(x.dtype).sum(1)",
                ),
                "rounded to 8 bits",
            ),
            "float32 always": (statistics(convert="block.float()"), "yours is in torch.float32"),
            "a small number added": (statistics(out="m, total + 1e-8 * (total > 0)"), "a small number added"),
            "all blocks kept": (
                """
def row_statistics(blocks):
    kept = [a.to(torch.promote_types(a.dtype, torch.float32)) for a in blocks]
    m = torch.stack([a.amax(1) for a in kept]).amax(0)
    base = m.masked_fill(m == -math.inf, 0.0)
    return m, torch.stack([torch.exp(a - base[:, None]).sum(1) for a in kept]).sum(0)
""",
                "keep m and l only",
            ),
            "all blocks side by side": (
                """
def row_statistics(blocks):
    x = torch.cat(list(blocks), 1)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    m = x.amax(1)
    return m, torch.exp(x - m.masked_fill(m == -math.inf, 0.0)[:, None]).sum(1)
""",
                "keep m and l only",
            ),
            "two passes": (
                """
def row_statistics(blocks):
    m = l = None
    for block in blocks:
        x = block.to(torch.promote_types(block.dtype, torch.float32))
        m = x.amax(1) if m is None else torch.maximum(m, x.amax(1))
    l = torch.zeros_like(m)
    for block in blocks:
        l = l + torch.exp(block - m[:, None]).sum(1)
    return m, l
""",
                "a second loop over it sees nothing",
            ),
            "by index": (
                "def row_statistics(blocks):\n    return blocks[0].amax(1), blocks[0].exp().sum(1)",
                "blocks can only be gone through",
            ),
            "its length": (
                "def row_statistics(blocks):\n    return [blocks for i in range(len(blocks))]",
                "blocks can only be gone through",
            ),
            "written into the block": (
                statistics(update="total = total * torch.exp(m - base) + block.sub_(base[:, None]).exp_().sum(1)"),
                "changes a block",
            ),
            "torch's own": (
                statistics(update="total = torch.logsumexp(x, 1).exp()"),
                "uses",
            ),
            "one thing": (statistics(out="total"), "returns two tensors"),
            "columns kept": (statistics(out="m[:, None], total[:, None]"), "m has one number for each row"),
        },
        "9.2": {
            "a small number, large enough to see": (
                merging(shares="a / (total + 1e-6), b / (total + 1e-6)"),
                "is a small number added?",
            ),
            "base 2 after the maximum": (merging(lse="base + torch.log2(total)"), "the logarithm has base 2"),
            "two dimensions taken for granted": (
                merging(output="share_a[:, :, None] * output_a + share_b[:, :, None] * output_b"),
                "one more dimension at the end",
            ),
            "a far lower limit": (merging(base="top.clamp(min=-1e4)"), "a large negative number does not"),
            "one maximum for a column": (
                merging(
                    top="(t := torch.maximum(lse_a, lse_b)).amax(0, keepdim=True).expand_as(t) if lse_a.dim() > 1 else "
                    "torch.maximum(lse_a, lse_b)"
                ),
                "the largest lse of all queries",
            ),
            "a view": (
                merging(before="output_a.view(-1, output_a.shape[-1])"),
                "reshape takes it, view does not",
            ),
            "one query's weight of no dimension": (
                merging(
                    output="share_a * output_a + share_b * output_b if lse_a.dim() == 0 else "
                    "share_a[..., None] * output_a + share_b[..., None] * output_b"
                ),
                "one query in bfloat16",
            ),
            "the mean": (merging(output="(output_a + output_b) / 2"), "that is their mean"),
            "the sum": (merging(output="output_a + output_b"), "that is their sum"),
            "weights swapped": (
                merging(output="share_b[..., None] * output_a + share_a[..., None] * output_b"),
                "the wrong way round",
            ),
            "the lse as weights": (
                merging(shares="lse_a / (lse_a + lse_b), lse_b / (lse_a + lse_b)"),
                "the lse themselves are the weights",
            ),
            "not divided": (merging(shares="lse_a.exp(), lse_b.exp()"), "not divided by the sum of the weights"),
            "not divided, maximum taken off": (merging(shares="a, b"), "their sum is not divided by"),
            "divided by two": (merging(shares="a / 2, b / 2"), "divided by two"),
            "the larger one": (
                merging(shares="(lse_a > lse_b).to(a.dtype), (lse_a <= lse_b).to(a.dtype)"),
                "the side with the larger lse",
            ),
            "the larger lse": (merging(lse="top"), "that is the larger one"),
            "the sum of the lse": (merging(lse="lse_a + lse_b"), "that is their sum"),
            "the mean of the lse": (merging(lse="(lse_a + lse_b) / 2"), "that is their mean"),
            "log of the mean": (merging(lse="base + torch.log(total / 2)"), "not of their sum"),
            "maximum not put back": (merging(lse="torch.log(total)"), "is not put back"),
            "maximum taken off twice": (merging(lse="torch.log(total) - base"), "taken off twice"),
            "without the logarithm": (merging(lse="lse_a.exp() + lse_b.exp()"), "the logarithm is left out"),
            "base 2": (merging(lse="torch.log2(lse_a.exp() + lse_b.exp())"), "the logarithm is the natural one"),
            "nothing on both sides": (merging(base="top"), "neither side saw anything: your"),
            "0 / 0": (merging(shares="a / total, b / total"), "neither side saw anything: your output holds NaN"),
            "nothing known for one query only": (
                merging(
                    before="if (lse_a == -math.inf).all() and (lse_b == -math.inf).all(): return output_a, lse_a",
                    base="top",
                ),
                "one query of two saw nothing",
            ),
            "a small number in the sum": (
                merging(shares="a / (total + 1e-9), b / (total + 1e-9)", lse="base + torch.log(total)"),
                "a small number added",
            ),
            "no maximum": (merging(base="torch.zeros_like(top)"), "does an exponential overflow"),
            "one maximum for all": (
                merging(top="torch.maximum(lse_a, lse_b).max().expand_as(lse_a)"),
                "the largest lse of all queries",
            ),
            "the smaller taken off": (merging(top="torch.minimum(lse_a, lse_b)"), "does an exponential overflow"),
            "a weight for a column": (
                merging(output="share_a * output_a.to(a.dtype) + share_b * output_b.to(a.dtype)"),
                "belongs to its whole row",
            ),
            "in the dtype of the lse": (merging(out="output"), "comes back in torch.bfloat16"),
            "weights in half precision": (
                merging(
                    output="share_a[..., None].to(output_a.dtype) * output_a "
                    "+ share_b[..., None].to(output_a.dtype) * output_b"
                ),
                "further from the exact one than one rounding",
            ),
            "the lse in half precision": (
                merging(
                    before="lse = (lse_a.to(output_a.dtype), lse_b.to(output_a.dtype)); "
                    "kept = lse_a.dtype; lse_a, lse_b = lse[0].to(kept), lse[1].to(kept)"
                ),
                "further from the exact one",
            ),
            "float32 always": (
                merging(
                    before="kept = lse_a.dtype; lse_a, lse_b = lse_a.float(), lse_b.float()",
                    lse="(base + torch.log(total)).to(kept)",
                ),
                "right to a few digits only",
            ),
            "one thing": (merging().replace(", base + torch.log(total)", ""), "merge returns two tensors"),
            "written into side a": (
                merging(out="output_a.copy_(output)"),
                "changes a tensor that it was given",
            ),
            "minillm's own": ("from minillm.layers.online_softmax import merge", "uses minillm.layers"),
        },
        "9.3": {
            "0 is no scale": (
                attending(scale="scale or query.shape[1] ** -0.5"),
                "scale=0.0: the scale that is given is not used",
            ),
            "the maximum before the scale": (
                attending().replace("scores.amax(1)", "(q @ k.T).amax(1) * scale"),
                "scale=-5: the output holds NaN",
            ),
            "a far lower start": (
                attending(start="q.new_full((len(q),), -1e9), q.new_zeros(len(q))"),
                "4 scores of -1e12: the output holds NaN",
            ),
            "exponentials rounded": (
                attending(
                    update="total, output = total * f + p.sum(1), output * f[:, None] + p.to(query.dtype).to(dtype) @ v"
                ),
                "rounded before they meet the values",
            ),
            "scaled in half precision": (
                attending(query="(query * scale).to(dtype)", scores="q @ k.T"),
                "the lse is off by",
            ),
            "a small number, small enough": (
                attending(out="(output / (total[:, None] + 1e-8)).to(query.dtype)"),
                "is a small number added?",
            ),
            "a view": (
                attending(query="query.view(-1).view(query.shape).to(dtype)"),
                "reshape takes it, view does not",
            ),
            "no scale": (attending(scores="q @ k.T"), "the scores are not scaled"),
            "the scale given not used": (
                attending(scale="query.shape[1] ** -0.5"),
                "the scale that is given is not used",
            ),
            "divided by d": (
                attending(scale="1 / query.shape[1] if scale is None else scale"),
                "divided by d, not by its root",
            ),
            "multiplied by the root": (
                attending(scale="query.shape[1] ** 0.5 if scale is None else scale"),
                "multiplied by sqrt(d)",
            ),
            "the width of the values": (
                attending(scale="value.shape[1] ** -0.5 if scale is None else scale"),
                "the width of the values",
            ),
            "scaled twice": (
                attending(query="query.to(dtype) * query.shape[1] ** -0.5"),
                "or is the scale used twice?",
            ),
            "the sum not rescaled": (
                attending(update="total, output = total + p.sum(1), output * f[:, None] + p @ v"),
                "the sum is not rescaled",
            ),
            "the output not rescaled": (
                attending(update="total, output = total * f + p.sum(1), output + p @ v"),
                "the output is not rescaled",
            ),
            "neither rescaled": (
                attending(update="total, output = total + p.sum(1), output + p @ v"),
                "neither sum nor output are rescaled",
            ),
            "wrong sign": (
                attending(
                    update="f = torch.where(m > -math.inf, torch.exp(new - m), 0.0); "
                    "total, output = total * f + p.sum(1), output * f[:, None] + p @ v"
                ),
                "the output differs",
            ),
            "divided in every tile": (
                attending(
                    update="total = total * f + p.sum(1); output = (output * f[:, None] + p @ v) / total[:, None]",
                    out="output.to(query.dtype)",
                ),
                "is it divided by the sum in every tile?",
            ),
            "never divided": (attending(out="output.to(query.dtype)"), "is it divided?"),
            "the tiles' mean": (
                attending(
                    update="total = total * f + p.sum(1); own = torch.exp(scores - scores.amax(1, keepdim=True)); "
                    "output = output + (own / own.sum(1, keepdim=True)) @ v / -(-len(key) // tile)",
                    out="output.to(query.dtype)",
                ),
                "the mean of the tiles' own results",
            ),
            "the last tile's result": (
                attending(
                    update="total = total * f + p.sum(1); own = torch.exp(scores - scores.amax(1, keepdim=True)); "
                    "output = (own / own.sum(1, keepdim=True)) @ v",
                    out="output.to(query.dtype)",
                ),
                "that is the last tile's result",
            ),
            "the shorter tile left out": (
                attending(range="0, max(len(key) // tile * tile, 1), tile"),
                "the last tile, which is shorter, is left out",
            ),
            "the shorter tile filled with zeros": (
                attending(
                    tile="*(torch.nn.functional.pad(a[start : start + tile].to(dtype), "
                    "(0, 0, 0, max(0, start + tile - len(key)))) for a in (key, value)),"
                )
                .replace("k, v = *", "k, v = ")
                .replace(")),\n", "))\n"),
                "filled up with zeros",
            ),
            "the last key left out": (
                attending(
                    tile="key[start : start + tile][: len(key) - 1 - start or None].to(dtype), "
                    "value[start : start + tile][: len(key) - 1 - start or None].to(dtype)"
                ),
                "the last key is left out",
            ),
            "the maximum as lse": (attending(lse="m"), "that is the maximum"),
            "the sum as lse": (attending(lse="total"), "the sum of the exponentials"),
            "log l": (attending(lse="total.log()"), "the maximum is not added"),
            "the maximum taken off": (attending(lse="total.log() - m"), "taken off instead of added"),
            "m + l": (attending(lse="m + total"), "without the logarithm"),
            "log2": (attending(lse="m + total.log2()"), "the logarithm has base 2"),
            "base 2": (attending(lse="(m + total.log()) / math.log(2)"), "in base 2"),
            "the negative": (attending(lse="-m - total.log()"), "its sign is wrong"),
            "no running maximum": (
                attending(
                    update="p = torch.exp(scores); total, output = total + p.sum(1), output + p @ v", lse="total.log()"
                ),
                "the running maximum is taken off first",
            ),
            "begins at 0": (
                attending(start="q.new_zeros(len(q)), q.new_zeros(len(q))"),
                "before any tile it is -inf",
            ),
            "products in half precision": (
                attending(
                    scores="(q.to(query.dtype) @ k.to(query.dtype).T).to(dtype) * scale",
                ),
                "convert queries and keys before their product",
            ),
            "the running maximum in half precision": (
                attending(
                    update="new = new.to(query.dtype).to(dtype); "
                    "p, f = torch.exp(scores - new[:, None]), torch.exp(m - new); "
                    "total, output = (total * f).to(query.dtype).to(dtype) + p.sum(1), output * f[:, None] + p @ v"
                ),
                "the lse is off by",
            ),
            "the output in half precision": (
                attending(
                    update="total, output = total * f + p.sum(1), "
                    "(output * f[:, None] + p @ v).to(query.dtype).to(dtype)"
                ),
                "it grows in float32",
            ),
            "everything in half precision": (attending(dtype="query.dtype"), "the lse is in torch.float32"),
            "the output in float32": (attending(out="output / total[:, None]"), "comes back in torch.bfloat16"),
            "float32 always": (attending(dtype="torch.float32"), "the lse is in torch.float64"),
            "a small number added": (
                attending(out="(output / (total + 1e-9)[:, None]).to(query.dtype)"),
                "a small number added",
            ),
            "all scores at once": (
                """
def attend(query, key, value, tile, *, scale=None):
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    scores = q @ k.T * (query.shape[1] ** -0.5 if scale is None else scale)
    m = scores.amax(1, keepdim=True)
    p = torch.exp(scores - m)
    return (p @ v / p.sum(1, keepdim=True)).to(query.dtype), m[:, 0] + p.sum(1).log()
""",
                "that is the whole score matrix",
            ),
            "tiles kept": (
                """
def attend(query, key, value, tile, *, scale=None):
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[1] ** -0.5 if scale is None else scale
    tiles = [q @ a.T * scale for a in k.split(tile)]
    m = torch.stack([a.amax(1) for a in tiles]).amax(0)[:, None]
    l = sum(torch.exp(a - m).sum(1) for a in tiles)
    o = sum(torch.exp(a - m) @ b for a, b in zip(tiles, v.split(tile)))
    return (o / l[:, None]).to(query.dtype), m[:, 0] + l.log()
""",
                "are all tiles kept?",
            ),
            "torch's attention": (
                "def attend(query, key, value, tile, *, scale=None):\n"
                "    return torch.nn.functional.scaled_dot_product_attention(query, key, value), query[:, 0]",
                "uses torch.nn.functional.scaled_dot_product_attention",
            ),
            "a factor for each column": (
                attending(update="total, output = total * f + p.sum(1), output * f + p @ v"),
                "where they meet a row",
            ),
            "keys not transposed": (attending(scores="q @ k * scale"), "sizes differ"),
            "one thing": (attending().replace(", m + total.log()", ""), "attend returns two tensors"),
            "a column": (attending(lse="(m + total.log())[:, None]"), "the lse is (m,)"),
            "written into the queries": (
                attending(query="query.to(dtype).mul_(1.0 + 1e-9)"),
                "changes a tensor",
            ),
        },
        "9.4": {
            "the last tile forgotten": (
                visiting(range="some // tile * tile, highest // tile * tile, tile"),
                "holds a key that one of the queries sees",
            ),
            "places never below 0": (
                visiting(places="max(0, first + offset), stop - 1 + offset"),
                "not every one of these queries sees all keys",
            ),
            "the first tile rounded up": (
                visiting(range="-(-some // tile) * tile, highest + 1, tile"),
                "holds a key that one of the queries sees",
            ),
            "every pair of the window": (
                """
def visited_tiles(first, stop, query_length, key_length, tile, *, window=None):
    pairs = {}
    for i in range(first, stop):
        place = i + key_length - query_length
        for j in range(0 if window is None else max(0, place - window + 1), place + 1):
            pairs[j // tile] = pairs.get(j // tile, 0) + 1
    ends = {t: min((t + 1) * tile, key_length) for t in sorted(pairs)}
    return [(t * tile, b, pairs[t] < (stop - first) * (b - t * tile)) for t, b in ends.items()]
""",
                "don't try them all",
            ),
            "top left": (visiting(offset="0"), "the first query stands at the first key"),
            "own key not seen": (
                visiting(places="first + offset - 1, stop - 2 + offset"),
                "the key at its own place too",
            ),
            "one key too many": (
                visiting(places="first + offset + 1, stop + offset"),
                "does not see the key after its place",
            ),
            "stop in the places": (
                visiting(places="first + offset, stop + offset"),
                "does not see the key after its place",
            ),
            "all tiles": (visiting(range="0, key_length, tile"), "yours visits all"),
            "one tile too few": (visiting(range="some // tile * tile, highest, tile"), "the key at its own place too"),
            "one tile too many": (
                visiting(range="some // tile * tile, min(key_length, highest + tile + 1), tile"),
                "does not see the key after its place",
            ),
            "all masked": (visiting(masked="True"), "all tiles are masked in yours"),
            "none masked": (visiting(masked="False"), "no tile is masked in yours"),
            "the last tile masked": (visiting(masked="start + tile > highest"), "mask; yours says the opposite"),
            "the mask of the last query": (
                visiting(masked="start < every or end - 1 > highest"),
                "not every one of these queries sees all keys of (2, 4)",
            ),
            "the mask's edge": (visiting(masked="start < every or end > lowest"), "needs no mask"),
            "a short tile masked": (
                visiting(masked="start < every or end - 1 > lowest or end - start < tile"),
                "that the last tile is shorter is no reason",
            ),
            "masks the wrong way round": (
                visiting(masked="start >= every and end - 1 <= lowest"),
                "True where no mask is needed",
            ),
            "past the last key": (visiting(end="start + tile"), "is not within the"),
            "cut at the last place": (visiting(end="min(start + tile, highest + 1)"), "is not a tile"),
            "from the window on": (visiting(range="some, highest + 1, tile"), "is not a tile"),
            "no window": (visiting(window="key_length + query_length"), "the window is not used"),
            "the window too long": (visiting(some="max(0, lowest - w)", every="highest - w"), "one key too many"),
            "the window too short": (
                visiting(some="max(0, lowest - w + 2)", every="highest - w + 2"),
                "one key too few",
            ),
            "the window of the last query": (
                visiting(some="max(0, highest - w + 1)"),
                "that of the last query's window",
            ),
            "the window's left edge not masked": (
                visiting(masked="end - 1 > lowest"),
                "have left the window of the last one",
            ),
            "the mask by the first query's window": (
                visiting(every="lowest - w + 1"),
                "have left the window of the last one",
            ),
            "negative keys": (visiting(some="lowest - w + 1"), "is not within the"),
            "backwards": (visiting(out="tiles[::-1]"), "ascending order"),
            "more queries than keys": (visiting(offset="max(0, key_length - query_length)"), "the visit is []"),
            "1 and 0": (visiting(masked="int(start < every or end - 1 > lowest)"), "True or False"),
            "nothing is visited": (visiting(out="[]"), "holds a key that one of the queries sees"),
            "a tuple": (visiting(out="tuple(tiles)"), "returns a list"),
            "pairs": (visiting(out="[a[:2] for a in tiles]"), "each tile is (start, stop, masked)"),
            "numbers of tiles": (visiting(out="[(a // tile, -(-b // tile), c) for a, b, c in tiles]"), "is not a tile"),
            "tile by tile": (
                visiting(
                    range="0, highest + 1, tile", end="min(start + tile, key_length)\n        if end <= some: continue"
                ),
                "work out the first and the last tile",
            ),
            "pair by pair": (
                """
def visited_tiles(first, stop, query_length, key_length, tile, *, window=None):
    offset, found = key_length - query_length, []
    for a in range(0, key_length, tile):
        b = min(a + tile, key_length)
        seen = [j <= i + offset and (window is None or j > i + offset - window)
                for i in range(first, stop) for j in range(a, b)]
        if any(seen):
            found.append((a, b, not all(seen)))
    return found
""",
                "work out the first and the last tile",
            ),
            "a whole mask": (
                """
def visited_tiles(first, stop, query_length, key_length, tile, *, window=None):
    p = torch.arange(first, stop)[:, None] + key_length - query_length
    j = torch.arange(key_length)[None, :]
    seen = (j <= p) if window is None else (j <= p) & (j > p - window)
    parts = seen.split(tile, 1)
    return [(i * tile, i * tile + a.shape[1], not bool(a.all())) for i, a in enumerate(parts) if a.any()]
""",
                "runs out of memory",
            ),
        },
        "9.5": {
            "seen as a factor": (
                deriving(mask="s", p="torch.exp(s - base[:, None]) * (1 if seen is None else seen)"),
                "inf times 0 is NaN",
            ),
            "-1e9 where not seen": (
                deriving(mask="s.masked_fill(~seen, -1e9)", p="torch.exp(s - base[:, None]).nan_to_num()"),
                "no number is small enough",
            ),
            "seen turned round": (
                deriving(mask="s.masked_fill(seen.logical_not_(), -math.inf)"),
                "changes a tensor that it was given",
            ),
            "lse along the keys": (
                deriving(p="torch.exp(s - (base if len(q) == len(k) else base[:, None]))"),
                "the lse of the queries is taken off along the keys",
            ),
            "D along the keys": (
                deriving(ds="p * (dp - (delta if len(q) == len(k) else delta[:, None]))"),
                "D of the queries is taken off along the keys",
            ),
            "its own scale": (
                deriving(scores="q.shape[1] ** -0.5 * q @ k.T"),
                "the scale that is given is not used",
            ),
            "a view": (
                deriving(dp="do @ value.view(-1).view(value.shape).to(dtype).T"),
                "reshape takes it, view does not",
            ),
            "D over the rows": (deriving(delta="(output.to(dtype) * d_output.to(dtype)).sum(0)"), "row_delta"),
            "D a mean": (deriving(delta="(output.to(dtype) * d_output.to(dtype)).mean(1)"), "row_delta is a mean"),
            "D without a sum": (deriving(delta="output.to(dtype) * d_output.to(dtype)"), "one number a row"),
            "D one number": (deriving(delta="(output.to(dtype) * d_output.to(dtype)).sum()"), "one number a row"),
            "D in half precision": (deriving(delta="(output * d_output).sum(1)"), "convert both first"),
            "D's products in half precision": (
                deriving(delta="(output * d_output).to(dtype).sum(1)"),
                "convert both first",
            ),
            "D in float32": (deriving(delta="(output * d_output).float().sum(1)"), "right to a few digits only"),
            "a softmax of the tile": (
                deriving(p="torch.exp(s - torch.log(torch.exp(s).sum(1, keepdim=True)).nan_to_num(0, 0, 0))"),
                "P is a softmax within the tile",
            ),
            "the lse not taken off": (deriving(p="torch.exp(s)"), "the lse is not taken off"),
            "the lse added": (deriving(p="torch.exp(s + base[:, None])"), "the lse is added"),
            "divided by the lse": (deriving(p="torch.exp(s) / base[:, None]"), "divided by the lse"),
            "no exponential": (deriving(p="s - base[:, None]"), "the exponential is left out"),
            "scores without the scale": (deriving(scores="q @ k.T"), "the scores are without the scale"),
            "not masked": (deriving(mask="s"), "seen is not used"),
            "masked the wrong way round": (deriving(mask="s.masked_fill(seen, -math.inf)"), "the wrong way round"),
            "masked with 0": (deriving(mask="s.masked_fill(~seen, 0.0)"), "is -inf, not 0"),
            "a dead row": (deriving(base="lse"), "holds NaN"),
            "the lse taken off afterwards": (deriving(p="torch.exp(s) * torch.exp(-base[:, None])"), "holds NaN"),
            "dV by dS": (deriving(dv="ds.T @ do"), "yours is dS.T @ dO"),
            "dV scaled": (deriving(dv="scale * p.T @ do"), "dV has no scale"),
            "dV by dP": (deriving(dv="(p * dp).T @ do"), "yours has dP in it"),
            "D left out": (deriving(ds="p * dp"), "D is left out"),
            "D and scale left out": (deriving(ds="p * dp", dk="ds.T @ q", dq="ds @ k"), "D and the scale are left out"),
            "D of the tile": (
                deriving(ds="p * (dp - (p * dp).sum(1, keepdim=True))"),
                "D is summed over this tile only",
            ),
            "D added": (deriving(ds="p * (dp + delta[:, None])"), "D is added"),
            "D less dP": (deriving(ds="p * (delta[:, None] - dp)"), "sign is wrong"),
            "D outside": (deriving(ds="p * dp - delta[:, None]"), "D stands outside of the brackets"),
            "P left out": (deriving(ds="dp - delta[:, None]"), "P is left out"),
            "the diagonal": (deriving(ds="p * (1 - p) * dp"), "the diagonal"),
            "the lse for D": (deriving(ds="p * (dp - base[:, None])"), "the lse stands where D should"),
            "no scale in dQ": (deriving(dq="ds @ k"), "that of query is not: the scale is missing"),
            "no scale in dK": (deriving(dk="ds.T @ q"), "that of key is not: the scale is missing"),
            "scaled twice": (deriving(dq="scale * scale * ds @ k"), "it is scaled twice"),
            "P instead of dS": (deriving(dq="scale * p @ k"), "made of P, not of dS"),
            "sign of dQ": (deriving(dq="-scale * ds @ k"), "its sign is wrong"),
            "another order": (
                deriving().replace(
                    "return scale * ds @ k, scale * ds.T @ q, p.T @ do",
                    "return p.T @ do, scale * ds @ k, scale * ds.T @ q",
                ),
                "the gradient of query is",
            ),
            "products in half precision": (
                deriving(scores="scale * (query @ key.T).to(dtype)"),
                "convert what is given to float32",
            ),
            "P in half precision": (deriving(dv="(p.to(value.dtype).T @ d_output).to(dtype)"), "convert what is given"),
            "in the dtype of the inputs": (deriving(dtype="query.dtype"), "two dtypes meet"),
            "float32 always": (deriving(dtype="torch.float32"), "two dtypes meet"),
            "dK not transposed": (deriving(dk="scale * ds @ q"), "sizes differ"),
            "autograd": (deriving(dq="torch.autograd.grad(s, q)[0]"), "uses"),
            "two things": (deriving().replace(", p.T @ do", ""), "returns three tensors"),
            "written into d_output": (deriving(dv="p.T @ d_output.mul_(1.0 + 1e-9).to(dtype)"), "changes a tensor"),
        },
        "9.6": {
            "-1e9 where masked": (
                fusing(load="mask=inside, other=-1e9"),
                "only -inf never takes part",
            ),
            "float16's least number where masked": (
                fusing(load="mask=inside, other=-65504.0"),
                "only -inf never takes part",
            ),
            "a row in int32": (fusing(row="tl.program_id(0)"), "leaves int32"),
            "a small number in the sum": (fusing(total="total + 1e-6"), "is a small number added"),
            "Python's max": (fusing(top="max(x)"), "not Python's or PyTorch's"),
            "as x lies": (fusing(out="torch.empty_like(x)"), "empty_like keeps the layout"),
            "rows for columns": (
                fusing(launch=FUSED["launch"].replace("y, x.shape[1]", "y, x.shape[0]")),
                "is n_columns the number of columns",
            ),
            "not divided": (fusing(value="e"), "not divided by their sum"),
            "no maximum": (fusing(e="tl.exp(x)"), "the exponentials overflow"),
            "log-softmax": (fusing(value="x - top - tl.log(total)"), "that is its logarithm"),
            "powers of two": (fusing(e="tl.exp2(x - top)"), "the powers are of 2"),
            "wrong sign": (fusing(top="-tl.min(x, axis=0)", e="tl.exp(-x - top)"), "the sign is wrong"),
            "divided by the maximum": (fusing(value="e / top"), "divided by the maximum"),
            "the same row for all": (fusing(row="0"), "what does tl.program_id(0) say?"),
            "the same row of x": (fusing(x="x_ptr + columns"), "what does tl.program_id(0) say?"),
            "rows follow each other in x": (
                fusing(x="x_ptr + row * n_columns + columns"),
                "rows of x stand x_row_stride apart",
            ),
            "rows follow each other in y": (
                fusing(y="y_ptr + row * n_columns + columns"),
                "rows of y stand y_row_stride apart",
            ),
            "rows of y by the stride of x": (
                fusing(y="y_ptr + row * x_row_stride + columns"),
                "rows of y stand y_row_stride apart",
            ),
            "columns next to each other": (
                fusing(x="x_ptr + row * x_row_stride + columns"),
                "columns of x stand x_column_stride apart",
            ),
            "strides swapped": (fusing(x="x_ptr + row * x_column_stride + columns * x_row_stride"), "x"),
            "no mask": (
                fusing(load="", store=""),
                "reads what is no element of x: the columns from n_columns on need a mask",
            ),
            "load not masked": (
                fusing(load=""),
                "reads what is no element of x: the columns from n_columns on need a mask",
            ),
            "store not masked": (
                fusing(store=""),
                "writes where no element of y is: the columns from n_columns on need a mask",
            ),
            "one column too many": (
                fusing(load="mask=columns <= n_columns, other=-float('inf')"),
                "reads what is no element of x",
            ),
            "other=0": (fusing(load="mask=inside, other=0.0"), "masked places are 0 and take part"),
            "no other": (fusing(load="mask=inside"), "masked places are undefined without other="),
            "one column too few": (
                fusing(load="mask=columns < n_columns - 1, other=-float('inf')"),
                "the last column takes no part",
            ),
            "-inf less -inf": (fusing(top="top"), "a row of -inf only becomes zeros; yours NaN"),
            "0 / 0": (fusing(total="total"), "a row of -inf only becomes zeros; yours NaN"),
            "exponentials in half precision": (
                fusing(e="tl.exp(x - top).to(x_ptr.dtype.element_ty)"),
                "bring x to tl.float32",
            ),
            "differences in half precision": (
                fusing(e="tl.exp((x - top).to(x_ptr.dtype.element_ty).to(tl.float32))"),
                "bring x to tl.float32",
            ),
            "the result in half precision": (fusing(value="(e / total).to(tl.float16)"), "right to three digits only"),
            "another program": (fusing(row="tl.program_id(1)"), "what does tl.program_id(0) say?"),
            "a name that is nowhere": (fusing(e="tl.exp(x - tip)"), "NameError: name 'tip' is not defined"),
            "the kernel not started": (
                fusing().replace(
                    "    row = tl", '    raise NotImplementedError("Exercise 9.6: a softmax")\n    row = tl'
                ),
                "still raises NotImplementedError",
            ),
            "nothing stored": (fusing(store="mask=columns < 0"), "nothing is stored"),
            "written into x": (fusing(y="x_ptr + row * x_row_stride + columns"), "the kernel changes x"),
            "one program": (
                fusing(launch=FUSED["launch"].replace("(len(x),)", "(1,)"), out="torch.zeros_like(x)"),
                "is there a program for each row",
            ),
            "a program for each column": (
                fusing(launch=FUSED["launch"].replace("(len(x),)", "(x.shape[1],)")),
                "do grid and strides fit",
            ),
            "BLOCK is the width": (
                fusing(launch=FUSED["launch"].replace("triton.next_power_of_2(x.shape[1])", "x.shape[1]")),
                "BLOCK must be a power of two",
            ),
            "BLOCK 1024": (
                fusing(
                    launch=FUSED["launch"].replace("triton.next_power_of_2(x.shape[1])", "1024"),
                    out="torch.zeros_like(x)",
                ),
                "is BLOCK at least the number of columns, however many?",
            ),
            "contiguous": (fusing(before="x = x.contiguous()"), "x is copied before the launch"),
            "strides of another": (
                fusing(launch=FUSED["launch"].replace("*x.stride()", "x.shape[1], 1")),
                "fused_softmax, a transposed matrix",
            ),
            "float32 out": (fusing(out="torch.empty(x.shape, device=x.device)"), "y is in torch.float16"),
            "like x": (fusing(out="torch.empty_like(x)"), "fused_softmax, "),
            "by PyTorch": (
                fusing(
                    launch="e = torch.exp(x - x.amax(1, keepdim=True)); y = (e / e.sum(1, keepdim=True)).to(x.dtype)"
                ),
                "works in PyTorch",
            ),
            "torch's softmax": (fusing(launch="y = torch.softmax(x, 1)"), "uses torch.softmax"),
            "Triton's softmax": (fusing(value="tl.softmax(x)"), "uses"),
            "changed in place": (
                fusing(out="x"),
                "changes x",
            ),
        },
        "9.7": {
            "float32 rounded on the way": (
                producing(add="sums += tl.dot(a, b)"),
                'tl.dot has input_precision="ieee"',
            ),
            "each product rounded": (
                producing(add="sums += tl.dot(a, b, input_precision='ieee').to(c_ptr.dtype.element_ty)"),
                "each product is rounded to float16",
            ),
            "the sums added twice": (
                producing(add="sums += tl.dot(a, b, sums, input_precision='ieee')"),
                "has added the sums already",
            ),
            "K masked by N": (
                producing(load_a="mask=(rows < M)[:, None] & (places < N)[None, :], other=0.0"),
                "the places are masked by M or N",
            ),
            "the first step only": (producing(range="0, BLOCK_K, BLOCK_K"), "only the first step through K"),
            "the last step only": (
                producing(add="sums = tl.dot(a, b, input_precision='ieee')"),
                "only the last step is in it",
            ),
            "the same places in every step": (
                producing(places="tl.arange(0, BLOCK_K)"),
                "every step takes the same places",
            ),
            "the shorter step left out": (
                producing(range="0, K // BLOCK_K * BLOCK_K, BLOCK_K"),
                "K // BLOCK_K rounds down",
            ),
            "b times a": (producing(add="sums += tl.dot(b, a, input_precision='ieee')"), "AssertionError"),
            "all rows of K one by one": (producing(range="0, K"), "c is not a @ b"),
            "programs swapped": (
                producing(
                    rows="tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)",
                    columns="tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)",
                ),
                "program_id(0) counts the tiles of rows",
            ),
            "programs count rows": (
                producing(rows="tl.program_id(0) + tl.arange(0, BLOCK_M)"),
                "program_id(0) counts the tiles of rows",
            ),
            "columns by BLOCK_M": (
                producing(columns="tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_N)"),
                "program_id(1) counts the tiles of columns",
            ),
            "no program's own columns": (
                producing(columns="tl.arange(0, BLOCK_N)"),
                "program_id(1) counts the tiles of columns",
            ),
            "rows of a follow each other": (
                producing(a="a_ptr + rows[:, None] * K + places[None, :]"),
                "rows of a apart",
            ),
            "rows of b follow each other": (
                producing(b="b_ptr + places[:, None] * N + columns[None, :]"),
                "rows of b apart",
            ),
            "columns of a next to each other": (
                producing(a="a_ptr + rows[:, None] * a_row_stride + places[None, :]"),
                "a transposed",
            ),
            "columns of b next to each other": (
                producing(b="b_ptr + places[:, None] * b_row_stride + columns[None, :]"),
                "b transposed",
            ),
            "rows of c follow each other": (
                producing(c="c_ptr + rows[:, None] * N + columns[None, :]"),
                "no element of c",
            ),
            "columns of c next to each other": (
                producing(c="c_ptr + rows[:, None] * c_row_stride + columns[None, :]"),
                "c transposed",
            ),
            "strides of b swapped": (
                producing(b="b_ptr + places[:, None] * b_column_stride + columns[None, :] * b_row_stride"),
                "each read by its own strides?",
            ),
            "no masks": (producing(load_a="", load_b="", store=""), "the places beyond K are masked"),
            "K not masked": (
                producing(
                    load_a="mask=(rows < M)[:, None], other=0.0",
                    load_b="mask=(columns < N)[None, :], other=0.0",
                ),
                "the places beyond K are masked",
            ),
            "K masked in a only": (
                producing(load_b="mask=(columns < N)[None, :], other=0.0"),
                "the places beyond K are masked",
            ),
            "K masked in b only": (
                producing(load_a="mask=(rows < M)[:, None], other=0.0"),
                "the places beyond K are masked",
            ),
            "K's mask without start": (
                producing(
                    load_a="mask=(rows < M)[:, None] & (tl.arange(0, BLOCK_K) < K)[None, :], other=0.0",
                    load_b="mask=(tl.arange(0, BLOCK_K) < K)[:, None] & (columns < N)[None, :], other=0.0",
                ),
                "the places beyond K are masked",
            ),
            "M not masked in a": (
                producing(load_a="mask=(places < K)[None, :], other=0.0"),
                "the rows beyond M are masked",
            ),
            "M not masked in c": (producing(store="mask=(columns < N)[None, :]"), "the rows beyond M are masked"),
            "N not masked in b": (
                producing(load_b="mask=(places < K)[:, None], other=0.0"),
                "the columns beyond N are masked",
            ),
            "N not masked in c": (producing(store="mask=(rows < M)[:, None]"), "the columns beyond N are masked"),
            "the store not masked": (producing(store=""), "the rows beyond M are masked"),
            "one row too many": (
                producing(load_a="mask=(rows <= M)[:, None] & (places < K)[None, :], other=0.0"),
                "the rows beyond M are masked",
            ),
            "either instead of both": (
                producing(load_a="mask=(rows < M)[:, None] | (places < K)[None, :], other=0.0"),
                "masked",
            ),
            "M and N swapped in the store": (
                producing(store="mask=(rows < N)[:, None] & (columns < M)[None, :]"),
                "some elements of c are not written",
            ),
            "no other": (
                producing(
                    load_a="mask=(rows < M)[:, None] & (places < K)[None, :]",
                    load_b="mask=(places < K)[:, None] & (columns < N)[None, :]",
                ),
                "masked places are undefined without other=",
            ),
            "other=1": (
                producing(
                    load_a="mask=(rows < M)[:, None] & (places < K)[None, :], other=1.0",
                    load_b="mask=(places < K)[:, None] & (columns < N)[None, :], other=1.0",
                ),
                "the places beyond K are masked",
            ),
            "other=-inf": (
                producing(
                    load_a="mask=(rows < M)[:, None] & (places < K)[None, :], other=-float('inf')",
                    load_b="mask=(places < K)[:, None] & (columns < N)[None, :], other=-float('inf')",
                ),
                "the places beyond K are masked, in a and in b, and are 0",
            ),
            "sums in half precision": (
                producing(sums="tl.float16", add="sums += tl.dot(a, b, input_precision='ieee').to(tl.float16)"),
                "the sums are kept in float32",
            ),
            "sums of the dtype of c": (
                producing(
                    sums="c_ptr.dtype.element_ty",
                    add="sums += tl.dot(a, b, input_precision='ieee').to(c_ptr.dtype.element_ty)",
                ),
                "the sums are kept in float32",
            ),
            "PyTorch's product": (
                producing().replace("    return c\n", "    return torch.matmul(a, b)\n"),
                "uses torch.matmul",
            ),
        },
    }


def test_every_part_has_the_three_levels_of_hints_that_the_notebook_promises():
    assert {len(part.hints) for part in find_exercise("09").parts} == {3}


@pytest.fixture(scope="module")
def solution() -> dict[str, object]:
    return solution_names("09")


@settings(max_examples=40, deadline=None)
@given(widths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 999))
def test_the_statistics_make_torchs_logsumexp(solution, widths, seed):
    x = 5 * torch.randn(4, sum(widths), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    m, total = solution["row_statistics"](iter(x.split(widths, 1)))
    torch.testing.assert_close(m + total.log(), x.logsumexp(1), rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 20), n=st.integers(1, 30), tile=st.integers(1, 12), seed=st.integers(0, 999))
def test_the_tiles_hold_all_that_torchs_causal_mask_shows(solution, m, n, tile, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(size, 4, dtype=torch.float64, generator=generator) for size in (m, n, n))
    seen = causal_lower_right(m, n)._materialize(torch.device("cpu")) if m <= n else None
    for first in range(0, m, tile):
        stop = min(first + tile, m)
        plan = solution["visited_tiles"](first, stop, m, n, tile)
        output, lse = torch.zeros(stop - first, 4).double(), torch.full((stop - first,), -torch.inf).double()
        for start, end, masked in plan:
            places = torch.arange(first, stop)[:, None] + n - m
            hidden = torch.arange(start, end)[None, :] > places if masked else torch.zeros(1, 1, dtype=torch.bool)
            scores = (query[first:stop] @ key[start:end].T / 2).masked_fill(hidden, -torch.inf)
            part = scores.softmax(1).nan_to_num(0.0) @ value[start:end], scores.logsumexp(1)
            output, lse = solution["merge"](output, lse, *part)
        if seen is not None:
            theirs = scaled_dot_product_attention(query[first:stop], key, value, attn_mask=seen[first:stop])
            torch.testing.assert_close(output, theirs)


def test_a_tile_is_torchs_attention(solution):
    query, key, value = torch.randn(5, 8).double(), torch.randn(21, 8).double(), torch.randn(21, 3).double()
    theirs = scaled_dot_product_attention(query[None], key[None], value[None])[0]
    torch.testing.assert_close(solution["attend"](query, key, value, 8)[0], theirs)


def test_the_gradients_of_all_tiles_are_autograds(solution):
    query, key, value = (torch.randn(size, 6, dtype=torch.float64, requires_grad=True) for size in (5, 11, 11))
    output = scaled_dot_product_attention(query[None], key[None], value[None])[0]
    pull = torch.randn_like(output)
    exact = torch.autograd.grad((output * pull).sum(), (query, key, value))
    with torch.no_grad():
        lse, delta = (query @ key.T * 6**-0.5).logsumexp(1), solution["row_delta"](output, pull)
        parts = [
            solution["tile_gradients"](query, k, v, pull, lse, delta, 6**-0.5)
            for k, v in zip(key.split(4), value.split(4), strict=True)
        ]
        torch.testing.assert_close(sum(part[0] for part in parts), exact[0])
        torch.testing.assert_close(torch.cat([part[1] for part in parts]), exact[1])
        torch.testing.assert_close(torch.cat([part[2] for part in parts]), exact[2])


def test_the_kernels_are_torchs_softmax_and_product(solution):
    device = solution["DEVICE"]
    x = torch.randn(6, 37, device=device)
    torch.testing.assert_close(solution["fused_softmax"](x), x.softmax(1))
    a, b = torch.randn(41, 37, device=device), torch.randn(19, 37, device=device).T
    torch.testing.assert_close(solution["product"](a, b), a @ b, rtol=1e-4, atol=1e-4)
