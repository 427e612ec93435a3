"""Exercise 12: wrong answers that students may well give, right ones of other kinds; one process as oracle."""

import warnings
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp import fully_shard

from minillm.costs.zero import zero_table
from minillm.distributed import run_ranks, simulate_ranks
from minillm.exercises.folder import find_exercise
from minillm.exercises.testing import ExerciseTests, solution_names

with warnings.catch_warnings():  # it compiles functions in a way that PyTorch itself calls outdated
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer

MAP = """
def shard_map(sizes, n):
    part = {part}
    owned = []
    for rank in {ranks}:
        pieces, begin = [], 0
        for name, size in {items}:
            start = {start}
            stop = {stop}
            if {keep}:
                pieces.append({piece})
            begin += {advance}
        owned.append(pieces)
    return {out}
"""
MAPPED = {
    "part": "-(-sum(sizes.values()) // n)",
    "ranks": "range(n)",
    "items": "sizes.items()",
    "start": "max(rank * part - begin, 0)",
    "stop": "min((rank + 1) * part - begin, size)",
    "keep": "start < stop",
    "piece": "(name, start, stop)",
    "advance": "size",
    "out": "owned",
}


def mapping(**changes: str) -> str:
    """Part 12.1's answer with some of its places filled in otherwise."""
    return MAP.format(**MAPPED | changes)


STAGE_1 = """
class ShardedOptimizer:
    def __init__(self, parameters, make):
        self.parameters, self.make = parameters, make
        self.n, self.rank = dist.get_world_size(), dist.get_rank()
        self.size = {size}
        self.own = slice(self.rank * self.size, (self.rank + 1) * self.size)
        self.part = nn.Parameter(self.flat([p.detach() for p in parameters])[self.own]{clone})
        {optimizer}

    def flat(self, tensors):
        flat = torch.cat([t.reshape(-1) for t in tensors])
        return {pad}

    def step(self):
        gradient = torch.empty_like(self.part)
        flat = self.flat([p.{what} for p in self.parameters])
        {reduce}
        self.part.grad = {mean}
        {update}
        {clean}
        full = self.part.new_empty(self.size * self.n)
        {gather}
        begin = 0
        for p in self.parameters:
            {copy}
            begin += p.numel()
        {after}
"""
STAGED = {
    "size": "-(-sum(p.numel() for p in parameters) // self.n)",
    "clone": ".clone()",
    "optimizer": "self.optimizer = make([self.part])",
    "pad": "torch.cat([flat, flat.new_zeros(self.size * self.n - len(flat))])",
    "what": "grad",
    "reduce": "reduce_scatter_tensor(gradient, flat)",
    "mean": "gradient / self.n",
    "update": "self.optimizer.step()",
    "clean": "self.part.grad = None",
    "gather": "all_gather_tensor(full, self.part.detach())",
    "copy": "p.data.copy_(full[begin : begin + p.numel()].view(p.shape))",
    "after": "pass",
}


def staging(**changes: str) -> str:
    """Part 12.2's answer with some of its places filled in otherwise."""
    return STAGE_1.format(**STAGED | changes)


STAGE_2 = """
def shard_gradients(parameters, buckets):
    n, rank = dist.get_world_size(), dist.get_rank()
    sizes = [{size} for bucket in buckets]
    shards = [torch.zeros({shard}, dtype={dtype}) for k in range(len(buckets))]
    missing = [set(bucket) for bucket in buckets]
    kept = []

    def arrived(k, index, parameter):
        {first}
        missing[k].discard(index)
        if {wait}:
            return
        {again}
        flat = torch.cat([parameters[i].grad.reshape(-1) for i in {order}])
        {free}
        {pad}
        mine = torch.empty_like(shards[k])
        {reduce}
        {add}

    for k, bucket in enumerate(buckets):
        for index in bucket:
            parameters[index].{register}(partial(arrived, k, index))
    {before}
    return {out}
"""
SHARDED = {
    "size": "-(-sum(parameters[i].numel() for i in bucket) // n)",
    "shard": "sizes[k]",
    "dtype": "parameters[0].dtype",
    "first": "pass",
    "wait": "missing[k]",
    "again": "missing[k] = set(buckets[k])",
    "order": "buckets[k]",
    "free": "for i in buckets[k]: parameters[i].grad = None",
    "pad": "flat = torch.cat([flat, flat.new_zeros(n * sizes[k] - len(flat))])",
    "reduce": "reduce_scatter_tensor(mine, flat)",
    "add": "shards[k] += mine / n",
    "register": "register_post_accumulate_grad_hook",
    "before": "pass",
    "out": "shards",
}


def sharding(**changes: str) -> str:
    """Part 12.3's answer with some of its places filled in otherwise."""
    return STAGE_2.format(**SHARDED | changes)


STAGE_3 = """
def shard_block(block):
    parameters = list(block.parameters())
    rank, n = dist.get_rank(), dist.get_world_size()
    size = {size}
    full = torch.zeros({total}, dtype=parameters[0].dtype)
    begin = 0
    for p in {order}:
        view = full[begin : begin + p.numel()].view(p.shape)
        view.copy_(p.detach())
        {show}
        begin += p.numel()
    shard = {shard}
    {keep}
    missing = set()

    def gather(*_):
        {resize}
        {gather}

    def free(*_):
        {free}

    def begin_backward(*_):
        {begin_backward}
        missing.update(parameters)

    def arrived(p):
        missing.discard(p)
        {arrived}

    {hooks}
    {end}
    return {out}
"""
SHOWN = {
    "size": "-(-sum(p.numel() for p in parameters) // n)",
    "total": "size * n",
    "order": "parameters",
    "show": "p.data = view",
    "shard": "full[rank * size : (rank + 1) * size].clone()",
    "keep": "pass",
    "resize": "full.untyped_storage().resize_(full.numel() * full.itemsize)",
    "gather": "all_gather_tensor(full, shard)",
    "free": "full.untyped_storage().resize_(0)",
    "begin_backward": "gather()",
    "arrived": "if not missing: free()",
    "hooks": "block.register_forward_pre_hook(gather); block.register_forward_hook(free); "
    "block.register_full_backward_pre_hook(begin_backward); "
    "[p.register_post_accumulate_grad_hook(arrived) for p in parameters]",
    "end": "free()",
    "out": "shard",
}


def showing(**changes: str) -> str:
    """Part 12.4's answer with some of its places filled in otherwise."""
    return STAGE_3.format(**SHOWN | changes)


