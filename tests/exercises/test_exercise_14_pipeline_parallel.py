"""Exercise 14: wrong answers that students may well give, right ones of other kinds; PyTorch's schedules as oracle."""

import itertools
import re
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch.testing._internal.distributed.fake_pg import FakeStore

from minillm.distributed import simulate_ranks
from minillm.distributed.pipeline import Kind, make_schedule, pipedream, simulate
from minillm.exercises.folder import find_exercise
from minillm.exercises.testing import ExerciseTests, solution_names


def template(source: str, **places: str) -> str:
    """An answer with the places `<name>` filled in."""
    for name, text in places.items():
        source = source.replace(f"<{name}>", text)
    return source


GPIPE = """
def gpipe(p, m):
    return [<first> + <then> for stage in range(<stages>)]

def idle_fraction(spans, p):
    busy = sum(end - start for _, start, end in spans)
    return <idle>
"""
GPIPED = {
    "first": "[f'F{k}' for k in range(m)]",
    "then": "[f'B{k}' for k in range(m)]",
    "stages": "p",
    "idle": "1 - busy / (p * max(end for _, _, end in spans))",
}


def gpiping(**changes: str) -> str:
    """Part 14.1's answer with some of its places filled in otherwise."""
    return template(GPIPE, **GPIPED | changes)


ONE = """
def one_f_one_b(p, m):
    orders = []
    for stage in range(p):
        warmup = <warmup>
        order = [f"F{k}" for k in range(warmup)]
        for k in range(m - warmup):
            order += <steady>
        order += <rest>
        orders.append(order)
    return <out>
"""
ONED = {
    "warmup": "min(p - stage - 1, m)",
    "steady": "[f'F{warmup + k}', f'B{k}']",
    "rest": "[f'B{k}' for k in range(m - warmup, m)]",
    "out": "orders",
}


def one(**changes: str) -> str:
    """Part 14.2's answer with some of its places filled in otherwise."""
    return template(ONE, **ONED | changes)


MESSAGES = """
def stuck(lists):
    at = [0] * len(lists)
    def head(stage):
        return lists[stage][at[stage]] if <inside> and at[stage] < len(lists[stage]) else ""
    moved = True
    while moved:
        moved = False
        for stage in range(len(lists)):
            action = head(stage)
            if <passes>:
                at[stage] += 1
                moved = <again>
            elif <sends>:
                other = <other>
                if <meets>:
                    at[stage] += 1
                    <receive>
                    moved = True
    return <out>

def with_messages(orders):
    p = len(orders)
    lists = [[] for _ in orders]
    at = [0] * p
    done = set()
    while any(at[stage] < len(orders[stage]) for stage in range(p)):
        for stage in range(p):
            if at[stage] == len(orders[stage]):
                continue
            action = orders[stage][at[stage]]
            before, behind = (stage - 1, stage + 1) if action[0] == "F" else (stage + 1, stage - 1)
            if <needed> and (before, action) not in done:
                continue
            <begin>
            lists[stage].append(action)
            if <goes>:
                <send>
            <end>
            done.add((stage, action))
            at[stage] += 1
    return <lists>
"""
MESSAGED = {
    "inside": "0 <= stage < len(lists)",
    "passes": "action[:1] in ('F', 'B')",
    "again": "True",
    "sends": "action[:1] == 'S'",
    "other": "stage + 1 if action[1] == 'F' else stage - 1",
    "meets": "head(other) == 'R' + action[1:]",
    "receive": "at[other] += 1",
    "out": "{stage: head(stage) for stage in range(len(lists)) if head(stage)}",
    "needed": "0 <= before < p",
    "begin": "pass",
    "goes": "0 <= behind < p",
    "send": "lists[stage].append('S' + action); lists[behind].append('R' + action)",
    "end": "pass",
    "lists": "lists",
}
BEFORE_AND_BEHIND = {
    "begin": "if 0 <= before < p: lists[stage].append('R' + action)",
    "send": "lists[stage].append('S' + action)",
}


def messaging(**changes: str) -> str:
    """Part 14.3's answer with some of its places filled in otherwise."""
    return template(MESSAGES, **MESSAGED | changes)


LOOPS = """
def interleaved(p, m, v):
    passes = <passes>
    forward = [f"F{k}.{c}" for k, c in passes]
    backward = [f"B{k}.{<chunk>}" for k, c in <back>]
    orders = []
    for stage in range(p):
        warmup = min(<warmup>, m * v)
        order = forward[:warmup]
        for k in range(m * v - warmup):
            order += <steady>
        orders.append(order + backward[m * v - warmup:])
    return <out>
"""
LOOPED = {
    "passes": "[(g + k, c) for g in range(0, m, p) for c in range(v) for k in range(p)]",
    "chunk": "v - 1 - c",
    "back": "passes",
    "warmup": "2 * (p - 1 - stage) + (v - 1) * p",
    "steady": "[forward[warmup + k], backward[k]]",
    "out": "orders",
}


def looping(**changes: str) -> str:
    """Part 14.4's answer with some of its places filled in otherwise."""
    return template(LOOPS, **LOOPED | changes)


HALVES = """
def backward_input(grad_output, weight):
    return <input>

def backward_weight(grad_output, x):
    rows = <rows>
    return <weight>

def zb_h1(p, m):
    orders = []
    for stage in range(p):
        warmup = <warmup>
        order = [f"F{k}" for k in range(warmup)]
        for k in range(m):
            if warmup + k < m:
                order.append(f"F{warmup + k}")
            <halves>
        orders.append(order + <rest>)
    return orders
"""
HALVED = {
    "input": "grad_output @ weight",
    "rows": "grad_output.reshape(-1, grad_output.shape[-1])",
    "weight": "rows.T @ x.reshape(-1, x.shape[-1]), rows.sum(0)",
    "warmup": "p - 1 - stage",
    "halves": "order += [f'I{k}'] + [f'W{k - stage}'] * (k >= stage)",
    "rest": "[f'W{k}' for k in range(m - stage, m)]",
}


def halving(**changes: str) -> str:
    """Part 14.5's answer with some of its places filled in otherwise."""
    return template(HALVES, **HALVED | changes)


FORMS = """
def bubble(p, m, v=1):
    return <bubble>

def zb_h1_bubble(p, m, f, i, w):
    return <zb>

def micro_batches_for(p, v, limit):
    step = <step>
    m = <least>
    while bubble(p, m, v) <above> limit:
        m += step
    return m
"""
FORMED = {
    "bubble": "(p - 1) / (v * m + p - 1)",
    "zb": "(p - 1) * (f + i - w) / (m * (f + i + w) + (p - 1) * (f + i - w))",
    "step": "p if v > 1 else 1",
    "least": "step",
    "above": ">",
}


def forming(**changes: str) -> str:
    """Part 14.6's answer with some of its places filled in otherwise."""
    return template(FORMS, **FORMED | changes)