CLIP = """
def clip_sharded(parts, replicated, max_norm):
    rank, n = dist.get_rank(), dist.get_world_size()
    total = torch.zeros((), dtype=torch.float64)
    for part, n_real in parts:
        total += {square}
    {reduce}
    for g in replicated:
        total += {alike}
    {then}
    norm = {norm}
    if {when}:
        for g in {which}:
            {scale}
    return {out}
"""
CLIPPED = {
    "square": "part[:n_real].double().square().sum()",
    "reduce": "dist.all_reduce(total)",
    "alike": "g.double().square().sum()",
    "then": "pass",
    "norm": "total.sqrt().item()",
    "when": "norm > max_norm",
    "which": "[part for part, _ in parts] + replicated",
    "scale": "g.mul_(max_norm / norm)",
    "out": "norm",
}


def clipping(**changes: str) -> str:
    """Part 12.5's answer with some of its places filled in otherwise."""
    return CLIP.format(**CLIPPED | changes)


COST = """
def bytes_each(mixed, numbers):
    return {each}

def rank_bytes(psi, n, stage, each):
    p, g, s = each
    return {kept}

def first_stage(psi, n, memory, each):
    return {first}

def sent_bytes(psi, n, stage, each, micro_batches=1):
    p, g, s = each
    k = micro_batches
    return {sent}

def mics_bytes(psi, n, p, each):
    r = n // p
    return {mics}

def offload_bytes(psi, n, each):
    p, g, s = each
    return {offload}
"""
COSTS = {
    "each": "(2, 2, 4 + 4 * numbers) if mixed else (4, 4, 4 * numbers)",
    "kept": "psi * (p / n ** (stage > 2) + g / n ** (stage > 1) + s / n ** (stage > 0))",
    "first": "next((t for t in range(4) if rank_bytes(psi, n, t, each) <= memory), None)",
    "sent": "(n - 1) / n * psi * (2 * g, g + p, k * g + p, k * (g + 2 * p))[stage]",
    "mics": "psi * sum(each) / p, (p - 1) / p * psi * (each[1] + 2 * each[0]) + 2 * (r - 1) / r * psi / p * each[1]",
    "offload": "psi * p, psi / n * (g + s), psi / n * (g + p)",
}


def costing(**changes: str) -> str:
    """Part 12.6's answer with some of its places filled in otherwise."""
    return COST.format(**COSTS | changes)


RESHARD = """
def reshard(saved, n_elements, m):
    {order}
    size = {size}
    states = [{{"rank": rank}} for rank in range({ranks})]
    for key, value in saved[0].items():
        if key == "rank":
            continue
        if {part}:
            flat = torch.cat([{of} for state in saved]){cut}
            flat = {pad}
            for rank in range(m):
                states[rank][key] = flat[rank * size : (rank + 1) * size]{clone}
        else:
            for rank in range(m):
                {other}
    return {out}
"""
RESHARDED = {
    "order": "saved = sorted(saved, key=lambda state: state['rank'])",
    "size": "-(-n_elements // m)",
    "ranks": "m",
    "part": "torch.is_tensor(value) and value.dim() == 1",
    "of": "state[key]",
    "cut": "[:n_elements]",
    "pad": "torch.cat([flat, flat.new_zeros(size * m - n_elements)])",
    "clone": ".clone()",
    "other": "states[rank][key] = value.clone() if torch.is_tensor(value) else value",
    "out": "states",
}


def resharding(**changes: str) -> str:
    """Part 12.7's answer with some of its places filled in otherwise."""
    return RESHARD.format(**RESHARDED | changes)


DELAY = """
class DelayedOptimizer:
    def __init__(self, optimizer, delay_after):
        self.optimizer, self.left, self.kept = optimizer, {left}, None
        self.parameters = {parameters}

    def step(self):
        if {ordinary}:
            self.left -= 1
            self.optimizer.step()
            return
        coming = [{coming} for p in self.parameters]
        {late}
        self.kept = coming

    def finish(self):
        if self.kept is None:
            {nothing}
        own = [p.grad for p in self.parameters]
        for p, g in zip(self.parameters, self.kept, strict=True):
            {put}
        {update}
        for p, g in zip(self.parameters, own, strict=True):
            {back}
        {clear}
"""
DELAYED = {
    "left": "delay_after",
    "parameters": "[p for group in optimizer.param_groups for p in group['params']]",
    "ordinary": "self.left > 0",
    "coming": "None if p.grad is None else p.grad.clone()",
    "late": "self.finish()",
    "nothing": "return",
    "put": "p.grad = g",
    "update": "self.optimizer.step()",
    "back": "p.grad = g",
    "clear": "self.kept = None",
}


def delaying(**changes: str) -> str:
    """Part 12.8's answer with some of its places filled in otherwise."""
    return DELAY.format(**DELAYED | changes)


class TestExercise12(ExerciseTests):
    exercise = "12"
    right_answers: ClassVar = {
        "the template of 12.1": ("12.1", mapping()),
        "element by element": (
            "12.1",
            """
def shard_map(sizes, n):
    elements = [(name, i) for name, size in sizes.items() for i in range(size)]
    part = (len(elements) + n - 1) // n
    owned = []
    for r in range(n):
        here = {}
        for name, i in elements[r * part:(r + 1) * part]:
            here.setdefault(name, []).append(i)
        owned.append(tuple((name, i[0], i[-1] + 1) for name, i in here.items()))
    return tuple(owned)
""",
        ),
        "the template of 12.2": ("12.2", staging()),
        "the mean by the library": (
            "12.2",
            staging(reduce="reduce_scatter_tensor(gradient, flat, op=dist.ReduceOp.AVG)", mean="gradient"),
        ),
        "parameters that are views of one buffer": (
            "12.2",
            """
class ShardedOptimizer:
    def __init__(self, parameters, make):
        self.n, r = dist.get_world_size(), dist.get_rank()
        total = sum(p.numel() for p in parameters)
        size = (total + self.n - 1) // self.n
        self.full = torch.zeros(size * self.n, dtype=parameters[0].dtype)
        begin = 0
        for p in parameters:
            view = self.full[begin : begin + p.numel()].view(p.shape)
            view.copy_(p.data)
            p.data = view
            begin += p.numel()
        self.parameters = parameters
        self.part = nn.Parameter(self.full[r * size : (r + 1) * size])
        self.optimizer = make([self.part])

    def step(self):
        flat = torch.zeros_like(self.full)
        begin = 0
        for p in self.parameters:
            flat[begin : begin + p.numel()] = p.grad.flatten() / self.n
            begin += p.numel()
        self.part.grad = torch.empty_like(self.part.data)
        reduce_scatter_tensor(self.part.grad, flat)
        self.optimizer.step()
        all_gather_tensor(self.full, self.part.data.clone())
""",
        ),
        "the template of 12.3": ("12.3", sharding()),
        "one by one into a buffer, divided before": (
            "12.3",
            sharding(
                pad="flat = nn.functional.pad(flat, (0, n * sizes[k] - len(flat))) / n",
                add="shards[k].add_(mine)",
            ),
        ),
        "the mean, asynchronously, waited for at once": (
            "12.3",
            sharding(reduce="reduce_scatter_tensor(mine, flat / n, async_op=True).wait()", add="shards[k].add_(mine)"),
        ),
        "the template of 12.4": ("12.4", showing()),
        "a counter": (
            "12.4",
            showing(
                begin_backward="gather(); counts.append(len(parameters))",
                keep="counts = []",
                arrived="counts[-1] -= 1; counts[-1] == 0 and free()",
            ),
        ),
        "the shard sent from where it stands in the buffer": (
            "12.4",
            showing(gather="full[rank * size : (rank + 1) * size] = shard; all_gather_tensor(full, shard)"),
        ),
        "the template of 12.5": ("12.5", clipping()),
        "a share of the replicated ones on each rank": (
            "12.5",
            clipping(
                reduce="pass",
                alike="g.double().square().sum() / n",
                then="dist.all_reduce(total)",
                norm="total.sqrt()",
                when="True",
                scale="g.mul_(torch.clamp(max_norm / (norm + 1e-12), max=1.0))",
            ),
        ),
        "replicated gradients on rank 0 only": (
            "12.5",
            clipping(reduce="pass", alike="g.double().square().sum() * (rank == 0)", then="dist.all_reduce(total)"),
        ),
        "the template of 12.6": ("12.6", costing()),
        "the template of 12.7": ("12.7", resharding()),
        "written into its place": (
            "12.7",
            resharding(order="saved = [next(s for s in saved if s['rank'] == r) for r in range(len(saved))]"),
        ),
        "the template of 12.8": ("12.8", delaying()),
        "a queue": (
            "12.8",
            """
import collections

class DelayedOptimizer:
    def __init__(self, optimizer, delay_after):
        self.optimizer, self.delay_after, self.calls, self.queue = optimizer, delay_after, 0, collections.deque()

    def all(self):
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self):
        self.queue.append([p.grad if p.grad is None else p.grad.detach().clone() for p in self.all()])
        if self.calls < self.delay_after or len(self.queue) > 1:
            self.finish()
        self.calls += 1

    def finish(self):
        if self.queue:
            own = [(p, p.grad) for p in self.all()]
            for (p, _), g in zip(own, self.queue.popleft()):
                p.grad = g
            self.optimizer.step()
            for p, g in own:
                p.grad = g
""",
        ),
    }
    wrong_answers: ClassVar = {
        "12.1": {
            "the last elements left out": (mapping(part="sum(sizes.values()) // n"), "it holds 2 elements"),
            "a part more than needed": (mapping(part="sum(sizes.values()) // n + 1"), "parts of"),
            "only even sizes": (
                mapping(part="(lambda q: q[0] if q[1] == 0 else 0)(divmod(sum(sizes.values()), n))"),
                "3 parts of 3",
            ),
            "as tensor_split does it": (
                """
def shard_map(sizes, n):
    import torch
    elements = [(name, i) for name, size in sizes.items() for i in range(size)]
    owned = []
    for chunk in torch.arange(len(elements)).tensor_split(n):
        here = {}
        for e in chunk:
            here.setdefault(elements[e][0], []).append(elements[e][1])
        owned.append([(name, i[0], i[-1] + 1) for name, i in here.items()])
    return owned
""",
                "padding included",
            ),
            "each tensor padded": (
                mapping(
                    part="sum(-(-s // n) for s in sizes.values())",
                    items="((name, size) for name, size in sizes.items())",
                    advance="-(-size // n) * n",
                ),
                "parts of",
            ),
            "whole tensors": (
                mapping(keep="rank * part <= begin < (rank + 1) * part", piece="(name, 0, size)"),
                "it holds",
            ),
            "in the buffer's elements": (
                mapping(piece="(name, begin + start, begin + stop)"),
                "count its own elements",
            ),
            "in the part's elements": (
                mapping(piece="(name, begin + start - rank * part, begin + stop - rank * part)"),
                "own elements",
            ),
            "padding in a piece": (mapping(stop="(rank + 1) * part - begin"), "ends behind the tensor"),
            "padding as a tensor": (
                mapping(items="[*sizes.items(), ('padding', part * n - sum(sizes.values()))]"),
                "padding belongs to no tensor",
            ),
            "pieces without elements": (mapping(keep="start <= stop"), "has no elements: leave it out"),
            "by name": (mapping(items="sorted(sizes.items())"), "not in the order of the buffer"),
            "in the wrong order": (mapping(out="[pieces[::-1] for pieces in owned]"), "not in the order of the buffer"),
            "lengths": (mapping(piece="(name, start, stop - start)"), "own elements"),
            "for two ranks": (mapping(ranks="range(2)"), "one list of pieces a rank"),
            "a dictionary": (mapping(out="{r: p for r, p in enumerate(owned)}"), "one list of pieces a rank"),
            "elements one by one": (
                mapping(keep="[pieces.append((name, i, i + 1)) for i in range(start, stop)] and False"),
                "what lies together is one piece",
            ),
            "the sizes changed": (mapping(out="sizes.clear() or owned"), "changes the sizes"),
        },
        "12.2": {
            "the sum": (staging(mean="gradient"), "the sum of the ranks' gradients"),
            "divided twice": (staging(mean="gradient / self.n / self.n"), "divided by the number of ranks once more"),
            "right for two ranks": (staging(mean="gradient / 2"), "by 2, not by the number of ranks"),
            "its own gradient": (
                staging(reduce="gradient = flat[self.own]", mean="gradient"),
                "each part is updated with its rank's own gradient",
            ),
            "all-reduced": (
                staging(reduce="dist.all_reduce(flat); gradient = flat[self.own]"),
                "in all_reduce",
            ),
            "gathered, all of them": (
                staging(
                    reduce="all_ = flat.new_empty(self.n * len(flat)); all_gather_tensor(all_, flat); "
                    "gradient = all_.view(self.n, -1).sum(0)[self.own]"
                ),
                "rank 0 sends",
            ),
            "parameters averaged": (
                """
class ShardedOptimizer:
    def __init__(self, parameters, make):
        self.parameters, self.optimizer = parameters, make(parameters)

    def step(self):
        self.optimizer.step()
        for p in self.parameters:
            dist.all_reduce(p.data, op=dist.ReduceOp.AVG)
""",
                "parameters are averaged, not their gradients",
            ),
            "all optimizer state on all ranks": (
                """
class ShardedOptimizer:
    def __init__(self, parameters, make):
        self.parameters, self.optimizer = parameters, make(parameters)

    def step(self):
        for p in self.parameters:
            dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
        self.optimizer.step()
""",
                "is there optimizer state, or a copy, of all parts",
            ),
            "a view of the whole": (staging(clone=""), "a copy, of all parts"),
            "the gradients kept": (staging(after="self.kept = flat"), "a copy, of all parts"),
            "the gathered parameters kept": (staging(after="self.kept = full"), "a copy, of all parts"),
            "hidden in a list": (
                staging(after="self.kept = [p.clone() for p in self.parameters]"),
                "a copy, of all parts",
            ),
            "hidden as numbers": (staging(after="self.kept = full.tolist()"), "uses tolist"),
            "the meter replaced": (
                "import minillm.distributed as d\nd.measure_memory = None\n" + staging(),
                "uses minillm.distributed.measure_memory",
            ),
            "not gathered": (
                staging(
                    gather="full = self.flat([p.data for p in self.parameters]); full[self.own] = self.part.detach()"
                ),
                "gather all parts after the update",
            ),
            "not copied back": (staging(copy="pass"), "nothing has changed"),
            "new parameters": (
                staging(copy="p = nn.Parameter(full[begin : begin + p.numel()].view(p.shape))"),
                "nothing has changed",
            ),
            "always the first numbers": (
                staging(copy="p.data.copy_(full[: p.numel()].view(p.shape))"),
                "copy each number to its place",
            ),
            "no padding": (staging(pad="flat"), "reduce_scatter"),
            "cut short": (
                staging(size="sum(p.numel() for p in parameters) // self.n", pad="flat[: self.size * self.n]"),
                "ranks",
            ),
            "part 0 on all ranks": (
                staging(reduce="reduce_scatter_tensor(gradient, flat)").replace(
                    "slice(self.rank * self.size, (self.rank + 1) * self.size)", "slice(0, self.size)"
                ),
                "own part is right, but not the others'",
            ),
            "a new optimizer in each step": (
                staging(optimizer="pass", update="self.make([self.part]).step()"),
                "new optimizer state",
            ),
            "an all-reduce of the parameters, too": (
                staging(after="[dist.all_reduce(p.data, op=dist.ReduceOp.AVG) for p in self.parameters]"),
                "in all_reduce",
            ),
            "through a variable": (
                "shared = {}\n"
                + staging(
                    reduce="shared[self.rank] = flat; dist.barrier(); gradient = sum(shared.values())[self.own]",
                ),
                "ranks share no variables",
            ),
            "the ranks with padding stay away": (
                staging(reduce="if self.rank * self.size < 3 or len(flat) > 5: reduce_scatter_tensor(gradient, flat)"),
                "do not call the same collective",
            ),
            "the parameters reduced": (staging(what="data"), "numbers are not one process's"),
            "the library's": (
                "from torch.distributed.optim import ZeroRedundancyOptimizer\n" + staging(),
                "uses torch.distributed.optim",
            ),
            "this project's": ("from minillm.distributed import Zero\n" + staging(), "uses minillm.distributed.Zero"),
        },
        "12.3": {
            "the sum": (sharding(add="shards[k] += mine"), "that is the sum over the ranks"),
            "divided twice": (sharding(add="shards[k] += mine / n / n"), "once more"),
            "right for two ranks": (sharding(add="shards[k] += mine / 2"), "by 2, not by the number of ranks"),
            "its own gradient": (
                sharding(reduce="mine = flat[rank * sizes[k] : (rank + 1) * sizes[k]]", add="shards[k] += mine"),
                "this rank's own gradient",
            ),
            "all-reduced": (
                sharding(
                    reduce="dist.all_reduce(flat); mine = flat[rank * sizes[k] : (rank + 1) * sizes[k]]",
                ),
                "in all_reduce",
            ),
            "part 0 on all ranks": (
                sharding(reduce="reduce_scatter_tensor(mine, flat[: sizes[k]].repeat(n))"),
                "that is part 0",
            ),
            "through a variable": (
                "shared = {}\n"
                + sharding(
                    reduce="shared[rank, k] = flat; dist.barrier(); whole = sum(shared[r, k] for r in range(n)); "
                    "mine = whole[rank * sizes[k] : (rank + 1) * sizes[k]].clone(); dist.barrier()"
                ),
                "ranks share no variables",
            ),
            "not freed": (sharding(free="pass"), "is still there: set it to None"),
            "zeros": (sharding(free="for i in buckets[k]: parameters[i].grad.zero_()"), "set it to None"),
            "freed one step later": (
                sharding(
                    first="[setattr(parameters[i], 'grad', None) for i in kept]; kept.clear()",
                    free="kept.extend(buckets[k])",
                ),
                "is still there: set it to None",
            ),
            "freed at the end": (
                sharding(
                    free="kept.append(k); len(kept) == len(buckets) and "
                    "[setattr(p, 'grad', None) for p in parameters] and kept.clear()"
                ),
                "free a bucket's gradients as soon as they are sent",
            ),
            "reduced at the end": (
                sharding(
                    wait="any(missing)",
                    again="for j in range(len(buckets)): missing[j] = set(buckets[j])",
                    free="flats = [torch.cat([torch.cat([parameters[i].grad.reshape(-1) for i in b]), "
                    "flat.new_zeros(n * s - sum(parameters[i].numel() for i in b))]) for b, s in zip(buckets, sizes)]\n"
                    "        for p in parameters: p.grad = None",
                    pad="outs = [torch.empty_like(s) for s in shards]",
                    reduce="[reduce_scatter_tensor(o, f) for o, f in zip(outs, flats)]",
                    add="[s.add_(o / n) for s, o in zip(shards, outs)]",
                ),
                "free a bucket's gradients as soon as they are sent",
            ),
            "hidden in a list": (sharding(add="shards[k] += mine / n; kept.append(flat)"), "still refers to gradients"),
            "hidden as an attribute": (
                sharding(add="shards[k] += mine / n; parameter.whole = flat"),
                "still refers to gradients",
            ),
            "hidden until the last bucket": (
                sharding(add="shards[k] += mine / n; kept.append(flat); len(kept) == len(buckets) and kept.clear()"),
                "free a bucket's gradients as soon as they are sent",
            ),
            "hidden as an array": (sharding(add="shards[k] += mine / n; kept.append(flat.numpy())"), "uses numpy"),
            "hidden as numbers": (sharding(add="shards[k] += mine / n; kept.append(flat.tolist())"), "uses tolist"),
            "the meter replaced": (
                sharding(before="import minillm.distributed.memory as m; m._Watch.__torch_dispatch__ = None"),
                "uses minillm.distributed.memory",
            ),
            "whole shards": (sharding(shard="n * sizes[k]"), "so a part of"),
            "shards that are views of whole buckets": (
                sharding(before="shards[:] = [torch.zeros(n * s, dtype=torch.float64)[:s] for s in sizes]"),
                "bytes are alive",
            ),
            "no padding": (sharding(pad="pass"), "reduce_scatter"),
            "padded in front": (
                sharding(pad="flat = torch.cat([flat.new_zeros(n * sizes[k] - len(flat)), flat])"),
                "padding at its end",
            ),
            "only sizes that are divisible": (
                sharding(size="sum(parameters[i].numel() for i in bucket) // n", pad="flat = flat[: n * sizes[k]]"),
                "so a part of",
            ),
            "in the order of the indices": (sharding(order="sorted(buckets[k])"), "in the order of `buckets`"),
            "at the first gradient": (sharding(wait="False"), "not all gradients of the bucket are there yet"),
            "not as at the beginning": (sharding(again="pass"), "is all as at the beginning after"),
            "not added": (sharding(add="shards[k].copy_(mine / n)"), "add to what is there"),
            "other tensors than returned": (
                sharding(add="shards[k] = shards[k] + mine / n", out="list(shards)"),
                "nothing has come",
            ),
            "sums of its own": (
                sharding(
                    before="sums = [s.clone() for s in shards]",
                    add="sums[k] += mine / n; shards[k].copy_(sums[k])",
                ),
                "bytes are alive between two layers",
            ),
            "float32": (sharding(dtype="torch.float32"), "float32"),
            "parameters changed": (
                sharding(add="shards[k] += mine / n; parameter.data.add_(1)"),
                "a parameter has changed",
            ),
            "nothing returned": (sharding(out="None"), "returns a list of one tensor a bucket"),
            "the hook before the gradient is there": (
                sharding(register="register_hook"),
                "not all gradients of the bucket are there yet",
            ),
            "the library's": (
                sharding(before="from torch.distributed.fsdp import fully_shard"),
                "uses torch.distributed.fsdp",
            ),
        },
        "12.4": {
            "never freed": (showing(free="pass", end="pass"), "after shard_block, the parameters have"),
            "not freed at first": (showing(end="pass"), "after shard_block, the parameters have"),
            "not freed after forward": (
                showing(hooks=SHOWN["hooks"].replace("block.register_forward_hook(free); ", "")),
                "between the forward passes of blocks 0 and 1, the parameters have",
            ),
            "not freed after backward": (
                showing(arrived="pass"),
                "before block 1's backward pass",
            ),
            "not gathered": (
                showing(resize="pass", gather="pass"),
                "block 0's forward pass reads a tensor whose bytes have been freed",
            ),
            "not gathered for backward": (
                showing(begin_backward="pass"),
                "block 2's backward pass reads a tensor whose bytes have been freed",
            ),
            "gathered without bytes": (
                showing(resize="pass"),
                "reads a tensor whose bytes have been freed: resize its storage",
            ),
            "bytes without numbers": (
                showing(resize=SHOWN["resize"] + "; full.fill_(7.0)", gather="pass"),
                "do not compute what they would",
            ),
            "freed behind the block's backward": (
                showing(
                    arrived="pass",
                    hooks=SHOWN["hooks"] + "; block.register_full_backward_hook(free)",
                ),
                "block 0's backward pass reads a tensor whose bytes have been freed: resize its storage",
            ),
            "freed at the first gradient": (
                showing(arrived="free()"),
                "gather before it, and free only when the last",
            ),
            "a new tensor instead of the storage": (
                showing(
                    free="[setattr(p, 'data', p.data.new_empty(0)) for p in parameters]",
                ),
                "rank",
            ),
            "the shard is part of the buffer": (
                showing(shard="full[rank * size : (rank + 1) * size]"),
                "the shard has been freed with the block",
            ),
            "a copy kept": (showing(keep="block.whole = full.clone()"), "something refers to more of the parameters"),
            "a copy kept, in a closure": (
                showing(
                    keep="whole = full.clone()",
                    gather="full.copy_(whole) if n == 1 else all_gather_tensor(full, shard)",
                ),
                "something refers to more of the parameters",
            ),
            "the old parameters kept": (
                showing(keep="block.old = list(copy.deepcopy(parameters))").replace(
                    "def shard_block", "import copy\n\ndef shard_block"
                ),
                "something refers to more of the parameters",
            ),
            "a copy from forward to backward": (
                showing(
                    keep="store = []",
                    free="(store.append(full.clone()) if torch.is_grad_enabled() and not missing else None); "
                    "full.untyped_storage().resize_(0)",
                    end="full.untyped_storage().resize_(0)",
                    begin_backward="full.untyped_storage().resize_(full.numel() * full.itemsize); "
                    "full.copy_(store.pop())",
                ),
                "something refers to more of the parameters",
            ),
            "not by storage": (
                showing(free="full.zero_()", end="free()"),
                "after shard_block, the parameters have",
            ),
            "the numbers of the beginning": (
                showing(keep="start = shard.clone()", gather="all_gather_tensor(full, start)"),
                "the shards have changed since",
            ),
            "reduced": (
                showing(
                    gather="full.zero_(); full[rank * size : (rank + 1) * size] = shard; dist.all_reduce(full)",
                ),
                "in all_reduce",
            ),
            "gathered twice": (
                showing(gather="all_gather_tensor(full, shard); all_gather_tensor(full, shard)"),
                "send",
            ),
            "no padding": (showing(total="sum(p.numel() for p in parameters)"), "cannot be cut into"),
            "cut short": (showing(size="sum(p.numel() for p in parameters) // n"), "rank"),
            "for two ranks": (
                showing(size="-(-sum(p.numel() for p in parameters) // 2)", total="size * max(n, 2)"),
                "a part is",
            ),
            "part 0 on all ranks": (showing(shard="full[:size].clone()"), "is not part 1 of the parameters"),
            "from the last to the first": (showing(order="parameters[::-1]"), "is not part 0 of the parameters"),
            "other parameters": (
                showing(
                    show="name = [k for k, q in block.named_parameters() if q is p][0]; "
                    "owner = block.get_submodule(name.rpartition('.')[0]); "
                    "setattr(owner, name.rpartition('.')[2], nn.Parameter(view))"
                ),
                "has other parameters",
            ),
            "nothing returned": (showing(out="None"), "returns the shard, a tensor"),
            "gradients thrown away": (
                showing(arrived="p.grad = None; missing or free()"),
                "is not whole",
            ),
            "gradients reduced": (
                showing(arrived="dist.all_reduce(p.grad); missing or free()"),
                "is not what this rank gets in one process",
            ),
            "hidden as an array": (showing(keep="whole = full.numpy().copy()"), "uses numpy"),
            "the library's": (
                showing(keep="from torch.distributed.fsdp import fully_shard"),
                "uses torch.distributed.fsdp",
            ),
            "this project's": (
                "import minillm.distributed.zero_shards\n" + showing(),
                "uses minillm.distributed.zero_shards",
            ),
        },
        "12.5": {
            "the rank's own": (clipping(reduce="pass"), "the norm of what this rank has"),
            "replicated on every rank": (
                clipping(reduce="pass", then="dist.all_reduce(total)"),
                "replicated gradients are counted on every rank",
            ),
            "padding counted": (clipping(square="part.double().square().sum()"), "padding is counted"),
            "replicated left out": (clipping(alike="0.0"), "the replicated gradients are left out"),
            "parts left out": (clipping(square="0.0"), "the parts are left out"),
            "norms added up": (
                clipping(
                    reduce="pass",
                    then="total = total.sqrt(); dist.all_reduce(total); total = total.square()",
                ),
                "norms are added up",
            ),
            "norms of the parts added up": (
                clipping(reduce="total = total.sqrt(); dist.all_reduce(total); total = total.square()"),
                "norms are added up",
            ),
            "the largest": (
                clipping(reduce="pass", then="dist.all_reduce(total, op=dist.ReduceOp.MAX)"),
                "that is the norm of what this rank has",
            ),
            "the mean of squares": (
                clipping(reduce="pass", then="dist.all_reduce(total, op=dist.ReduceOp.AVG)"),
                "a mean over the ranks",
            ),
            "no root": (clipping(norm="total.item()"), "the square of the norm"),
            "in bfloat16": (
                clipping(square="part[:n_real].square().sum()", alike="g.square().sum()"),
                "are squares added up in bfloat16",
            ),
            "the norm after it": (clipping(out="min(norm, max_norm)"), "return the norm before clipping"),
            "not scaled": (clipping(scale="pass"), "and is scaled by 1"),
            "always scaled": (clipping(when="norm > 0"), "the norm is not above max_norm"),
            "replicated not scaled": (
                clipping(which="[part for part, _ in parts]"),
                "replicated gradient is to be scaled",
            ),
            "parts not scaled": (clipping(which="replicated"), "rank 0's part is to be scaled"),
            "scaled in a copy": (clipping(scale="g = g * (max_norm / norm)"), "and is scaled by 1"),
            "scaled by the square": (clipping(scale="g.mul_((max_norm / norm) ** 2)"), "is to be scaled by"),
            "each rank by its own norm": (
                clipping(scale="g.mul_(max_norm / mine)", reduce="mine = total.sqrt().item(); dist.all_reduce(total)"),
                "is to be scaled by",
            ),
            "gathered": (
                clipping(
                    reduce="whole = [p.new_empty(n * len(p)) for p, _ in parts]; "
                    "[all_gather_tensor(w, torch.nn.functional.pad(p[:r], (0, len(p) - r))) "
                    "for w, (p, r) in zip(whole, parts)]; "
                    "total = sum((w.double().square().sum() for w in whole), torch.zeros((), dtype=torch.float64))"
                ),
                "sums of squares are enough",
            ),
            "nothing returned": (clipping(out="None"), "returns the norm, a number"),
            "gone home early": (
                clipping(reduce="if any(r for _, r in parts): dist.all_reduce(total)"),
                "all ranks must call it equally often",
            ),
        },
        "12.6": {
            "no master parameter": (
                costing(each="(2, 2, 4 * numbers) if mixed else (4, 4, 4 * numbers)"),
                "mixed-precision Adam",
            ),
            "state in 16 bits": (
                costing(each="(2, 2, 2 + 2 * numbers) if mixed else (4, 4, 4 * numbers)"),
                "mixed-precision",
            ),
            "Adam always": (costing(each="(2, 2, 12) if mixed else (4, 4, 8)"), "SGD with momentum in float32"),
            "16 always": (costing(each="(2, 2, 12)"), "Adam in float32"),
            "the master in float32, too": (
                costing(each="(2, 2, 4 + 4 * numbers) if mixed else (4, 4, 4 + 4 * numbers)"),
                "Adam in float32",
            ),
            "stages one too many": (
                costing(kept="psi * (p / n ** (stage > 1) + g / n ** (stage > 0) + s / n ** (stage > 0))"),
                "the optimizer state is cut",
            ),
            "gradients never cut": (
                costing(kept="psi * (p / n ** (stage > 2) + g + s / n ** (stage > 0))"),
                "gradients are cut, too",
            ),
            "always mixed-precision Adam": (
                costing(kept="psi * (2 / n ** (stage > 2) + 2 / n ** (stage > 1) + 12 / n ** (stage > 0))"),
                "rank_bytes(1e6, 1, 0, (4, 4, 0))",
            ),
            "whole bytes": (
                costing(kept="psi // n * (p * n ** (stage < 3) + g * n ** (stage < 2) + s * n ** (stage < 1))"),
                "rank_bytes",
            ),
            "stage 3 if any": (costing(first="3 if rank_bytes(psi, n, 3, each) <= memory else None"), "first_stage"),
            "less than the memory": (
                costing(first="next((t for t in range(4) if rank_bytes(psi, n, t, each) < memory), None)"),
                "first_stage",
            ),
            "the last that fits": (
                costing(first="next((t for t in (3, 2, 1, 0) if rank_bytes(psi, n, t, each) <= memory), None)"),
                "first_stage",
            ),
            "4 where none fits": (
                costing(first="next((t for t in range(4) if rank_bytes(psi, n, t, each) <= memory), 4)"),
                "first_stage",
            ),
            "2, 2, 3 psi": (
                costing(sent="psi * (2 * g, g + p, k * g + p, k * (g + 2 * p))[stage]"),
                "sent_bytes(1e6, 1, 0",
            ),
            "an all-reduce and a gather": (
                costing(sent="(n - 1) / n * psi * (2 * g, 2 * g + p, k * g + p, k * (g + 2 * p))[stage]"),
                "a reduce-scatter and an all-gather, once a step",
            ),
            "one gather at stage 3": (
                costing(sent="(n - 1) / n * psi * (2 * g, g + p, k * g + p, k * (g + p))[stage]"),
                "two all-gathers and a reduce-scatter",
            ),
            "micro-batches are free": (
                costing(sent="(n - 1) / n * psi * (2 * g, g + p, g + p, g + 2 * p)[stage]"),
                "a reduce-scatter in each micro-batch",
            ),
            "gradients sent in every micro-batch": (
                costing(sent="(n - 1) / n * psi * (2 * g * k, k * g + p, k * g + p, k * (g + 2 * p))[stage]"),
                "once a step",
            ),
            "gradients in the bytes of parameters": (
                costing(sent="(n - 1) / n * psi * p * (2, 2, k + 1, 3 * k)[stage]"),
                "sent_bytes",
            ),
            "MiCS over all ranks": (
                costing(mics="psi * sum(each) / n, sent_bytes(psi, n, 3, each)"),
                "kept: cut over the p ranks of a group",
            ),
            "MiCS without its all-reduce": (
                costing(mics="psi * sum(each) / p, sent_bytes(psi, p, 3, each)"),
                "an all-reduce of the part's gradients",
            ),
            "MiCS all-reduces whole gradients": (
                costing(
                    mics="psi * sum(each) / p, sent_bytes(psi, p, 3, each) + 2 * (r - 1) / r * psi * each[1]",
                ),
                "an all-reduce of the part's gradients",
            ),
            "Offload with a part on the device": (
                costing(offload="psi / n * p, psi / n * (g + s), psi / n * (g + p)"),
                "the parameters on the device",
            ),
            "Offload with the whole on the host": (
                costing(offload="psi * p, psi * (g + s), psi / n * (g + p)"),
                "a part of gradients and state on the host",
            ),
            "Offload's link one way": (
                costing(offload="psi * p, psi / n * (g + s), psi / n * g"),
                "a part, down and up",
            ),
            "this project's": ("from minillm.costs import zero_bytes_per_rank\n" + costing(), "uses minillm.costs"),
        },
        "12.7": {
            "in the order given": (resharding(order="pass"), "the order of the saved ranks"),
            "in the order of names": (
                resharding(order="saved = sorted(saved, key=lambda state: str(state['rank']))"),
                "the order of the saved ranks",
            ),
            "old padding kept": (
                resharding(cut="", pad="torch.cat([flat, flat.new_zeros(max(0, size * m - len(flat)))])"),
                "the old padding is nobody's",
            ),
            "padding kept as it is": (
                resharding(cut="", pad="torch.nn.functional.pad(flat, (0, size * m - len(flat)))"),
                "old padding",
            ),
            "no new padding": (resharding(pad="flat"), "the buffer is padded anew"),
            "only even numbers": (resharding(size="n_elements // m", pad="flat[: size * m]"), "is padded anew"),
            "padded by the old length": (
                resharding(
                    size="-(-sum(len(s['exp_avg']) for s in saved if 'exp_avg' in s) // m) or -(-n_elements // m)",
                    pad="torch.cat([flat, flat.new_zeros(max(0, size * m - n_elements))])",
                ),
                "is padded anew",
            ),
            "numbers left out": (resharding(other="pass"), "has the keys"),
            "the rank left out": (
                resharding(out="[{k: v for k, v in s.items() if k != 'rank'} for s in states]"),
                "has the keys",
            ),
            "numbers are parts, too": (
                resharding(part="torch.is_tensor(value)", of="state[key].reshape(-1)"),
                "step is ()",
            ),
            "step divided": (
                resharding(other="states[rank][key] = value / m if torch.is_tensor(value) else value"),
                "it is equal on all ranks",
            ),
            "step added up": (
                resharding(other="states[rank][key] = sum(s[key] for s in saved) if torch.is_tensor(value) else value"),
                "it is equal on all ranks",
            ),
            "step shared": (resharding(other="states[rank][key] = value"), "shares its memory"),
            "parts shared": (resharding(clone=""), "shares its memory"),
            "float32": (resharding(clone=".clone().float()"), "of torch.float32"),
            "a part for each old rank": (resharding(size="-(-n_elements // len(saved))"), "the buffer is padded anew"),
            "doubled": (resharding(of="state[key] * 2"), "exp_avg"),
            "averaged": (
                resharding(of="state[key] / len(saved)"),
                "exp_avg",
            ),
            "interleaved": (
                resharding(clone=".clone()").replace(
                    "flat[rank * size : (rank + 1) * size].clone()", "flat[rank::m].clone()"
                ),
                "the parts follow each other",
            ),
            "the saved dictionaries changed": (
                resharding(out="[s.pop('lr', 0) for s in saved] and states"),
                "what was saved has changed",
            ),
            "sorted in place": (
                resharding(
                    order="saved.sort(key=lambda state: state['rank'])", out="saved[0].update(exp_avg=0) or states"
                ),
                "what was saved has changed",
            ),
            "a dictionary": (resharding(out="states[0]"), "returns 4 dictionaries"),
            "as many as before": (
                resharding(ranks="len(saved)").replace("range(m)", "range(min(m, len(saved)))"),
                "returns 4 dictionaries",
            ),
        },
        "12.8": {
            "no delay": (delaying(ordinary="True"), "the first that waits: there is no update"),
            "delayed from the beginning": (delaying(ordinary="False"), "call 0, an ordinary step: nothing has changed"),
            "one ordinary step more": (delaying(ordinary="self.left >= 0"), "the first that waits: there is no update"),
            "one ordinary step less": (delaying(ordinary="self.left > 1"), "an ordinary step: nothing has changed"),
            "not copied": (delaying(coming="p.grad"), "one step late"),
            "this step's and the last's": (
                delaying(late="self.optimizer.step(); self.finish()"),
                "there is no update, and the parameters have changed",
            ),
            "zeros in the first": (
                delaying(nothing="self.kept = [torch.zeros_like(p) for p in self.parameters]"),
                "there is no update, and the parameters have changed",
            ),
            "this step's in the first": (
                delaying(late="self.kept = self.kept or coming; self.finish()"),
                "there is no update, and the parameters have changed",
            ),
            "two steps late": (
                delaying(
                    late="self.wait = [*getattr(self, 'wait', []), coming]; "
                    "self.kept = self.wait.pop(0) if len(self.wait) > 2 else None; self.finish(); return"
                ),
                "one step late: nothing has changed",
            ),
            "this step's kept in grad": (delaying(back="pass"), "is not what the caller has put there"),
            "grad empty": (delaying(back="p.grad = None"), "is not what the caller has put there"),
            "grad copied into": (
                delaying(put="p.grad.copy_(g)", back="pass"),
                "is not what the caller has put there",
            ),
            "added up": (delaying(put="p.grad = g + p.grad"), "one step late: the parameters are not"),
            "never cleared": (delaying(clear="pass"), "a second finish() changes the parameters"),
            "finish does nothing": (
                delaying()
                .replace("def finish", "def finish(self): pass\n\n    def apply")
                .replace("self.finish()", "self.apply()"),
                "after finish() the gradients that were kept have been applied",
            ),
            "no None": (delaying(coming="p.grad.clone()"), "NoneType"),
            "zeros for None": (
                delaying(coming="torch.zeros_like(p) if p.grad is None else p.grad.clone()"),
                "one step late: the parameters are not",
            ),
            "None kept out": (delaying(put="if g is not None: p.grad = g"), "one step late: the parameters are not"),
            "the first group only": (
                delaying(parameters="optimizer.param_groups[0]['params']"),
                "the parameters",
            ),
            "half and half": (
                delaying(put="p.grad = g if p.grad is None or g is None else (g + p.grad) / 2"),
                "one step late: the parameters are not",
            ),
            "this project's": (
                "from minillm.distributed import Offload\n" + delaying(),
                "uses minillm.distributed.Offload",
            ),
        },
    }