STASH = """
class Stash:
    def __init__(self, weights):
        self.newest, self.used, self.all = weights, {}, <all>
    def forward(self, micro_batch):
        <forward>
        return <given>
    def backward(self, micro_batch):
        <backward>
    def update(self, weights):
        <update>
    def held(self):
        return <held>

def replay(weights, gradient, lr, n_micro_batches, vertical_sync=False):
    p = len(weights)
    versions = [[w] for w in weights]
    for t in range(n_micro_batches):
        <each>
        for s in range(p):
            used = [versions[o][<version>] for o in range(p)]
            <step>
    return <out>
"""
STASHED = {
    "all": "[]",
    "forward": "self.used[micro_batch] = self.newest",
    "given": "self.newest",
    "backward": "return self.used.pop(micro_batch)",
    "update": "self.newest = weights",
    "held": "len({id(w) for w in [self.newest, *self.used.values()]})",
    "each": "pass",
    "version": "max(0, t - (p - 1 if vertical_sync else p - 1 - o))",
    "step": "versions[s].append(versions[s][t] - lr * gradient(s, used, t))",
    "out": "[kept[-1] for kept in versions]",
}


def stashing(**changes: str) -> str:
    """Part 14.7's answer with some of its places filled in otherwise."""
    return template(STASH, **STASHED | changes)


UNEVEN = """
def partition(costs, p):
    <first>
    total = [0]
    for cost in costs:
        total.append(total[-1] + cost)
    best = {0: (0, [])}
    for _ in range(p):
        longer = {}
        for begin, (worst, sizes) in best.items():
            for end in range(begin + <few>, len(costs) + 1):
                value = <value>
                if end not in longer or value < longer[end][0]:
                    longer[end] = value, [*sizes, <size>]
        best = longer
    return <out>

def accumulate(model, micro_batches):
    n = <n>
    total = 0.0
    <begin>
    for inputs, targets in micro_batches:
        logits = model(inputs).flatten(0, 1)
        loss = <loss>
        <backward>
        total += <total>
    <end>
    return <returned>
"""
SUMMED = "F.cross_entropy(logits, targets.flatten(), reduction='sum', ignore_index=-100)"
MEAN = "F.cross_entropy(logits, targets.flatten(), ignore_index=-100)"
UNEVENED = {
    "first": "pass",
    "few": "1",
    "value": "max(worst, total[end] - total[begin])",
    "size": "end - begin",
    "out": "best[len(costs)][1]",
    "n": "sum(int((t != -100).sum()) for _, t in micro_batches)",
    "begin": "pass",
    "loss": f"{SUMMED} / n",
    "backward": "loss.backward()",
    "total": "loss.item()",
    "end": "pass",
    "returned": "total",
}
GREEDY = """
def partition(costs, p):
    sizes, here, left = [], 0, sum(costs)
    aim, count = left / p, 0
    for i, cost in enumerate(costs):
        here, count = here + cost, count + 1
        if len(sizes) < p - 1 and (here >= aim or len(costs) - i - 1 == p - 1 - len(sizes)):
            sizes.append(count)
            here = count = 0
    return sizes + [count]
"""


def uneven(**changes: str) -> str:
    """Part 14.8's answer with some of its places filled in otherwise."""
    return template(UNEVEN, **UNEVENED | changes)


def cut(source: str) -> str:
    """Part 14.8's answer with another `partition`."""
    return source + uneven()[uneven().index("def accumulate") :]