def test_every_part_has_the_three_levels_of_hints_that_the_notebook_promises():
    assert {len(part.hints) for part in find_exercise("12").parts} == {3}


@pytest.fixture(scope="module")
def solution() -> dict[str, object]:
    return solution_names("12")


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 12), max_size=5), n=st.integers(1, 7), m=st.integers(1, 7), data=st.data())
def test_parts_hold_each_element_once_and_come_back_from_any_number_of_ranks(solution, sizes, n, m, data):
    names = {f"p{i}": size for i, size in enumerate(sizes)}
    owned = solution["shard_map"](names, n)
    elements = [(name, i) for pieces in owned for name, start, stop in pieces for i in range(start, stop)]
    assert elements == [(name, i) for name, size in names.items() for i in range(size)]
    sums = [sum(stop - start for _, start, stop in pieces) for pieces in owned]
    assert all(a == max(sums) or not any(sums[r + 1 :]) for r, a in enumerate(sums))

    total = sum(sizes)
    one = [{"rank": 0, "values": torch.arange(1.0, total + 1), "step": torch.tensor(3.0)}]
    there = solution["reshard"](one, total, n)
    again = solution["reshard"](data.draw(st.permutations(there)), total, m)
    back = solution["reshard"](again, total, 1)
    torch.testing.assert_close(back, one)


@pytest.mark.parametrize("max_norm", [0.7, 1e3])
def test_the_norm_and_the_clipping_are_torchs(solution, max_norm):
    whole = [nn.Parameter(torch.zeros(7)), nn.Parameter(torch.zeros(2, 3))]
    for parameter in whole:
        parameter.grad = torch.randn_like(parameter)
    flat = nn.functional.pad(whole[0].grad.clone(), (0, 2))
    alike = whole[1].grad.clone()
    norm = nn.utils.clip_grad_norm_(whole, max_norm).item()

    def main():
        rank = dist.get_rank()
        part, other = flat[3 * rank : 3 * rank + 3].clone(), alike.clone()
        return solution["clip_sharded"]([(part, 1 if rank == 2 else 3)], [other], max_norm), part, other

    runs = simulate_ranks(main, 3).results
    assert [run[0] for run in runs] == pytest.approx([norm] * 3)
    torch.testing.assert_close(torch.cat([run[1] for run in runs])[:7], whole[0].grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(runs[2][2], whole[1].grad, atol=1e-5, rtol=1e-5)


def test_bytes_are_those_that_the_paper_prints(solution):
    adam = solution["bytes_each"](True, 2)
    for row in zero_table():
        gigabytes = solution["rank_bytes"](row.n_parameters, row.world_size, row.stage, adam) / 1e9
        assert gigabytes == pytest.approx(float(row.printed), rel=0.03)


def small_model() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1)).double()