class TestExercise14(ExerciseTests):
    exercise = "14"
    right_answers: ClassVar = {
        "the template of 14.1": ("14.1", gpiping()),
        "backward passes from the last to the first": (
            "14.1",
            gpiping(
                then="[f'B{k}' for k in reversed(range(m))]",
                idle="(p * max(s[2] for s in spans) - busy) / p / max(s[2] for s in spans)",
            ),
        ),
        "tuples": ("14.1", gpiping(first="tuple(f'F{k}' for k in range(m))", then="tuple(f'B{k}' for k in range(m))")),
        "the template of 14.2": ("14.2", one()),
        "a backward pass whenever enough are in flight": (
            "14.2",
            """
def one_f_one_b(p, m):
    def order(stage):
        f = b = 0
        while b < m:
            if f < m and f - b < p - stage:
                yield f"F{f}"
                f += 1
            else:
                yield f"B{b}"
                b += 1
    return [list(order(stage)) for stage in range(p)]
""",
        ),
        "the template of 14.3": ("14.3", messaging()),
        "one stage after the other as far as it comes": (
            "14.3",
            messaging()
            + """
def with_messages(orders):
    p, lists, at, done = len(orders), [[] for _ in orders], [0] * len(orders), set()
    def visit(stage):
        while at[stage] < len(orders[stage]):
            a = orders[stage][at[stage]]
            step = 1 if a[0] == "F" else -1
            if 0 <= stage - step < p and (stage - step, a) not in done:
                return
            at[stage] += 1
            done.add((stage, a))
            lists[stage].append(a)
            if 0 <= stage + step < p:
                lists[stage].append("S" + a)
                lists[stage + step].append("R" + a)
                visit(stage + step)
    for _ in range(1000):
        for stage in range(p):
            visit(stage)
    return lists
""",
        ),
        "the template of 14.4": ("14.4", looping()),
        "pass by pass": (
            "14.4",
            looping(passes="[(i // (p * v) * p + i % p, i // p % v) for i in range(m * v)]"),
        ),
        "the template of 14.5": ("14.5", halving()),
        "einsum, and W when it owes too many": (
            "14.5",
            halving(
                input="torch.einsum('...o,oi->...i', grad_output, weight)",
                weight="torch.einsum('...o,...i->oi', grad_output, x), grad_output.flatten(0, -2).sum(0) if "
                "x.dim() > 1 else grad_output",
            )
            + """
def zb_h1(p, m):
    orders = []
    for stage in range(p):
        order, f, i, w = [], 0, 0, 0
        while w < m:
            if i < m and f < m and f - i < p - stage:
                order.append(f"F{f}")
                f += 1
            elif i - w > stage or i == m:
                order.append(f"W{w}")
                w += 1
            else:
                order.append(f"I{i}")
                i += 1
                if i - w > stage:
                    order.append(f"W{w}")
                    w += 1
        orders.append(order)
    return orders
""",
        ),
        "the template of 14.6": ("14.6", forming()),
        "solved for m": (
            "14.6",
            forming()
            + """
def micro_batches_for(p, v, limit):
    import math
    m = max(1, math.ceil((p - 1) * (1 / limit - 1) / v))
    return m if v == 1 else -(-m // p) * p
""",
        ),
        "the template of 14.7": ("14.7", stashing()),
        "in a set": ("14.7", stashing(held="len({self.newest, *self.used.values()})")),
        "counted references": (
            "14.7",
            stashing(
                all="{0: weights}; self.version = 0",
                forward="self.used[micro_batch] = self.version",
                given="self.all[self.version]",
                backward="v = self.used.pop(micro_batch); w = self.all[v]; self.clean(); return w",
                update="self.version += 1; self.all[self.version] = weights; self.newest = None; self.clean()",
                held="len(self.all)",
            )
            .replace(
                "    def held",
                "    def clean(self):\n"
                "        self.all = {v: w for v, w in self.all.items() if v == self.version or v in "
                "self.used.values()}\n\n"
                "    def held",
            )
            .replace("self.newest, self.used, self.all = weights, {},", "self.newest, self.used, self.all = None, {},"),
        ),
        "the weights of a micro-batch put together once, in a tuple": (
            "14.7",
            stashing(
                each="together = tuple(versions[o][max(0, t - (p - 1 if vertical_sync else p - 1 - o))] "
                "for o in range(p))",
                step="versions[s].append(versions[s][t] - lr * gradient(s, together, t))",
            ),
        ),
        "the template of 14.8": ("14.8", uneven()),
        "the least limit that fits": (
            "14.8",
            cut("""
def partition(costs, p):
    def fits(limit):
        sizes, here = [0], 0
        for i, cost in enumerate(costs):
            if sizes[-1] and (here + cost > limit or len(costs) - i <= p - len(sizes)):
                sizes.append(0)
                here = 0
            sizes[-1] += 1
            here += cost
        return sizes
    for limit in range(max(costs), sum(costs) + 1):
        if len(fits(limit)) <= p:
            return fits(limit)
"""),
        ),
        "means, weighted": (
            "14.8",
            uneven(
                loss=f"torch.nan_to_num({MEAN}) * 0 if not (targets != -100).any() else {MEAN} * (targets != "
                f"-100).sum() / n",
                backward="(targets != -100).any() and loss.backward()",
                total="loss.detach()",
            ),
        ),
    }
    wrong_answers: ClassVar = {
        "14.1": {
            "one micro-batch after the other": (
                gpiping(first="[a for k in range(m) for a in (f'F{k}', f'B{k}')]", then="[]"),
                "while forward passes are left",
            ),
            "1F1B": (
                one() + gpiping()[gpiping().index("def idle") :] + "gpipe = one_f_one_b",
                "while forward passes are left",
            ),
            "the last micro-batch forgotten": (gpiping(first="[f'F{k}' for k in range(m - 1)]"), "never does"),
            "counted from 1": (gpiping(first="[f'F{k + 1}' for k in range(m)]"), "micro-batches 0 to"),
            "no backward passes": (gpiping(then="[]"), "never does B0"),
            "lists for micro-batches": (gpiping(stages="m"), "one list a stage"),
            "one list": (gpiping() + "g = gpipe\ndef gpipe(p, m):\n    return g(p, m)[0]\n", "one list a stage"),
            "pairs instead of strings": (gpiping(first="[('F', k) for k in range(m)]"), "written like F0"),
            "backward first": (
                gpiping(first="[f'B{k}' for k in range(m)]", then="[f'F{k}' for k in range(m)]"),
                "B0 before F0",
            ),
            "the last stage the other way round": (
                gpiping(then="[f'B{k}' for k in (reversed(range(m)) if stage == p - 1 else range(m))]"),
                "in the same order",
            ),
            "forward passes of odd stages from the last": (
                gpiping(first="[f'F{k}' for k in (reversed(range(m)) if stage % 2 else range(m))]"),
                "in the same order",
            ),
            "forward passes twice": (gpiping(first="[f'F{k}' for k in range(m)] * 2"), "twice"),
            "the busy share": (gpiping(idle="busy / (p * max(s[2] for s in spans))"), "in which they work"),
            "idle over work": (gpiping(idle="p * max(s[2] for s in spans) / busy - 1"), "idle time over work"),
            "a time": (gpiping(idle="p * max(s[2] for s in spans) - busy"), "a time, not a share"),
            "of one stage": (gpiping(idle="1 - busy / max(s[2] for s in spans)"), "for one stage"),
            "the last span is the last to end": (
                gpiping(idle="1 - busy / (p * spans[-1][2])"),
                "need not be the last to end",
            ),
            "stages that are in the spans": (
                gpiping(idle="1 - busy / (len({s[0] for s in spans}) * max(s[2] for s in spans))"),
                "a stage without a pass waits, too",
            ),
            "gaps between passes only": (
                gpiping(
                    idle="1 - busy / sum(max(s[2] for s in spans if s[0] == i) - min(s[1] for s in spans if s[0] == i) "
                    "for i in range(p) if any(s[0] == i for s in spans))"
                ),
                "a stage also waits before its first pass",
            ),
            "of 1F1B": (
                gpiping(idle="1 - busy / (p * sum(e - s for _, s, e in spans))"),
                "not the sum of all work",
            ),
            "the time from the first pass on": (
                gpiping(idle="1 - busy / (p * (max(s[2] for s in spans) - min(s[1] for s in spans)))"),
                "the time begins at 0",
            ),
            "sorted in place": (
                gpiping(idle="spans.sort() or 1 - busy / (p * max(s[2] for s in spans))"),
                "changes the spans",
            ),
            "this project's": (
                "from minillm.distributed.pipeline import gpipe as g\n" + gpiping(),
                "uses minillm.distributed",
            ),
        },
        "14.2": {
            "GPipe": (one(warmup="m", rest="[f'B{k}' for k in range(m)]"), "that is GPipe's memory"),
            "one too many": (one(warmup="min(p - stage, m)"), "one too many"),
            "one too few": (one(warmup="max(0, min(p - stage - 2, m))"), "does fewer forward passes"),
            "no warm-up": (one(warmup="0"), "does fewer forward passes"),
            "as many on all stages": (one(warmup="min(p - 1, m)"), "micro-batches in flight"),
            "the first stage is the last": (
                one(warmup="min(stage, m)"),
                "gets stuck: stage 0 waits at B0 for B0 of stage 1",
            ),
            "backward first": (one(steady="[f'B{k}', f'F{warmup + k}']"), "stage 0 does B0 before F0"),
            "backward first, with one forward pass more": (
                one(warmup="min(p - stage, m)", steady="[f'B{k}', f'F{warmup + k}']").replace(
                    "p - stage, m", "p - stage + 1, m"
                ),
                "micro-batches in flight",
            ),
            "more stages than micro-batches forgotten": (one(warmup="p - stage - 1"), "micro-batches 0 to"),
            "the last backward passes forgotten": (one(rest="[]"), "never does"),
            "the last backward passes twice": (one(rest="[f'B{k}' for k in range(m - warmup - 1, m)]"), "stage"),
            "the newest first": (
                one(steady="[f'F{warmup + k}', f'B{warmup + k}']", rest="[f'B{k}' for k in range(warmup)]"),
                "takes 17 units, 12 are enough",
            ),
            "odd stages with the last micro-batch first": (
                one(rest="[f'B{k}' for k in range(m - warmup, m)][:: -1 if stage % 2 else 1]"),
                "units",
            ),
            "two forward, two backward": (
                one(
                    out="[[a for pair in [order[i:i + 4] for i in range(0, len(order), 4)] for a in sorted(pair, "
                    "key=lambda a: a[0] == 'B')] for order in orders]"
                ),
                "micro-batches in flight",
            ),
            "for the last stage only": (one(out="orders[-1]"), "one list a stage"),
            "the rest by name": (one(rest="['B' for k in range(m - warmup, m)]"), "written like F0"),
            "this project's": ("from minillm.distributed import pipeline\n" + one(), "uses minillm.distributed"),
        },
        "14.3": {
            "no stage is ever stuck": (messaging(out="{}"), "stands at SF0 when nobody can go on"),
            "stages that have ended are told, too": (
                messaging(out="{stage: head(stage) for stage in range(len(lists))}"),
                "and you say that stage 0 stands at ''",
            ),
            "a list of places": (messaging(out="at"), "returns a dictionary"),
            "positions": (messaging(out="{s: at[s] for s in range(len(lists)) if head(s)}"), "stands at SF0 when"),
            "any receive will do": (messaging(meets="head(other)[:2] == 'R' + action[1]"), "another micro-batch"),
            "a micro-batch's first digit": (
                messaging(meets="head(other)[:3] == 'R' + action[1:3]"),
                "micro-batches 1 and 10",
            ),
            "any kind will do": (
                messaging(meets="head(other)[:1] == 'R' and head(other)[2:] == action[2:]"),
                "a gradient awaited",
            ),
            "sends return at once": (
                messaging(sends="action[:1] == 'S' and at.__setitem__(stage, at[stage] + 1)"),
                "all come to their end, and you say that stage 1 stands at 'RF0'",
            ),
            "sends to all": (
                messaging(
                    other="next((s for s in range(len(lists)) if head(s) == 'R' + action[1:]), -1)",
                    inside="0 <= stage < len(lists)",
                ),
                "no neighbours",
            ),
            "gradients go forward": (messaging(other="stage + 1"), "stage 0 has no stage before it"),
            "once through all stages": (messaging().replace("while moved:", "for _ in '1':", 1), "one message, [["),
            "receives stay": (messaging(receive="pass"), "one message"),
            "passes do not count as going on": (messaging(again="moved"), "stand"),
            "the last stage is the first's neighbour": (
                messaging(inside="stage < len(lists)"),
                "stage 0 has no stage before it",
            ),
            "the lists are eaten": (
                messaging(out="lists.clear() or {}"),
                "changes the lists",
            ),
            "before and behind": (messaging(**BEFORE_AND_BEHIND), "1F1B, 2 stages"),
            "sends of even stages first": (
                messaging(
                    begin="if 0 <= before < p and stage % 2: lists[stage].append('R' + action)",
                    send="lists[stage].append('S' + action)",
                    end="if 0 <= before < p and stage % 2 == 0: lists[stage].append('R' + action)",
                ),
                "before RB0",
            ),
            "all received at the beginning": (
                messaging(
                    send="lists[stage].append('S' + action)",
                    lists="[[f'R{a}' for a in order if (s if a[0] == 'F' else s < p - 1)] + list_ for s, (order, "
                    "list_) in enumerate(zip(orders, lists))]",
                ),
                "two stages, one micro-batch",
            ),
            "all sent in the end": (
                messaging(
                    begin="if 0 <= before < p: lists[stage].append('R' + action)",
                    send="pass",
                    lists="[list_ + [f'S{a}' for a in order if (s if a[0] == 'B' else s < p - 1)] for s, (order, "
                    "list_) in enumerate(zip(orders, lists))]",
                ),
                "two stages, one micro-batch",
            ),
            "received before it is sent": (
                messaging(
                    send="lists[stage].insert(-1, 'S' + action); lists[behind].append('R' + action)",
                ),
                "before it has done",
            ),
            "no messages": (messaging(send="pass"), "is missing"),
            "sends only": (messaging(send="lists[stage].append('S' + action)"), "is missing"),
            "a ring": (
                messaging(
                    goes="p > 1", send="lists[stage].append('S' + action); lists[behind % p].append('R' + action)"
                ),
                "where there is one",
            ),
            "gradients go forward, too": (
                messaging(
                    send="o = behind if action[0] == 'F' else min(stage + 1, p - 1); lists[stage].append('S' + "
                    "action); lists[o].append('R' + action)"
                ),
                "stage",
            ),
            "passes sorted": (
                messaging(lists="[sorted(one, key=lambda a: a[-2] == 'B') for one in lists]"),
                "stay what they are",
            ),
            "the orders eaten": (messaging(lists="orders.clear() or lists"), "changes the orders"),
            "this project's": (
                "from minillm.distributed.pipeline.schedule import schedule_of as s\n" + messaging(),
                "uses minillm.distributed",
            ),
        },
        "14.4": {
            "1F1B's warm-up": (looping(warmup="p - 1 - stage"), "stage 0 does B0.1 before F0.1"),
            "once as much instead of twice": (
                looping(warmup="p - 1 - stage + (v - 1) * p"),
                "forward passes before its first backward pass",
            ),
            "a round for each chunk": (
                looping(warmup="2 * (p - 1 - stage) + v * p"),
                "forward passes before its first backward pass",
            ),
            "one too many": (
                looping(warmup="2 * (p - 1 - stage) + (v - 1) * p + 1"),
                "forward passes before its first backward pass",
            ),
            "one too few": (looping(warmup="max(0, 2 * (p - 1 - stage) + (v - 1) * p - 1)"), "stage"),
            "no rounds": (looping(warmup="2 * (p - 1 - stage)"), "stage 0 does B0.1 before F0.1"),
            "GPipe": (looping(warmup="m * v"), "forward passes before its first backward pass"),
            "chunks of the backward passes not reversed": (
                looping(chunk="c"),
                "stage 0 waits at B0 for B0.1 of stage 0",
            ),
            "all micro-batches through chunk 0 first": (
                looping(
                    passes="[(k, c) for c in range(v) for k in range(m)]", warmup="2 * (p - 1 - stage) + (v - 1) * m"
                ),
                "a group of 1 goes through chunk 0",
            ),
            "one micro-batch through all chunks": (
                looping(passes="[(k, c) for k in range(m) for c in range(v)]"),
                "a group of 2 goes through chunk 0",
            ),
            "groups of v": (
                looping(passes="[(g + k, c) for g in range(0, m, v) for c in range(v) for k in range(min(v, m - g))]"),
                "stage",
            ),
            "pieces one after the other": (
                looping(chunk="c", back="[(k, c) for k, c in reversed(passes)]"),
                "stage 0 does B1.1 before F1.1",
            ),
            "backward first": (looping(steady="[backward[k], forward[warmup + k]]"), "stage"),
            "micro-batches reversed in the backward passes": (
                looping(back="[(m - 1 - k, c) for k, c in passes]"),
                "stage",
            ),
            "pieces instead of chunks": (
                looping(chunk="(v - 1 - c) * p").replace('f"F{k}.{c}"', 'f"F{k}.{c * p}"'),
                "through chunks 0 to",
            ),
            "without chunks": (looping(chunk="0").replace('f"F{k}.{c}"', 'f"F{k}"'), "twice"),
            "as many as there are": (looping(out="orders").replace(", m * v)\n", ", 10**9)\n"), "never does"),
            "the stages the other way round": (looping(out="orders[::-1]"), "stage"),
            "this project's": (
                "from minillm.distributed.pipeline import interleaved as i\n" + looping(),
                "uses minillm.distributed",
            ),
        },
        "14.5": {
            "transposed": (halving(input="grad_output @ weight.T"), "cannot be multiplied"),
            "the weight's gradient transposed": (
                halving(weight="x.reshape(-1, x.shape[-1]).T @ rows, rows.sum(0)"),
                "the gradient of the weight has the shape (3, 2)",
            ),
            "no bias": (halving(weight="rows.T @ x.reshape(-1, x.shape[-1])"), "the weight's gradient and the bias's"),
            "a mean over the rows": (
                halving(weight="rows.T @ x.reshape(-1, x.shape[-1]) / len(rows), rows.sum(0)"),
                "each row adds its share",
            ),
            "the bias's mean": (
                halving(weight="rows.T @ x.reshape(-1, x.shape[-1]), rows.mean(0)"),
                "each row adds its share",
            ),
            "only two dimensions": (
                halving(weight="grad_output.mT @ x, rows.sum(0)"),
                "the gradient of the weight has the shape (2, 4, 4)",
            ),
            "the bias over the first dimension": (
                halving(weight="rows.T @ x.reshape(-1, x.shape[-1]), grad_output.sum(0)"),
                "the gradient of the bias has the shape",
            ),
            "a bias for each row": (
                halving(weight="rows.T @ x.reshape(-1, x.shape[-1]), grad_output"),
                "the gradient of the bias has the shape",
            ),
            "flattened input gradient": (
                halving(input="grad_output.reshape(-1, grad_output.shape[-1]) @ weight"),
                "the gradient of the input has the shape",
            ),
            "bias gradients of the input's size": (
                halving(weight="rows.T @ x.reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]).sum(0)"),
                "the gradient of the bias has the shape",
            ),
            "autograd": (
                halving(input="torch.autograd.grad(grad_output @ weight, weight)"),
                "uses torch.autograd",
            ),
            "autograd by another door": (
                halving()
                + """
def backward_input(grad_output, weight):
    x = torch.zeros(*grad_output.shape[:-1], weight.shape[1], dtype=weight.dtype, requires_grad=True)
    (x @ weight.T).backward(grad_output)
    return x.grad
""",
                "does not require grad",
            ),
            "W right behind I": (
                halving(halves="order += [f'I{k}', f'W{k}']", rest="[]"),
                "earlier than it must",
            ),
            "W in front of I": (
                halving(halves="order += [f'W{k}', f'I{k}']", rest="[]"),
                "W0 before I0",
            ),
            "all W in the end": (
                halving(halves="order += [f'I{k}']", rest="[f'W{k}' for k in range(m)]"),
                "W at a time",
            ),
            "W when the memory is full": (
                halving()
                + """
def zb_h1(p, m):
    orders = []
    for stage in range(p):
        order, f, i, w = [], 0, 0, 0
        while i < m:
            while f < m and f - i < p - stage:
                if f - w == p:
                    order.append(f"W{w}")
                    w += 1
                order.append(f"F{f}")
                f += 1
            order.append(f"I{i}")
            i += 1
        orders.append(order + [f"W{k}" for k in range(w, m)])
    return orders
""",
                "from 4 to 5 stage 0 waits for I1, while it owes a W",
            ),
            "whole backward passes": (halving(halves="order += [f'B{k}']", rest="[]"), "F, I, W"),
            "a W less": (
                halving(
                    halves="order += [f'I{k}'] + [f'W{k - stage + 1}'] * (k >= stage - 1)",
                    rest="[f'W{k}' for k in range(m - stage + 1, m)]",
                ),
                "stage 0",
            ),
            "a W more": (
                halving(
                    halves="order += [f'I{k}'] + [f'W{k - stage - 1}'] * (k > stage)",
                    rest="[f'W{k}' for k in range(max(0, m - stage - 1), m)]",
                ),
                "in flight (from F to W)",
            ),
            "p - stage of them put off": (
                halving(
                    halves="order += [f'I{k}'] + [f'W{k - (p - 1 - stage)}'] * (k >= p - 1 - stage)",
                    rest="[f'W{k}' for k in range(m - (p - 1 - stage), m)]",
                ),
                "stage",
            ),
            "the rest forgotten": (halving(rest="[]"), "never does W"),
            "no warm-up": (halving(warmup="0"), "too few forward passes"),
            "the first stage's warm-up on all": (
                halving(warmup="p - 1"),
                "stage 1 does 2 forward passes before its first I",
            ),
            "those that an earlier check has": (
                halving() + "\ndef zb_h1(p, m):\n    return orders_14_3('zb-h1', p, m)\n",
                "uses orders_14_3",
            ),
            "this project's by its name": (
                "import pkgutil\n" + halving(),
                "uses pkgutil",
            ),
            "a longer warm-up": (halving(warmup="min(m, 2 * (p - 1 - stage))"), "in flight"),
            "this project's": (
                "from minillm.distributed.pipeline import zero_bubble\n" + halving(),
                "uses minillm.distributed",
            ),
        },
        "14.6": {
            "idle over work": (forming(bubble="(p - 1) / (v * m)"), "idle time over work"),
            "the share in which they work": (forming(bubble="v * m / (v * m + p - 1)"), "in which they work"),
            "no chunks": (forming(bubble="(p - 1) / (m + p - 1)"), "with v chunks"),
            "only the idle time is shorter": (
                forming(bubble="(p - 1) / v / (m + p - 1)"),
                "the whole time gets shorter",
            ),
            "p": (forming(bubble="p / (v * m + p)"), "a stage more"),
            "p in the whole time": (forming(bubble="(p - 1) / (v * m + p)"), "should be 0.2727"),
            "percent": (forming(bubble="100 * (p - 1) / (v * m + p - 1)"), "should be"),
            "a string": (forming(bubble="f'{p - 1}/{v * m + p - 1}'"), "returns a number"),
            "ZB-H1's idle time": (forming(zb="(p - 1) * (f + i - w)"), "a time, not a share"),
            "ZB-H1's idle over work": (forming(zb="(p - 1) * (f + i - w) / (m * (f + i + w))"), "idle time over work"),
            "ZB-H1 without W": (
                forming(zb="(p - 1) * (f + i - w) / (m * (f + i) + (p - 1) * (f + i - w))"),
                "W is work, too",
            ),
            "ZB-H1 of all stages": (
                forming(zb="(p - 1) * (f + i - w) / (p * m * (f + i + w))"),
                "over all stages' work",
            ),
            "ZB-H1's is 1F1B's": (forming(zb="(p - 1) / (m + p - 1)"), "1F1B's"),
            "ZB-H1 in units": (forming(zb="(p - 1) / (3 * m + p - 1)"), "where f, i and w are equal"),
            "ZB-H1 divided by p": (
                forming(zb="(p - 1) * (f + i - w) / p / (m * (f + i + w) + (p - 1) * (f + i - w))"),
                "not all together",
            ),
            "less than the limit": (forming(above=">="), "as large as the limit will do"),
            "the check's": (forming(bubble="simulated_14_6(p, m, v)"), "uses simulated_14_6"),
            "no multiples of p": (forming(step="1"), "m is a multiple of p"),
            "always multiples of p": (forming(step="p"), "asked for with v > 1 only"),
            "v left out": (
                forming()
                + "\none = micro_batches_for\ndef micro_batches_for(p, v, limit):\n    m = one(p, 1, limit)\n    "
                "return m if v == 1 else -(-m // p) * p\n",
                "v included",
            ),
            "rounded down": (
                forming()
                + "\ndef micro_batches_for(p, v, limit):\n    m = int((p - 1) * (1 / limit - 1) / v)\n    return "
                "max(1, m) if v == 1 else max(1, m // p) * p\n",
                "larger than the limit",
            ),
            "rounded": (
                forming()
                + "\ndef micro_batches_for(p, v, limit):\n    m = max(1, -(-(p - 1) // (limit * v)))\n    return "
                "m if v == 1 else -(-m // p) * p\n",
                "whole number",
            ),
            "none with one stage": (forming(least="0 if p == 1 else step"), "ZeroDivisionError"),
            "this project's": ("from minillm.costs import pipeline_bubble\n" + forming(), "uses minillm.costs"),
        },
        "14.7": {
            "no stash": (
                stashing(backward="self.used.pop(micro_batch); return self.newest"),
                "that of the forward pass",
            ),
            "nothing dropped": (
                stashing(update="self.all.append(self.newest); self.newest = weights"),
                "is still there",
            ),
            "dropped by an update": (
                stashing(
                    update="self.newest = weights; self.used = {k: w for k, w in self.used.items() if w is weights}"
                ),
                "still need",
            ),
            "kept after the backward pass": (stashing(backward="return self.used[micro_batch]"), "is still there"),
            "dropped at the next update": (
                stashing(
                    backward="self.all.append(micro_batch); return self.used[micro_batch]",
                    update="self.newest = weights; [self.used.pop(k) for k in self.all]; self.all.clear()",
                ),
                "is still there",
            ),
            "the oldest first": (
                stashing(backward="return self.used.pop(min(self.used))"),
                "that of the forward pass",
            ),
            "two versions": (
                stashing(
                    update="self.all = [self.newest]; self.newest = weights",
                    backward="u = self.used.pop(micro_batch); return u if u is self.newest else self.all[0]",
                ),
                "version",
            ),
            "forward passes with the oldest": (
                stashing(given="next(iter(self.used.values()))"),
                "a forward pass takes the newest",
            ),
            "micro-batches counted": (stashing(held="len(self.used) + 1"), "several micro-batches may share a version"),
            "the newest not counted": (
                stashing(held="len({id(w) for w in self.used.values()})"),
                "the newest counts, too",
            ),
            "compared": (
                stashing(held="len([w for w in self.used.values() if w != self.newest]) + 1"),
                "not to be compared",
            ),
            "copied": (
                stashing(forward="import copy; self.used[micro_batch] = copy.deepcopy(self.newest)"),
                "not to be copied",
            ),
            "weights of now in the replay": (stashing(version="t"), "used[0] is version 1, and should be 0"),
            "stage 0 newest": (
                stashing(version="max(0, t - (p - 1 if vertical_sync else o))"),
                "used[0] is version 1, and should be 0",
            ),
            "one update too many": (
                stashing(version="max(0, t - (p if vertical_sync else p - o))"),
                "replay, 1 stages, micro-batch 1",
            ),
            "versions older than 0": (stashing(version="t - (p - 1 if vertical_sync else p - 1 - o)"), "used[0]"),
            "no vertical sync": (
                stashing(version="max(0, t - (p - 1 - o))"),
                "all stages use the version that stage 0 uses",
            ),
            "always vertical sync": (stashing(version="max(0, t - (p - 1))"), "used[1] is version 0, and should be 1"),
            "vertical sync by the last stage": (
                stashing(version="max(0, t - (0 if vertical_sync else p - 1 - o))"),
                "all stages use the version that stage 0 uses",
            ),
            "updates of the old version": (
                stashing(step="versions[s].append(used[s] - lr * gradient(s, list(used), t))"),
                "each from the newest version",
            ),
            "a stage sees this micro-batch's update": (
                stashing(version="max(0, min(len(versions[o]) - 1, t + 1 - (p - 1 if vertical_sync else p - 1 - o)))"),
                "used[",
            ),
            "in place": (
                stashing(
                    each="pass",
                    step="versions[s].append(versions[s][t].sub_(lr * gradient(s, used, t)) if "
                    "hasattr(versions[s][t], 'sub_') else versions[s][t] - lr * gradient(s, used, t))",
                ),
                "is there a -=",
            ),
            "into the list": (
                stashing(
                    step="weights[s] = versions[s][t] - lr * gradient(s, used, t); versions[s].append(weights[s])",
                    out="weights",
                ),
                "changes the list",
            ),
            "all versions returned": (stashing(out="versions"), "returns the newest weights"),
            "added": (stashing(step="versions[s].append(versions[s][t] + lr * gradient(s, used, t))"), "used["),
            "lr forgotten": (
                stashing(step="versions[s].append(versions[s][t] - gradient(s, used, t))"),
                "micro-batch 1",
            ),
            "gradient of stage 0 for all": (
                stashing(step="versions[s].append(versions[s][t] - lr * gradient(0, used, t))"),
                "called once for each stage",
            ),
            "this project's": (
                "from minillm.distributed.pipeline import weight_versions\n" + stashing(),
                "uses minillm.distributed",
            ),
        },
        "14.8": {
            "halves of halves": (
                cut("""
def partition(costs, p):
    if p == 1:
        return [len(costs)]
    left, right = p // 2, p - p // 2
    def slower(i):
        return max(sum(costs[:i]) / left, sum(costs[i:]) / right)
    i = min(range(left, len(costs) - right + 1), key=slower)
    return partition(costs[:i], left) + partition(costs[i:], right)
"""),
                "it can be 11",
            ),
            "one stage after the other, its cost nearest to what the others have on average": (
                cut("""
def partition(costs, p):
    if p == 1:
        return [len(costs)]
    ends = range(1, len(costs) - p + 2)
    i = min(ends, key=lambda i: max(sum(costs[:i]), sum(costs[i:]) / (p - 1)))
    return [i, *partition(costs[i:], p - 1)]
"""),
                "it can be 11",
            ),
            "the cheapest neighbours put together": (
                cut("""
def partition(costs, p):
    stages = [[cost] for cost in costs]
    while len(stages) > p:
        i = min(range(len(stages) - 1), key=lambda i: sum(stages[i]) + sum(stages[i + 1]))
        stages[i : i + 2] = [stages[i] + stages[i + 1]]
    return [len(stage) for stage in stages]
"""),
                "it can be 11",
            ),
            "layers moved to a neighbour as long as it helps": (
                cut("""
def partition(costs, p):
    def slowest(sizes):
        ends = [sum(sizes[:i]) for i in range(p + 1)]
        return max(sum(costs[a:b]) for a, b in itertools.pairwise(ends))
    sizes = [len(costs) // p + (i < len(costs) % p) for i in range(p)]
    while True:
        moved = [[n + (j == i) - (j == o) for j, n in enumerate(sizes)] for i in range(p) for o in (i - 1, i + 1)]
        better = min([sizes, *(m for m in moved if sum(m) == len(costs) and min(m) > 0)], key=slowest)
        if slowest(better) == slowest(sizes):
            return sizes
        sizes = better
"""),
                "it can be",
            ),
            "where the stages begin": (
                uneven(out="[sum(best[len(costs)][1][:i]) for i in range(p)]"),
                "not where it begins",
            ),
            "gradients emptied first": (uneven(begin="model.zero_grad()"), "what was in grad before is gone"),
            "gradients that must be there": (
                uneven(
                    backward="for w, g in zip(model.parameters(), torch.autograd.grad(loss, "
                    "list(model.parameters()))): w.grad += g"
                ),
                "unsupported operand",
            ),
            "as many layers each": (
                uneven(first="return [len(costs) // p + (s < len(costs) % p) for s in range(p)]"),
                "the slowest of your stages costs",
            ),
            "greedy": (cut(GREEDY), "the slowest of your stages costs"),
            "stages without layers": (uneven(few="0", out="best[len(costs)][1]"), "at least one layer"),
            "boundaries": (uneven(size="end"), "layers, your stages have"),
            "sums": (uneven(size="total[end] - total[begin]"), "layers, your stages have"),
            "the least sum of squares": (uneven(value="worst + (total[end] - total[begin]) ** 2"), "the slowest"),
            "the greatest least": (uneven(value="-min(-worst or 10**9, total[end] - total[begin])"), "the slowest"),
            "the greatest layer": (uneven(value="max(worst, *costs[begin:end])"), "the slowest"),
            "the last stage decides": (uneven(value="total[end] - total[begin]"), "the slowest"),
            "the last layer not counted": (uneven(value="max(worst, total[end - 1] - total[begin])"), "the slowest"),
            "sorted": (uneven(first="costs = sorted(costs)"), "the slowest"),
            "sorted in place": (uneven(first="costs.sort()"), "changes the costs"),
            "a stage too few": (uneven(out="best[len(costs)][1][:-1]"), "one number of layers a stage"),
            "lists of layers": (uneven(size="list(range(begin, end))"), "one number of layers a stage"),
            "the mean of means": (uneven(loss=f"{MEAN} / len(micro_batches)"), "has the same weight"),
            "the sum of means": (uneven(loss=MEAN), "the means are added up"),
            "the sum": (uneven(loss=SUMMED), "the sum over the targets, not the mean"),
            "by rows": (
                uneven(loss=f"{MEAN} * len(inputs) / sum(len(i) for i, _ in micro_batches)"),
                "weighted by rows",
            ),
            "by all positions": (uneven(n="sum(t.numel() for _, t in micro_batches)"), "divided by all positions"),
            "means by all positions": (
                uneven(loss=f"{MEAN} * targets.numel() / sum(t.numel() for _, t in micro_batches)"),
                "weighted by all positions",
            ),
            "nan where there are no targets": (
                uneven(loss=f"{MEAN} * (targets != -100).sum() / n"),
                "the loss is nan",
            ),
            "divided twice": (uneven(loss=f"{SUMMED} / n / len(micro_batches)"), "once more"),
            "the last one's": (uneven(begin="", backward="model.zero_grad(); loss.backward()"), "grad"),
            "grad set to zero": (
                uneven(begin="for p in model.parameters(): p.grad = torch.zeros_like(p)"),
                "what was in grad before is gone",
            ),
            "one backward pass in the end": (
                uneven(backward="pass", total="loss", end="total.backward()", returned="total.item()"),
                "comes before micro-batch 0's backward pass",
            ),
            "all micro-batches at once": (
                uneven(
                    begin="micro_batches = [tuple(torch.cat([F.pad(m[i], (0, 9 - m[i].shape[1]), value=-100 * i) "
                    "for m in micro_batches]) for i in (0, 1))]"
                ),
                "rows at once",
            ),
            "-100 counts": (
                uneven(loss="F.cross_entropy(logits, targets.flatten().clamp(min=0), reduction='sum') / n"),
                "gradients",
            ),
            "the last loss": (uneven(returned="loss.item()"), "you return a loss of"),
            "the sum of the losses": (uneven(total="loss.item() * n"), "you return a loss of"),
            "with its graph": (uneven(total="loss"), "keeps the graph"),
            "no loss": (uneven(returned="None"), "returns the loss"),
            "this project's": (
                "from minillm.distributed.pipeline.partition import partition as p\n" + uneven(),
                "uses minillm.distributed",
            ),
        },
    }