BATCHES = torch.linspace(-1, 1, 3 * 4 * 3, dtype=torch.float64).view(3, 4, 3)


def test_stages_1_and_2_give_what_one_process_and_zero_redundancy_optimizer_give(solution):
    adam = partial(torch.optim.Adam, lr=0.05)
    exact = small_model()
    optimizer = adam(exact.parameters())
    for _ in "123":
        optimizer.zero_grad()
        exact(BATCHES).square().mean().backward()
        optimizer.step()

    def stage_1():
        model = small_model()
        optimizer = solution["ShardedOptimizer"](list(model.parameters()), adam)
        for _ in "123":
            model.zero_grad()
            model(BATCHES[dist.get_rank()]).square().mean().backward()
            optimizer.step()
        return list(model.parameters())

    def library():
        model = small_model()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.05)
        for _ in "123":
            model.zero_grad()
            model(BATCHES[dist.get_rank()]).square().mean().backward()
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= 3
            optimizer.step()
        return list(model.parameters())

    def stage_2():
        model = small_model()
        parameters = list(model.parameters())
        shards = solution["shard_gradients"](parameters, [[5, 4, 3], [2, 1, 0]])
        model(BATCHES[dist.get_rank()]).square().mean().backward()
        return shards, [p.grad for p in parameters]

    def both():
        return stage_1(), library(), stage_2()

    first = small_model()
    first(BATCHES).square().mean().backward()
    gradients = [p.grad.flatten() for p in first.parameters()]
    buckets = [torch.cat([gradients[i] for i in bucket]) for bucket in ([5, 4, 3], [2, 1, 0])]
    real = run_ranks(both, 3)
    simulated = simulate_ranks(lambda: (stage_1(), None, stage_2()), 3).results
    for runs in (real, simulated):
        for parameters, _, (_, left) in runs:
            torch.testing.assert_close(parameters, list(exact.parameters()))
            assert left == [None] * 6
        for k, whole in enumerate(buckets):
            torch.testing.assert_close(torch.cat([run[2][0][k] for run in runs])[: len(whole)], whole)
    torch.testing.assert_close(real[0][0], real[0][1])