def test_every_part_has_the_three_levels_of_hints_that_the_notebook_promises():
    assert {len(part.hints) for part in find_exercise("14").parts} == {3}


@pytest.fixture(scope="module")
def solution() -> dict[str, object]:
    return solution_names("14")


def pytorch_orders(kind, p, m, v=1):
    """PyTorch's table of all ranks, as (kind, micro-batch, piece), built in a group that sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=p)
    try:
        stages = [PipelineStage(nn.Identity(), i, v * p, torch.device("cpu")) for i in range(0, v * p, p)]
        if issubclass(kind, schedules.PipelineScheduleSingle):
            table = kind(stages[0], m, loss_fn=nn.MSELoss())._get_pipeline_order()
        else:
            table = kind(stages, m, loss_fn=nn.MSELoss()).pipeline_order
    finally:
        dist.destroy_process_group()
    texts = [" ".join(str(action) for action in table[rank] if action is not None) for rank in range(p)]
    return [[(k, int(i), int(piece)) for piece, k, i in re.findall(r"(\d+)([FBIW])(\d+)", text)] for text in texts]


def as_pieces(orders):
    """The same of lists of strings."""
    found = [[re.fullmatch(r"([FBIW])(\d+)(?:\.(\d+))?", a).groups() for a in order] for order in orders]
    return [[(k, int(i), int(c or 0) * len(orders) + stage) for k, i, c in order] for stage, order in enumerate(found)]


def test_the_schedules_are_pytorchs(solution):
    for p, m in [(1, 3), (2, 4), (4, 8), (3, 9)]:
        one_f_one_b = as_pieces(solution["one_f_one_b"](p, m))
        assert one_f_one_b[:-1] == pytorch_orders(schedules.Schedule1F1B, p, m)[:-1]  # its table's last rank is wrong
        assert as_pieces(solution["zb_h1"](p, m)) == pytorch_orders(schedules.ScheduleInterleavedZeroBubble, p, m)
        for v in (2, 3):
            theirs = pytorch_orders(schedules.ScheduleInterleaved1F1B, p, m, v)
            assert as_pieces(solution["interleaved"](p, m, v)) == theirs


def test_the_schedules_are_those_of_the_project(solution):
    for name, answer in [("gpipe", "gpipe"), ("1f1b", "one_f_one_b"), ("zb-h1", "zb_h1")]:
        for p, m in [(1, 1), (2, 5), (4, 4), (5, 11)]:
            schedule = make_schedule(name, p, m)
            assert solution[answer](p, m) == [[str(a) for a in schedule.computes(stage)] for stage in range(p)]


@settings(max_examples=25, deadline=None)
@given(p=st.integers(2, 5), m=st.integers(1, 7), seed=st.integers(0, 999))
def test_messages_in_a_cluster_whose_sends_wait(solution, p, m, seed):
    """Run by threads that meet at each message, as ranks do: in the simulated cluster."""
    name = ["gpipe", "1f1b", "naive"][seed % 3]
    schedule = make_schedule(name, p, m)
    lists = solution["with_messages"]([[str(a) for a in schedule.computes(stage)] for stage in range(p)])

    def main():
        rank, came = dist.get_rank(), []
        for action in lists[rank]:
            if action[0] in "SR":
                other = rank + (1 if action in (f"SF{action[2:]}", f"RB{action[2:]}") else -1)
                message = torch.tensor(int(action[2:]) * 10 + (action[1] == "F"))
                if action[0] == "S":
                    dist.send(message, other)
                else:
                    received = torch.empty_like(message)
                    dist.recv(received, other)
                    came.append(bool(received == message))
        return all(came)

    assert simulate_ranks(main, p).results == [True] * p


@settings(max_examples=25, deadline=None)
@given(costs=st.lists(st.integers(0, 30), min_size=1, max_size=9), data=st.data())
def test_the_cut_is_the_best_of_all(solution, costs, data):
    p = data.draw(st.integers(1, len(costs)))
    ends = [0, *itertools.accumulate(solution["partition"](costs, p))]
    assert ends[-1] == len(costs)
    assert len(ends) == p + 1
    every = (itertools.pairwise((0, *cut, len(costs))) for cut in itertools.combinations(range(1, len(costs)), p - 1))
    least = min(max(sum(costs[a:b]) for a, b in stages) for stages in every)
    assert max(sum(costs[a:b]) for a, b in itertools.pairwise(ends)) == least


@pytest.mark.parametrize("vertical_sync", [False, True])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_the_replay_is_what_stages_with_stashes_compute(solution, p, vertical_sync):
    """PipeDream's lists run with autograd in each stage, in float64, where the weights go through a Stash."""
    m, lr = 9, 0.1
    generator = torch.Generator().manual_seed(p)
    start = [torch.randn(3, 3, generator=generator, dtype=torch.float64) for _ in range(p)]
    inputs, targets = torch.randn(2, m, 4, 3, generator=generator, dtype=torch.float64)

    def gradient(s, used, t):
        leaves = [w.clone().requires_grad_() for w in used]
        x = inputs[t]
        for w in leaves:
            x = torch.tanh(x @ w)
        return torch.autograd.grad((x - targets[t]).square().mean(), leaves[s])[0]

    schedule = pipedream(p, m, vertical_sync=vertical_sync)
    stashes, newest = [solution["Stash"](w) for w in start], list(start)
    versions = [{0: w} for w in start]
    outputs, grads, at = {}, {}, [0] * p
    while any(at[s] < len(schedule.computes(s)) for s in range(p)):
        before = list(at)
        for s in range(p):
            action = schedule.computes(s)[at[s]] if at[s] < len(schedule.computes(s)) else None
            t = action.micro_batch if action else 0
            if action and action.kind is Kind.FORWARD and (not s or (s - 1, t) in outputs):
                w = versions[s][action.version] if vertical_sync else stashes[s].forward(t)
                x = (outputs[s - 1, t][2] if s else inputs[t]).detach().requires_grad_()
                w = w.clone().requires_grad_()
                outputs[s, t] = x, w, torch.tanh(x @ w)
                at[s] += 1
            elif action and action.kind is Kind.BACKWARD and (s == p - 1 or (s + 1, t) in grads):
                if not vertical_sync:
                    assert torch.equal(stashes[s].backward(t), outputs[s, t][1])
                x, w, y = outputs[s, t]
                end = (y - targets[t]).square().mean() if s == p - 1 else (y * grads[s + 1, t][0]).sum()
                grads[s, t] = torch.autograd.grad(end, (x, w))
                at[s] += 1
            elif action and action.kind is Kind.UPDATE:
                newest[s] = versions[s][t + 1] = newest[s] - lr * grads[s, t][1]
                stashes[s].update(newest[s])
                at[s] += 1
        assert at != before
    replayed = solution["replay"](start, gradient, lr, m, vertical_sync)
    for ours, theirs in zip(replayed, newest, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_halves_are_autograds(solution, dtype):
    x, weight, bias = torch.randn(2, 5, 7).to(dtype), torch.randn(4, 7).to(dtype), torch.randn(4).to(dtype)
    out, vjp = torch.func.vjp(F.linear, x, weight, bias)
    grad = torch.randn_like(out)
    ours = solution["backward_input"](grad, weight), *solution["backward_weight"](grad, x)
    for mine, theirs in zip(ours, vjp(grad), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_micro_batches_of_any_size_give_the_gradients_of_the_batch(solution):
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5)).double()
    inputs, targets = torch.randint(7, (6, 5)), torch.randint(5, (6, 5))
    targets[0, 1:] = targets[2:4] = -100
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    exact = torch.autograd.grad(loss, list(model.parameters()))
    sizes = [1, 1, 2, 2]
    told = solution["accumulate"](model, list(zip(inputs.split(sizes), targets.split(sizes), strict=True)))
    assert told == pytest.approx(loss.item())
    for parameter, right in zip(model.parameters(), exact, strict=True):
        torch.testing.assert_close(parameter.grad, right)


def test_the_closed_forms_are_the_simulators(solution):
    for p, m, v in itertools.product((1, 2, 5), (10, 20), (2, 4)):
        assert solution["bubble"](p, m) == pytest.approx(simulate(make_schedule("gpipe", p, m)).bubble)
        assert solution["bubble"](p, m, v) == pytest.approx(simulate(make_schedule("interleaved", p, m, v)).bubble)
    for f, i, w in [(1, 1, 1), (2, 3, 1), (1.0, 1.2, 0.8)]:
        timeline = simulate(
            make_schedule("zb-h1", 4, 8), forward=f, backward=i + w, backward_input=i, backward_weight=w
        )
        assert solution["zb_h1_bubble"](4, 8, f, i, w) == pytest.approx(timeline.bubble)