def test_stage_3_computes_what_fsdp_does(solution):
    def main():
        ours, theirs = small_model(), small_model()
        for block in (ours[0], ours[2], ours[4]):
            solution["shard_block"](block)
        for block in (theirs[0], theirs[2], theirs[4]):
            fully_shard(block)
        fully_shard(theirs)
        inputs = BATCHES[dist.get_rank()].clone().requires_grad_()
        outs = [model(inputs) for model in (ours, theirs)]
        for out in outs:
            out.square().mean().backward()
        bytes_left = [p.untyped_storage().nbytes() for p in ours.parameters()]
        for parameter in ours.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
        whole = [p.grad.full_tensor() for p in theirs.parameters()]
        return [out.detach() for out in outs], [p.grad for p in ours.parameters()], whole, bytes_left

    for (our_out, their_out), gradients, whole, bytes_left in (*simulate_ranks(main, 2).results, *run_ranks(main, 2)):
        torch.testing.assert_close(our_out, their_out)
        torch.testing.assert_close(gradients, whole)
        assert bytes_left == [0] * 6


def test_a_delay_of_one_step_is_a_hand_written_recursion(solution):
    target, value = 3.0, nn.Parameter(torch.zeros((), dtype=torch.float64))
    delayed = solution["DelayedOptimizer"](torch.optim.SGD([value], lr=0.1), 2)
    hand, waiting = 0.0, None
    for step in range(6):
        value.grad = value.detach() - target
        gradient = hand - target
        delayed.step()
        hand -= 0.1 * (gradient if step < 2 else waiting or 0.0)
        waiting = gradient if step >= 2 else None
        assert value.item() == pytest.approx(hand)
