"""Exercise 11: wrong answers that students may well give, right ones of other kinds; torch's collectives as oracle."""

import copy
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minillm.distributed import run_ranks, simulate_ranks
from minillm.exercises.folder import find_exercise
from minillm.exercises.testing import ExerciseTests, solution_names

SHIFT = """
def shift(tensor, step):
    rank, n = dist.get_rank(), dist.get_world_size()
    {alone}
    received = torch.empty_like(tensor)
    {messages}
    return {out}
"""
SHIFTED = {
    "alone": "if step % n == 0: return tensor.clone()",
    "messages": "works = dist.isend(tensor, (rank + step) % n), dist.irecv(received, (rank - step) % n); "
    "[work.wait() for work in works]",
    "out": "received",
}


def shifting(**changes: str) -> str:
    """Part 11.1's answer with some of its places filled in otherwise."""
    return SHIFT.format(**SHIFTED | changes)


WAITS = """
def who_waits(programs):
    {before}
    place = [0] * len(programs)
    def following(rank):
        return programs[rank][place[rank]] if place[rank] < len(programs[rank]) else None
    moved = True
    while moved:
        moved = False
        for rank in range(len(programs)):
            step = following(rank)
            if {meets}:
                {go}
                moved = {moved}
    return {out}
"""
WAITING = {
    "before": "",
    "meets": "step is not None and step[0] == 'send' and following(step[1]) == ('recv', rank)",
    "go": "place[rank] += 1; place[step[1]] += 1",
    "moved": "True",
    "out": "[None if following(r) is None else following(r)[1] for r in range(len(programs))]",
}


def waiting(**changes: str) -> str:
    """Part 11.2's answer with some of its places filled in otherwise."""
    return WAITS.format(**WAITING | changes)


SCATTER = """
def ring_reduce_scatter(flat):
    rank, n = dist.get_rank(), dist.get_world_size()
    {before}
    chunks = {chunks}
    carried = {first}
    for k in range({steps}):
        mine = chunks[{coming}]
        coming = torch.empty_like(mine)
        {messages}
        carried = {add}
    return {out}
"""
SCATTERED = {
    "before": "",
    "chunks": "flat.tensor_split(n)",
    "first": "chunks[(rank - 1) % n].clone()",
    "steps": "n - 1",
    "coming": "(rank - 2 - k) % n",
    "messages": "works = dist.isend(carried, (rank + 1) % n), dist.irecv(coming, (rank - 1) % n); "
    "[work.wait() for work in works]",
    "add": "coming + mine",
    "out": "carried",
}


def scattering(**changes: str) -> str:
    """Part 11.3's answer with some of its places filled in otherwise."""
    return SCATTER.format(**SCATTERED | changes)


GATHER = """
def ring_all_gather(chunk, n_elements):
    rank, n = dist.get_rank(), dist.get_world_size()
    gathered = {gathered}
    chunks = {chunks}
    chunks[{own}].copy_(chunk)
    for k in range({steps}):
        {messages}
    return {out}

def ring_all_reduce(flat):
    {reduce}
"""
GATHERED = {
    "gathered": "torch.empty(n_elements, dtype=chunk.dtype)",
    "chunks": "gathered.tensor_split(n)",
    "own": "rank",
    "steps": "n - 1",
    "messages": "works = dist.isend(chunks[(rank - k) % n], (rank + 1) % n), "
    "dist.irecv(chunks[(rank - 1 - k) % n], (rank - 1) % n); [work.wait() for work in works]",
    "out": "gathered",
    "reduce": "return ring_all_gather(ring_reduce_scatter(flat), len(flat))",
}


def gathering(**changes: str) -> str:
    """Part 11.4's answer with some of its places filled in otherwise."""
    return GATHER.format(**GATHERED | changes)


COST = """
def ring_messages(n_elements, element_bytes, n, rank):
    sizes = [n_elements // n + (c < n_elements % n) for c in range(n)]
    return {messages}, {bytes}

def ring_seconds(n_bytes, n, latency, bandwidth):
    return {ring}

def server_seconds(n_bytes, n, latency, bandwidth):
    return {server}
"""
COSTS = {
    "messages": "2 * (n - 1)",
    "bytes": "element_bytes * (2 * n_elements - sizes[rank] - sizes[(rank + 1) % n])",
    "ring": "2 * (n - 1) * (latency + n_bytes / n / bandwidth)",
    "server": "2 * (n - 1) * (latency + n_bytes / bandwidth)",
}


def costing(**changes: str) -> str:
    """Part 11.5's answer with some of its places filled in otherwise."""
    return COST.format(**COSTS | changes)


BUCKETS = """
def make_buckets(parameters, max_bytes):
    buckets, used, dtype = [], 0, None
    for i in {order}:
        p = parameters[i]
        {skip}
        size = {size}
        if {new}:
            buckets.append([])
            used, dtype = 0, p.dtype
        buckets[-1].append({what})
        used += size
    return {out}

def pack(tensors):
    return {pack}

def unpack(flat, tensors):
    start = 0
    for tensor in tensors:
        part = flat[start : start + tensor.numel()]
        {copy}
        start += {advance}
"""
BUCKETED = {
    "order": "reversed(range(len(parameters)))",
    "skip": "if not p.requires_grad: continue",
    "size": "p.nbytes",
    "new": "not buckets or used + size > max_bytes or p.dtype != dtype",
    "what": "i",
    "out": "buckets",
    "pack": "torch.cat([tensor.flatten() for tensor in tensors])",
    "copy": "tensor.copy_(part.reshape(tensor.shape))",
    "advance": "tensor.numel()",
}


def bucketing(**changes: str) -> str:
    """Part 11.6's answer with some of its places filled in otherwise."""
    return BUCKETS.format(**BUCKETED | changes)


EARLY = """
def reduce_early(parameters, buckets):
    missing = [set(bucket) for bucket in buckets]
    started = []

    def start(k):
        flat = torch.cat([parameters[i].grad.flatten() for i in buckets[k]])
        {before}
        started.append((k, flat, {reduce}))

    def hook(k, i, parameter):
        missing[k].discard(i)
        {when}

    for k, bucket in enumerate(buckets):
        for i in bucket:
            parameters[i].{register}(partial(hook, k, i))

    def finish():
        {first}
        for k, flat, work in started:
            {wait}
            begin = 0
            for i in buckets[k]:
                grad = parameters[i].grad
                {copy}
                begin += grad.numel()
            {again}
        {clear}

    return {out}
"""
STARTED = {
    "before": "pass",
    "reduce": "dist.all_reduce(flat, async_op=True)",
    "when": "while len(started) < len(buckets) and not missing[len(started)]: start(len(started))",
    "register": "register_post_accumulate_grad_hook",
    "first": "pass",
    "wait": "work.wait()",
    "copy": "grad.copy_(flat[begin : begin + grad.numel()].view_as(grad) / dist.get_world_size())",
    "again": "missing[k] = set(buckets[k])",
    "clear": "started.clear()",
    "out": "finish",
}


def starting(**changes: str) -> str:
    """Part 11.7's answer with some of its places filled in otherwise."""
    return EARLY.format(**STARTED | changes)


MEAN = """
def global_gradients(model, micro_batches):
    parameters = list(model.parameters())
    {before}
    losses, n_targets = 0.0, 0
    for inputs, targets in micro_batches:
        loss, count = loss_sum(model, inputs, targets)
        {backward}
        losses += loss.item()
        n_targets += {count}
    sums = torch.tensor([losses, n_targets], dtype=torch.float64)
    {count_all}
    for p in parameters:
        {reduce}
        {divide}
    return {out}
"""
MEANT = {
    "before": "for p in parameters: p.grad = torch.zeros_like(p)",
    "backward": "loss.backward()",
    "count": "count",
    "count_all": "dist.all_reduce(sums)",
    "reduce": "dist.all_reduce(p.grad)",
    "divide": "p.grad /= sums[1]",
    "out": "(sums[0] / sums[1]).item()",
}


def meaning(**changes: str) -> str:
    """Part 11.8's answer with some of its places filled in otherwise."""
    return MEAN.format(**MEANT | changes)


class TestExercise11(ExerciseTests):
    exercise = "11"
    right_answers: ClassVar = {
        "the template of 11.1": ("11.1", shifting()),
        "a batch of both": (
            "11.1",
            shifting(
                messages="operations = [dist.P2POp(dist.irecv, received, (rank - step) % n), "
                "dist.P2POp(dist.isend, tensor, (rank + step) % n)]; "
                "[work.wait() for work in dist.batch_isend_irecv(operations)]"
            ),
        ),
        "only the send started, the receive waited for": (
            "11.1",
            shifting(
                messages="work = dist.isend(tensor, (rank + step) % n); "
                "dist.recv(received, (rank - step) % n); work.wait()"
            ),
        ),
        "the template of 11.2": ("11.2", waiting()),
        "from the receiver's side, on copies": (
            "11.2",
            """
def who_waits(programs):
    left = [list(program) for program in programs]
    while True:
        pairs = [
            (r, steps[0][1]) for r, steps in enumerate(left)
            if steps and steps[0][0] == "recv" and left[steps[0][1]] and left[steps[0][1]][0] == ("send", r)
        ]
        if not pairs:
            return tuple(steps[0][1] if steps else None for steps in left)
        for pair in pairs:
            for rank in pair:
                del left[rank][0]
""",
        ),
        "the template of 11.3": ("11.3", scattering()),
        "in a copy of the buffer, added in place": (
            "11.3",
            scattering(
                chunks="flat.clone().tensor_split(n)",
                first="chunks[rank - 1]",
                coming="rank - 2 - k - n * (rank - 2 - k < -n)",
                add="mine.add_(coming)",
            ),
        ),
        "what was sent waited for at the end": (
            "11.3",
            scattering(
                before="works = []",
                messages="works.append((dist.isend(carried, (rank + 1) % n), carried)); "
                "dist.irecv(coming, (rank - 1) % n).wait()",
                out="[work.wait() for work, _ in works] and carried if works else carried",
            ),
        ),
        "a batch of both, the receive first": (
            "11.3",
            scattering(
                messages="operations = [dist.P2POp(dist.irecv, coming, (rank - 1) % n), "
                "dist.P2POp(dist.isend, carried, (rank + 1) % n)]; "
                "[work.wait() for work in dist.batch_isend_irecv(operations)]"
            ),
        ),
        "chunks without elements left out": (
            "11.3",
            scattering(
                messages="works = ([dist.isend(carried, (rank + 1) % n)] if carried.numel() else []) + "
                "([dist.irecv(coming, (rank - 1) % n)] if coming.numel() else []); [work.wait() for work in works]"
            ),
        ),
        "the template of 11.4": ("11.4", gathering()),
        "a list of chunks, joined at the end": (
            "11.4",
            gathering(
                gathered="None",
                chunks="[torch.empty_like(c, dtype=chunk.dtype) for c in torch.empty(n_elements).tensor_split(n)]",
                out="torch.cat(chunks)",
            ),
        ),
        "the template of 11.5": ("11.5", costing()),
        "step by step": (
            "11.5",
            costing(
                messages="sum(1 for half in range(2) for step in range(1, n))",
                bytes="element_bytes * sum(sizes[(rank - 1 - k) % n] + sizes[(rank - k) % n] for k in range(n - 1))",
                ring="sum(2 * (latency + n_bytes / (n * bandwidth)) for _ in range(n - 1))",
            ),
        ),
        "the template of 11.6": ("11.6", bucketing()),
        "copied into one buffer": (
            "11.6",
            bucketing(
                size="p.numel() * p.dtype.itemsize",
                pack="torch.stack([x for t in tensors for x in t.contiguous().view(-1)])",
                copy="tensor[...] = part.view(tensor.shape)",
            ),
        ),
        "the template of 11.7": ("11.7", starting()),
        "the mean by the library, gradients as views of the buffer": (
            "11.7",
            starting(
                reduce="dist.all_reduce(flat, op=dist.ReduceOp.AVG, async_op=True)",
                copy="parameters[i].grad = flat[begin : begin + grad.numel()].view_as(grad)",
            ),
        ),
        "into buffers that are kept, gradient by gradient, with counters": (
            "11.7",
            """
def reduce_early(parameters, buckets):
    flats = [torch.empty(sum(parameters[i].numel() for i in b), dtype=parameters[b[0]].dtype) for b in buckets]
    places = {}
    for k, bucket in enumerate(buckets):
        start = 0
        for i in bucket:
            places[i] = flats[k][start : start + parameters[i].numel()].view(parameters[i].shape)
            start += parameters[i].numel()
    left, works = [len(b) for b in buckets], []

    def make(k, i):
        def hook(parameter):
            places[i].copy_(parameter.grad)
            left[k] -= 1
            for flat, missing in list(zip(flats, left))[len(works):]:
                if missing:
                    break
                works.append(dist.all_reduce(flat, async_op=True))
        return hook

    for k, bucket in enumerate(buckets):
        for i in bucket:
            parameters[i].register_post_accumulate_grad_hook(make(k, i))

    def finish():
        while works:
            works.pop(0).wait()
        for i, place in places.items():
            parameters[i].grad = place / dist.get_world_size()
        left[:] = map(len, buckets)
    return finish
""",
        ),
        "divided before it is sent": (
            "11.7",
            starting(
                before="flat /= dist.get_world_size()",
                copy="grad.copy_(flat[begin : begin + grad.numel()].view_as(grad))",
            ),
        ),
        "the template of 11.8": ("11.8", meaning()),
        "the count first, each micro-batch divided by it, all in one buffer": (
            "11.8",
            """
def global_gradients(model, micro_batches):
    model.zero_grad()
    count = torch.tensor(float(sum((~targets.isnan()).sum() for _, targets in micro_batches)))
    dist.all_reduce(count)
    total = 0.0
    for batch in micro_batches:
        loss = loss_sum(model, *batch)[0] / count
        loss.backward()
        total += loss.detach()
    ps = list(model.parameters())
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in ps])
    flat = torch.cat([flat, torch.as_tensor(total, dtype=flat.dtype).view(1)])
    dist.all_reduce(flat)
    for p, part in zip(ps, flat[:-1].split([p.numel() for p in ps]), strict=True):
        p.grad = part.view_as(p).clone()
    return flat[-1]
""",
        ),
    }
    wrong_answers: ClassVar = {
        "11.1": {
            "sent, then received": (
                shifting(messages="dist.send(tensor, (rank + step) % n); dist.recv(received, (rank - step) % n)"),
                "every rank sends before it receives",
            ),
            "received, then sent": (
                shifting(messages="dist.recv(received, (rank - step) % n); dist.send(tensor, (rank + step) % n)"),
                "every rank waits to receive before anybody has sent",
            ),
            "isend waited for before the receive": (
                shifting(
                    messages="dist.isend(tensor, (rank + step) % n).wait(); "
                    "dist.irecv(received, (rank - step) % n).wait()"
                ),
                "every rank sends before it receives",
            ),
            "even ranks send first": (
                shifting(
                    messages="turns = [lambda: dist.send(tensor, (rank + step) % n), "
                    "lambda: dist.recv(received, (rank - step) % n)]; [turn() for turn in turns[:: 1 - 2 * (rank % 2)]]"
                ),
                "yours take 2 together",
            ),
            "rank 0 receives first": (
                shifting(
                    messages="turns = [lambda: dist.send(tensor, (rank + step) % n), "
                    "lambda: dist.recv(received, (rank - step) % n)]; "
                    "[turn() for turn in turns[:: -1 if rank == 0 else 1]]"
                ),
                "all be on their way at the same time",
            ),
            "the other way round": (
                shifting(
                    messages=SHIFTED["messages"]
                    .replace("rank + step", "rank - x")
                    .replace("rank - step", "rank + step")
                    .replace("rank - x", "rank - step")
                ),
                "so they come from the left",
            ),
            "always the neighbour": (
                shifting(messages=SHIFTED["messages"].replace("step", "1")),
                "4 ranks, step 2: rank 0 gets",
            ),
            "not waited for": (
                shifting(messages="dist.isend(tensor, (rank + step) % n); dist.irecv(received, (rank - step) % n)"),
                "wait() for all that is sent and all that is received",
            ),
            "the receive not waited for": (
                shifting(
                    messages="dist.irecv(received, (rank - step) % n); dist.isend(tensor, (rank + step) % n).wait()"
                ),
                "did it use what had not come yet?",
            ),
            "the send not waited for": (
                shifting(messages="dist.isend(tensor, (rank + step) % n); dist.recv(received, (rank - step) % n)"),
                "wait() for all that is sent and all that is received",
            ),
            "no modulo": (
                shifting(messages=SHIFTED["messages"].replace("(rank + step) % n", "rank + step")),
                "rank 1 failed",
            ),
            "sent to itself": (shifting(alone=""), "nothing is sent; yours sends 1"),
            "the given tensor back": (shifting(alone="if step % n == 0: return tensor"), "not a copy"),
            "received into the tensor": (
                shifting(messages=SHIFTED["messages"] + "; tensor.copy_(received)"),
                "changes the tensor that it was given",
            ),
            "its own": (shifting(out="tensor.clone()"), ", its own"),
            "sent twice": (
                shifting(messages=SHIFTED["messages"] + "; " + SHIFTED["messages"]),
                "yours sends 4 of 48 bytes",
            ),
            "all gathered": (
                shifting(
                    messages="every = [torch.empty_like(tensor) for _ in range(n)]; dist.all_gather(every, tensor); "
                    "received = every[(rank - step) % n]"
                ),
                "uses torch.distributed.all_gather",
            ),
            "nothing returned": (shifting(out="None"), "returns a tensor; yours is a NoneType"),
            "by a shared variable": (
                "TENSORS = {}\n"
                + shifting(
                    messages="TENSORS[rank] = tensor.clone(); dummy = torch.zeros_like(tensor); "
                    "works = dist.isend(dummy, (rank + step) % n), dist.irecv(received, (rank - step) % n); "
                    "[work.wait() for work in works]",
                    out="TENSORS[(rank - step) % n].clone()",
                ),
                "is all that your function knows of the others in messages?",
            ),
            "worked out from the numbers of the examples": (
                shifting(out="tensor - rank + (rank - step) % n"),
                "is all that your function knows of the others in messages?",
            ),
        },
        "11.2": {
            "sends do not wait": (
                """
def who_waits(programs):
    place, boxes = [0] * len(programs), {}
    moved = True
    while moved:
        moved = False
        for r, program in enumerate(programs):
            while place[r] < len(program):
                verb, other = program[place[r]]
                if verb == "send":
                    boxes[r, other] = boxes.get((r, other), 0) + 1
                elif boxes.get((other, r), 0):
                    boxes[other, r] -= 1
                else:
                    break
                place[r] += 1
                moved = True
    return [p[i][1] if i < len(p) else None for p, i in zip(programs, place)]
""",
                "a send waits until its receiver has come",
            ),
            "one round only": (waiting(moved="False"), "look again until nothing moves"),
            "the first steps only": (
                waiting(
                    go="return [None if p == [] or len(p) == 1 and rank != r else p[0][1] "
                    "for r, p in enumerate(programs)]"
                ),
                "both have come, so both go on",
            ),
            "received from anybody": (
                waiting(meets="step and step[0] == 'send' and (following(step[1]) or [0])[0] == 'recv'"),
                "only the next step of a program counts",
            ),
            "anywhere further on": (
                waiting(
                    meets="step and step[0] == 'send' and ('recv', rank) in programs[step[1]][place[step[1]]:]",
                    go="place[rank] += 1; place[step[1]] += 1",
                ),
                "a ring in which all send first",
            ),
            "only the sender goes on": (waiting(go="place[rank] += 1"), "both have come, so both go on"),
            "only the receiver goes on": (
                waiting(go="place[step[1]] += 1"),
                "both have come, so both go on",
            ),
            "those who have ended count as there": (
                waiting(
                    meets="step is not None and (following(step[1]) in (None, ('recv', rank), ('send', rank)))",
                    go="place[rank] += 1",
                ),
                "gives [1, 0], yours [None, None]",
            ),
            "only rings are reported": (
                waiting(
                    out="[None if following(r) is None or following(following(r)[1]) is None else following(r)[1] "
                    "for r in range(len(programs))]"
                ),
                "who has ended sends nothing any more",
            ),
            "the step instead of the rank": (
                waiting(out="[following(r) for r in range(len(programs))]"),
                "gives [1, 0], yours",
            ),
            "steps taken away": (
                waiting(go="programs[rank].pop(0); programs[step[1]].pop(0)"),
                "changes the programs",
            ),
            "no entry for those who end": (
                waiting(out="[following(r)[1] for r in range(len(programs)) if following(r)]"),
                "one entry a rank",
            ),
            "put to the cluster": (
                "def who_waits(programs):\n"
                "    return simulate_ranks(lambda: dist.send(torch.zeros(1), 0), len(programs))\n",
                "uses minillm.distributed.simulate_ranks",
            ),
        },
        "11.3": {
            "sent, then received": (
                scattering(messages="dist.send(carried, (rank + 1) % n); dist.recv(coming, (rank - 1) % n)"),
                "your ring waits for itself",
            ),
            "received, then sent": (
                scattering(messages="dist.recv(coming, (rank - 1) % n); dist.send(carried, (rank + 1) % n)"),
                "every rank waits to receive",
            ),
            "even ranks send first": (
                scattering(
                    messages="turns = [lambda: dist.send(carried, (rank + 1) % n), "
                    "lambda: dist.recv(coming, (rank - 1) % n)]; [turn() for turn in turns[:: 1 - 2 * (rank % 2)]]"
                ),
                "in every step all ranks send and receive at the same time",
            ),
            "the own part added twice": (scattering(add="coming + 2 * mine"), "numbers are in it twice"),
            "the first chunk added twice": (
                scattering(first="2 * chunks[(rank - 1) % n]"),
                "numbers are in it twice",
            ),
            "one step too many, a chunk added twice": (scattering(steps="n"), "numbers are in it twice"),
            "the own part not added": (scattering(add="coming"), "numbers are not in it"),
            "what has come not added": (scattering(add="mine.clone()"), "numbers are not in it"),
            "one step too few": (scattering(steps="n - 2"), "numbers are not in it"),
            "one step, enough for two ranks": (
                scattering(steps="min(1, n - 1)"),
                "4 ranks, 12 elements, all of rank r's",
            ),
            "the chunk of the right neighbour": (
                scattering(first="chunks[rank].clone()", coming="(rank - 1 - k) % n"),
                "rank 0 has chunk 1 instead of chunk 0",
            ),
            "the chunk of the left neighbour": (
                scattering(first="chunks[(rank - 2) % n].clone()", coming="(rank - 3 - k) % n"),
                "instead of chunk",
            ),
            "chunks mixed up": (
                scattering(coming="(rank - 1 - k) % n"),
                "mixes several chunks in one sum",
            ),
            "the whole buffer sent": (
                scattering(chunks="[flat] * n", out="carried.tensor_split(n)[rank].clone()"),
                "sends the whole buffer of 12 elements",
            ),
            "to everybody": (
                """
def ring_reduce_scatter(flat):
    rank, n = dist.get_rank(), dist.get_world_size()
    chunks = flat.tensor_split(n)
    total = chunks[rank].clone()
    for k in range(1, n):
        coming = torch.empty_like(total)
        works = dist.isend(chunks[(rank + k) % n], (rank + k) % n), dist.irecv(coming, (rank - k) % n)
        [work.wait() for work in works]
        total += coming
    return total
""",
                "its right neighbour, and to nobody else",
            ),
            "whole buffers, in the right number of messages": (
                """
def ring_reduce_scatter(flat):
    rank, n = dist.get_rank(), dist.get_world_size()
    total, carried = flat.clone(), flat
    for k in range(n - 1):
        coming = torch.empty_like(flat)
        works = dist.isend(carried, (rank + 1) % n), dist.irecv(coming, (rank - 1) % n)
        [work.wait() for work in works]
        total, carried = total + coming, coming
    return total.tensor_split(n)[rank].clone()
""",
                "sends the whole buffer of 12 elements",
            ),
            "all sent to rank 0": (
                """
def ring_reduce_scatter(flat):
    rank, n = dist.get_rank(), dist.get_world_size()
    if rank:
        dist.send(flat, 0)
        out = torch.empty_like(flat.tensor_split(n)[rank])
        dist.recv(out, 0)
        return out
    total = flat.clone()
    for other in range(1, n):
        coming = torch.empty_like(flat)
        dist.recv(coming, other)
        total += coming
    for other in range(1, n):
        dist.send(total.tensor_split(n)[other], other)
    return total.tensor_split(n)[0].clone()
""",
                "sends",
            ),
            "round the ring the other way": (
                scattering(
                    first="chunks[(rank + 1) % n].clone()",
                    coming="(rank + 2 + k) % n",
                    messages="works = dist.isend(carried, (rank - 1) % n), dist.irecv(coming, (rank + 1) % n); "
                    "[work.wait() for work in works]",
                ),
                "its right neighbour, and to nobody else",
            ),
            "equal chunks only, by view": (
                scattering(chunks="flat.view(n, -1)"),
                "rank 0 failed: RuntimeError",
            ),
            "equal chunks only, the rest left out": (
                scattering(chunks="[flat[c * (len(flat) // n) :][: len(flat) // n] for c in range(n)]"),
                "the chunks are of [4, 3] elements",
            ),
            "torch.chunk": (scattering(chunks="flat.chunk(n)"), "the chunks are of [3, 2, 2] elements"),
            "the rest in the last chunk": (
                scattering(
                    chunks="[flat[c * (len(flat) // n) : (c + 1) * (len(flat) // n) if c < n - 1 else None] "
                    "for c in range(n)]"
                ),
                "the chunks are of [4, 3] elements",
            ),
            "received into the same length as is sent": (
                scattering(messages="coming = torch.empty_like(carried); " + SCATTERED["messages"]),
                "do both sides mean the same chunk",
            ),
            "not waited for": (
                scattering(messages="dist.isend(carried, (rank + 1) % n); dist.irecv(coming, (rank - 1) % n)"),
                "wait() for all",
            ),
            "waited for at the end only": (
                scattering(
                    before="all_works = []",
                    messages="all_works += [dist.isend(carried, (rank + 1) % n), dist.irecv(coming, (rank - 1) % n)]",
                    out="[work.wait() for work in all_works] and carried",
                ),
                "rank",
            ),
            "the receive not waited for": (
                scattering(messages="dist.irecv(coming, (rank - 1) % n); dist.isend(carried, (rank + 1) % n).wait()"),
                "returns while its message from rank 2 is still under way",
            ),
            "the send not waited for": (
                scattering(messages="dist.isend(carried, (rank + 1) % n); dist.recv(coming, (rank - 1) % n)"),
                "0 and 1 are close: rank 2 returns while its message to rank 0 is still under way",
            ),
            "sent and changed before the wait": (
                scattering(
                    messages="work = dist.isend(carried, (rank + 1) % n); carried.zero_(); "
                    "dist.recv(coming, (rank - 1) % n); work.wait()"
                ),
                "wait() for a message before its tensor is used again",
            ),
            "in the given buffer": (
                scattering(first="chunks[(rank - 1) % n]", add="mine.add_(coming)"),
                "changes the buffer",
            ),
            "the mean": (scattering(out="carried / n"), "that is the mean, not the sum"),
            "float32": (scattering(add="(coming + mine).float()"), "the buffer is in torch.float64, so the chunk is"),
            "the chunk as a view, alone": (scattering(first="chunks[(rank - 1) % n]"), "a tensor of its own"),
            "a row": (scattering(out="carried[None]"), "has one dimension"),
            "the whole sum": (
                scattering(out="torch.cat([carried] * n)"),
                "gets a chunk of 6 elements; yours has 12",
            ),
            "by a shared variable": (
                """
BUFFERS = {}

def ring_reduce_scatter(flat):
    rank, n = dist.get_rank(), dist.get_world_size()
    BUFFERS[rank] = flat.clone()
    for k in range(n - 1):
        coming = torch.zeros_like(flat.tensor_split(n)[(rank - 2 - k) % n])
        dummy = torch.zeros_like(flat.tensor_split(n)[(rank - 1 - k) % n])
        works = dist.isend(dummy, (rank + 1) % n), dist.irecv(coming, (rank - 1) % n)
        [work.wait() for work in works]
    there = [BUFFERS[r] for r in range(n) if r in BUFFERS and len(BUFFERS[r]) == len(flat)]
    return sum(there).tensor_split(n)[rank].clone()
""",
                "is all that your function knows of the others in messages?",
            ),
            "the library's reduce_scatter": (
                scattering(
                    before="out = torch.empty_like(flat.tensor_split(n)[rank]); "
                    "dist.reduce_scatter(out, list(flat.tensor_split(n))); return out"
                ),
                "uses torch.distributed.reduce_scatter",
            ),
            "the library's all_reduce": (
                scattering(
                    before="flat = flat.clone(); torch.distributed.all_reduce(flat); return flat.tensor_split(n)[rank]"
                ),
                "uses torch.distributed.all_reduce",
            ),
            "minillm's own": (
                "from minillm.distributed.collectives import ring_reduce_scatter\n",
                "uses minillm.distributed",
            ),
        },
        "11.4": {
            "sent, then received": (
                gathering(
                    messages="dist.send(chunks[(rank - k) % n], (rank + 1) % n); "
                    "dist.recv(chunks[(rank - 1 - k) % n], (rank - 1) % n)"
                ),
                "your ring waits for itself",
            ),
            "always the own chunk": (
                gathering(messages=GATHERED["messages"].replace("chunks[(rank - k) % n]", "chunks[rank]")),
                "chunk",
            ),
            "the chunk in the wrong place": (
                gathering(own="(rank + 1) % n"),
                "ring_all_gather, 2 ranks, 8 elements: rank 0's chunk 0 is not rank 0's",
            ),
            "own chunk everywhere": (gathering(steps="0", out="chunk.repeat(n)[:n_elements]"), "but rank 0's own"),
            "one step too few": (gathering(steps="n - 2"), "is not rank 1's"),
            "one step too many": (gathering(steps="n"), "sends 1 messages; yours sends 2"),
            "the whole buffer each time": (
                gathering(
                    gathered="torch.zeros(n_elements, dtype=chunk.dtype)",
                    messages="coming = torch.empty_like(gathered); "
                    "works = dist.isend(gathered.clone(), (rank + 1) % n), dist.irecv(coming, (rank - 1) % n); "
                    "[work.wait() for work in works]; part = coming.tensor_split(n)[(rank - 1 - k) % n]; "
                    "chunks[(rank - 1 - k) % n].copy_(part)",
                ),
                "sends the whole buffer of 8 elements",
            ),
            "equal chunks only": (
                gathering(chunks="gathered.view(n, -1)"),
                "2 ranks, 7 elements",
            ),
            "torch.chunk": (gathering(chunks="gathered.chunk(n)"), "ranks"),
            "to everybody": (
                gathering(
                    messages="works = dist.isend(chunks[rank], (rank + k + 1) % n), "
                    "dist.irecv(chunks[(rank - 1 - k) % n], (rank - 1 - k) % n); [work.wait() for work in works]"
                ),
                "its right neighbour, and to nobody else",
            ),
            "not waited for": (
                gathering(messages=GATHERED["messages"].replace("[work.wait() for work in works]", "pass")),
                "wait() for all",
            ),
            "the receive not waited for": (
                gathering(messages=GATHERED["messages"].replace("[work.wait() for work in works]", "works[0].wait()")),
                "wait() for",
            ),
            "the send not waited for": (
                gathering(messages=GATHERED["messages"].replace("[work.wait() for work in works]", "works[1].wait()")),
                "0 and 1 are close: rank 2 returns while its message to rank 0 is still under way",
            ),
            "float32": (
                gathering(gathered="torch.empty(n_elements)"),
                "float",
            ),
            "all-reduce of the whole buffer round the ring": (
                gathering(
                    reduce="rank, n = dist.get_rank(), dist.get_world_size()\n    total, carried = flat.clone(), flat\n"
                    "    for k in range(n - 1):\n        coming = torch.empty_like(flat)\n"
                    "        works = dist.isend(carried, (rank + 1) % n), dist.irecv(coming, (rank - 1) % n)\n"
                    "        [work.wait() for work in works]\n        total, carried = total + coming, coming\n"
                    "    return total"
                ),
                "ring_all_reduce, 2 ranks, 8 elements: rank 0 sends the whole buffer",
            ),
            "the mean": (
                gathering(
                    reduce="return ring_all_gather(ring_reduce_scatter(flat) / dist.get_world_size(), len(flat))"
                ),
                "has the mean; an all-reduce gives the sum",
            ),
            "each buffer gathered first": (
                gathering(
                    reduce="n = dist.get_world_size(); every = ring_all_gather(flat, n * len(flat)); "
                    "return every.view(n, -1).sum(0)"
                ),
                "ring_all_reduce, 2 ranks, 8 elements: rank 0 sends",
            ),
            "two reduce-scatters": (
                gathering(
                    reduce="ring_reduce_scatter(flat); return ring_all_gather(ring_reduce_scatter(flat), len(flat))"
                ),
                "sends 2 messages; yours sends 3",
            ),
            "the chunk's sum twice": (
                gathering(reduce="return ring_all_gather(2 * ring_reduce_scatter(flat), len(flat))"),
                "is not the sum over all ranks",
            ),
            "in place": (
                gathering(reduce="return flat.copy_(ring_all_gather(ring_reduce_scatter(flat), len(flat)))"),
                "the tensor that it was given is changed",
            ),
            "by shared variables": (
                """
CHUNKS = {}

def ring_all_gather(chunk, n_elements):
    rank, n = dist.get_rank(), dist.get_world_size()
    CHUNKS[rank] = chunk.clone()
    sizes = [len(c) for c in torch.empty(n_elements).tensor_split(n)]
    for k in range(n - 1):
        dummy = torch.zeros(sizes[(rank - k) % n], dtype=chunk.dtype)
        coming = torch.empty(sizes[(rank - 1 - k) % n], dtype=chunk.dtype)
        works = dist.isend(dummy, (rank + 1) % n), dist.irecv(coming, (rank - 1) % n)
        [work.wait() for work in works]
    return torch.cat([CHUNKS[r] for r in range(n)])

def ring_all_reduce(flat):
    return ring_all_gather(ring_reduce_scatter(flat), len(flat))
""",
                "the others the steps of the text",
            ),
            "the library's all_gather": (
                gathering(messages="dist.all_gather(list(chunks), chunk)"),
                "uses torch.distributed.all_gather",
            ),
            "the library's all_reduce": (
                gathering(reduce="flat = flat.clone(); dist.all_reduce(flat); return flat"),
                "uses torch.distributed.all_reduce",
            ),
            "the first number only": (
                gathering(messages=GATHERED["messages"] + "; chunks[(rank - 1 - k) % n][1:].add_(1)"),
                "its first number is right, but not all of them are",
            ),
        },
        "11.5": {
            "one half": (costing(messages="n - 1"), "that is one half"),
            "n steps": (costing(messages="2 * n"), "one step less than there are ranks"),
            "elements": (costing(bytes="2 * n_elements - sizes[rank] - sizes[(rank + 1) % n]"), "those are elements"),
            "bytes of one half": (costing(bytes="element_bytes * (n_elements - sizes[rank])"), "that is one half"),
            "twice the buffer": (costing(bytes="2 * n_elements * element_bytes"), "one chunk stays in each half"),
            "whole buffers": (costing(bytes="2 * (n - 1) * n_elements * element_bytes"), "not the whole buffer"),
            "the mean": (
                costing(bytes="2 * (n - 1) / n * n_elements * element_bytes"),
                "that is the mean over all ranks",
            ),
            "rounded down": (
                costing(bytes="2 * (n - 1) * (n_elements // n) * element_bytes"),
                "the elements that are left over",
            ),
            "rounded up": (
                costing(bytes="2 * (n - 1) * -(-n_elements // n) * element_bytes"),
                "not every chunk is as long as the longest",
            ),
            "its own chunk twice": (
                costing(bytes="element_bytes * 2 * (n_elements - sizes[rank])"),
                "then every chunk but number",
            ),
            "the left neighbour's": (
                costing(bytes="element_bytes * (2 * n_elements - sizes[rank] - sizes[rank - 1])"),
                "then every chunk but number",
            ),
            "seconds of one half": (costing(ring="(n - 1) * (latency + n_bytes / n / bandwidth)"), "one half of it"),
            "whole buffers in the ring": (
                costing(ring="2 * (n - 1) * (latency + n_bytes / bandwidth)"),
                "a message carries one chunk",
            ),
            "one latency": (
                costing(ring="2 * latency + 2 * (n - 1) * n_bytes / n / bandwidth"),
                "every step has its latency",
            ),
            "2 n steps": (costing(ring="2 * n * (latency + n_bytes / n / bandwidth)"), "not n"),
            "one after the other": (
                costing(ring="n * 2 * (n - 1) * (latency + n_bytes / n / bandwidth)"),
                "all ranks send at the same time",
            ),
            "nothing sent back": (costing(server="(n - 1) * (latency + n_bytes / bandwidth)"), "sent back"),
            "all at once": (
                costing(server="2 * (latency + n_bytes / bandwidth)"),
                "it receives one message at a time",
            ),
            "to itself": (costing(server="2 * n * (latency + n_bytes / bandwidth)"), "nothing to itself"),
            "times the bandwidth": (
                costing(ring="2 * (n - 1) * (latency + n_bytes / n * bandwidth)"),
                "the ring takes",
            ),
            "one number": (costing(messages="sizes", bytes="0, 0"), "returns two numbers"),
            "one latency for both halves": (
                costing(ring="latency + 2 * (n - 1) * n_bytes / n / bandwidth"),
                "every step has its latency",
            ),
            "whole bytes": (
                costing(ring="2 * (n - 1) * (latency + n_bytes // n / bandwidth)"),
                "n_bytes / n_ranks need not be a whole number",
            ),
        },
        "11.6": {
            "forwards": (bucketing(order="range(len(parameters))"), "the last parameter comes first"),
            "cut forwards, then reversed": (
                bucketing(order="range(len(parameters))", out="[bucket[::-1] for bucket in buckets[::-1]]"),
                "has room for parameter",
            ),
            "backwards between buckets only": (
                bucketing(out="[bucket[::-1] for bucket in buckets]"),
                "across and within buckets",
            ),
            "too large by one parameter": (
                bucketing(new="not buckets or used >= max_bytes or p.dtype != dtype"),
                "bytes, more than",
            ),
            "never full": (
                bucketing(new="not buckets or used + size >= max_bytes or p.dtype != dtype"),
                "has room for",
            ),
            "elements": (bucketing(size="p.numel()"), "bytes, more than"),
            "four bytes each": (bucketing(size="4 * p.numel()"), "has room for parameter"),
            "dtypes mixed": (bucketing(new="not buckets or used + size > max_bytes"), "mixes dtypes"),
            "an empty bucket first": (
                bucketing(new="used + size > max_bytes or p.dtype != dtype or size > max_bytes", out="[[], *buckets]"),
                "a bucket is empty",
            ),
            "too large ones left out": (
                bucketing(skip="if not p.requires_grad or p.nbytes > max_bytes: continue"),
                "stands in no bucket",
            ),
            "frozen ones": (bucketing(skip=""), "does not learn"),
            "filled up with what fits": (
                """
def make_buckets(parameters, max_bytes):
    left = [i for i in reversed(range(len(parameters))) if parameters[i].requires_grad]
    buckets = []
    while left:
        bucket, used = [], 0
        for i in list(left):
            if not bucket or used + parameters[i].nbytes <= max_bytes:
                bucket.append(i)
                left.remove(i)
                used += parameters[i].nbytes
        buckets.append(bucket)
    return buckets
"""
                + BUCKETS.format(**BUCKETED)[BUCKETS.format(**BUCKETED).index("def pack") :],
                "the parameters backwards",
            ),
            "the parameters themselves": (bucketing(what="p"), "gives indices"),
            "one bucket, as a list of indices": (bucketing(out="[i for b in buckets for i in b]"), "a list of lists"),
            "the list itself": (bucketing(pack="tensors"), "pack returns a tensor"),
            "a matrix as it is": (
                bucketing(pack="torch.cat(list(tensors))"),
                "pack, a matrix and a vector: Tensors must have same number of dimensions",
            ),
            "by view": (
                bucketing(pack="torch.cat([t.view(-1) for t in tensors])"),
                "tensors may have any shape and strides",
            ),
            "columns first": (
                bucketing(pack="torch.cat([t.mT.flatten() if t.dim() > 1 else t.flatten() for t in tensors])"),
                "row by row",
            ),
            "float32": (
                bucketing(pack="torch.tensor([x for t in tensors for x in t.flatten().tolist()])"),
                "the flat tensor is in torch.float64",
            ),
            "a view for one tensor": (
                bucketing(pack="torch.cat([t.flatten() for t in tensors]).sort().values"),
                "one tensor after the other",
            ),
            "one tensor not copied": (
                bucketing(
                    pack="tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([t.flatten() for t in tensors])"
                ),
                "what pack returns is a view",
            ),
            "torch's own": (
                bucketing(pack="torch._utils._flatten_dense_tensors(tensors)"),
                "uses torch._utils._flatten_dense_tensors",
            ),
            "unpacked into new tensors": (
                bucketing(copy="tensor = part.view(tensor.shape)"),
                "copy into them, in place",
            ),
            "unpacked by view": (
                bucketing(copy="tensor.view(-1).copy_(part)"),
                "tensors may have any shape and strides",
            ),
            "unpacked into a copy": (
                bucketing(copy="tensor.reshape(-1).copy_(part)"),
                "a transposed matrix",
            ),
            "always from the beginning": (bucketing(advance="0"), "unpack, two vectors"),
            "added": (
                bucketing(copy="tensor.add_(part.view(tensor.shape)).add_(1)"),
                "does not give the tensors times -2",
            ),
            "other tensors in the list": (
                bucketing(copy="tensors[[id(t) for t in tensors].index(id(tensor))] = part.reshape(tensor.shape)"),
                "the tensors are still what they were",
            ),
            "other memory": (
                bucketing(copy="tensor.data = part.reshape(tensor.shape).clone()"),
                "the other matrix, of which it is a view, has not changed",
            ),
            "the memory of the flat tensor": (
                bucketing(copy="tensor.data = part.reshape(tensor.shape)"),
                "when the flat tensor changes later, so do the tensors",
            ),
        },
        "11.7": {
            "waited for in the hook": (starting(reduce="dist.all_reduce(flat)", wait="pass"), "a hook waits"),
            "waited for in the hook, asynchronously": (
                starting(reduce="(lambda work: (work.wait(), work)[1])(dist.all_reduce(flat, async_op=True))"),
                "start the all-reduce with async_op=True, and wait in finish",
            ),
            "all after the backward pass": (
                starting(when="pass", first="[start(k) for k in range(len(buckets))]"),
                "after the backward pass",
            ),
            "at the first gradient": (
                starting(when="any(j == i for j in buckets[k][:1]) and start(k)"),
                "a hook meets a gradient that is None",
            ),
            "each gradient on its own": (
                """
def reduce_early(parameters, buckets):
    works = []
    for p in parameters:
        p.register_post_accumulate_grad_hook(lambda p: works.append((p, dist.all_reduce(p.grad, async_op=True))))
    def finish():
        for p, work in works:
            work.wait()
            p.grad /= dist.get_world_size()
        works.clear()
    return finish
""",
                "2 buckets, so as many all-reduces; yours starts 4",
            ),
            "as they get full": (
                starting(when="if not missing[k]: start(k)"),
                "in the same order",
            ),
            "never waited for": (starting(wait="pass"), "wait() for all"),
            "the sum": (starting(copy="grad.copy_(flat[begin : begin + grad.numel()].view_as(grad))"), ", the sum"),
            "divided by two": (
                starting(copy="grad.copy_(flat[begin : begin + grad.numel()].view_as(grad) / 2)"),
                "three layers on three ranks, rank 1 at half speed: rank 0's gradient",
            ),
            "one bucket a hook": (
                starting(when="len(started) < len(buckets) and not missing[len(started)] and start(len(started))"),
                "all ranks must call it equally often",
            ),
            "divided twice": (
                starting(before="flat /= dist.get_world_size()"),
                "the mean divided by the ranks again",
            ),
            "not copied back": (starting(copy="pass"), ", its own"),
            "the first gradient for all": (
                starting(copy="grad.copy_(flat[: grad.numel()].view_as(grad) / dist.get_world_size())"),
                "gradient of parameter",
            ),
            "not as at the beginning": (starting(again="pass"), "is all as at the beginning after finish?"),
            "what was started is kept": (starting(clear="pass"), "is all as at the beginning after finish?"),
            "parameters instead of gradients": (
                starting(
                    reduce="dist.all_reduce(torch.cat([parameters[i].data.flatten() for i in buckets[k]]), "
                    "async_op=True)"
                ),
                "gradient of parameter 0",
            ),
            "parameters changed": (
                starting(copy="parameters[i].data += 1"),
                "a parameter is changed",
            ),
            "no bucket but one": (
                starting(
                    when="if not any(missing) and not started: started.append((0, *(lambda flat: "
                    "(flat, dist.all_reduce(flat, async_op=True)))(torch.cat([p.grad.flatten() for p in parameters]))))"
                ),
                "3 buckets, so as many all-reduces; yours starts 1",
            ),
            "the hook before the gradient is there": (
                starting(register="register_hook"),
                "register_hook would come before any",
            ),
            "no finish": (starting(out="None"), "returns a function"),
            "another collective first": (
                starting(before="dist.barrier(async_op=True); dist.broadcast(flat.clone(), 0, async_op=True)"),
                "dist.all_reduce is all that is needed",
            ),
            "a hook that reports too early": (
                starting(when="len(missing[k]) <= 1 and [start(j) for j in range(len(started), k + 1)]"),
                "a hook meets a gradient that is None",
            ),
            "the library's": (
                starting(first="from torch.nn.parallel import DistributedDataParallel"),
                "uses torch.nn.parallel.DistributedDataParallel",
            ),
            "column by column": (
                starting(before="flat = torch.cat([parameters[i].grad.movedim(0, -1).flatten() for i in buckets[k]])"),
                "the right numbers at wrong places",
            ),
            "the first number for all": (
                starting(copy="grad.copy_(flat[begin] / dist.get_world_size())"),
                "the mean over the ranks; yours has",
            ),
            "worked out from its own": (
                starting(copy="grad.mul_((dist.get_world_size() + 1) / 2 / (dist.get_rank() + 1))"),
                "is all that your function knows of the others in messages?",
            ),
            "by a shared variable": (
                "GRADIENTS = {}\n"
                + starting(
                    before="GRADIENTS.setdefault((k, dist.get_rank()), []).append(flat.clone()); flat.zero_()",
                    copy="n = dist.get_world_size(); there = [GRADIENTS[k, r][-1] for r in range(n)]; "
                    "grad.copy_((sum(there) / n)[begin : begin + grad.numel()].view_as(grad))",
                ),
                "is all that your function knows of the others in messages?",
            ),
        },
        "11.8": {
            "mean of the ranks' means": (
                meaning(
                    count_all="pass",
                    divide="p.grad /= dist.get_world_size()",
                    reduce="p.grad /= max(n_targets, 1); dist.all_reduce(p.grad)",
                    out="(lambda t: (dist.all_reduce(t), t.item() / dist.get_world_size())[1])(sums[0] / sums[1])",
                ),
                "the mean of the ranks' means",
            ),
            "means of micro-batches added up": (
                meaning(
                    backward="(loss / max(count, 1) / len(micro_batches)).backward()",
                    divide="p.grad /= dist.get_world_size()",
                ),
                "mean",
            ),
            "divided by the ranks, too": (
                meaning(divide="p.grad /= sums[1] * dist.get_world_size()"),
                "too small by the number of ranks",
            ),
            "divided by this rank's count": (
                meaning(
                    count_all="mine = sums.clone(); dist.all_reduce(sums)", divide="p.grad /= mine[1].clamp(min=1)"
                ),
                "number of ranks",
            ),
            "not divided": (meaning(divide="pass"), "those are sums"),
            "divided by the ranks only": (
                meaning(divide="p.grad /= dist.get_world_size()"),
                "divided by the ranks, not by the targets",
            ),
            "padding counted": (meaning(count="len(targets)"), "padded places are counted"),
            "nothing added up": (meaning(reduce="pass"), "only this rank's targets are in them"),
            "only this rank": (
                meaning(reduce="pass", count_all="pass", divide="p.grad /= max(n_targets, 1)"),
                "this rank's own",
            ),
            "in every micro-step": (
                meaning(
                    backward="old = [p.grad.clone() for p in parameters]; [p.grad.zero_() for p in parameters]; "
                    "loss.backward(); [dist.all_reduce(p.grad) for p in parameters]; "
                    "[p.grad.add_(g) for p, g in zip(parameters, old)]",
                    reduce="pass",
                ),
                "2.1 times its gradients'",
            ),
            "in every micro-step, added up again": (
                meaning(backward="loss.backward(); [dist.all_reduce(p.grad) for p in parameters]", reduce="pass"),
                "each gradient goes through it once",
            ),
            "twice": (meaning(reduce="dist.all_reduce(p.grad); dist.all_reduce(p.grad)"), "2.1 times its gradients'"),
            "parameters instead of gradients": (
                meaning(reduce="dist.all_reduce(p.data)"),
                "the parameters have changed",
            ),
            "old gradients kept": (meaning(before=""), "what was in grad before the call"),
            "no gradients where there are no batches": (
                meaning(
                    before="model.zero_grad()",
                    reduce="if p.grad is not None: dist.all_reduce(p.grad)",
                    divide="if p.grad is not None: p.grad /= sums[1]",
                ),
                "a parameter's grad is None",
            ),
            "gone home early": (
                meaning(
                    before="for p in parameters: p.grad = torch.zeros_like(p)\n    if not micro_batches: return 0.0"
                ),
                "also those with nothing to do",
            ),
            "the rank's own loss": (
                meaning(out="losses / max(n_targets, 1)"),
                "is that this rank's own",
            ),
            "the sum of losses": (meaning(out="sums[0].item()"), "the gradients are right, but L is"),
            "nothing returned": (meaning(out="None"), "L is returned as a number"),
            "the library's": (
                meaning(before="model = nn.parallel.DistributedDataParallel(model)"),
                "uses torch.nn.parallel.DistributedDataParallel",
            ),
            "by a shared variable": (
                """
SHARED = {}

def global_gradients(model, micro_batches):
    parameters = list(model.parameters())
    for p in parameters:
        p.grad = torch.zeros_like(p)
    losses, n_targets = 0.0, 0
    for inputs, targets in micro_batches:
        loss, count = loss_sum(model, inputs, targets)
        loss.backward()
        losses, n_targets = losses + loss.item(), n_targets + count
    SHARED[dist.get_rank()] = losses, n_targets, [p.grad.clone() for p in parameters]
    for p in parameters:
        dist.all_reduce(torch.zeros_like(p))
    there = [SHARED[r] for r in range(dist.get_world_size())]
    for i, p in enumerate(parameters):
        p.grad = sum(gradients[i] for _, _, gradients in there) / sum(count for _, count, _ in there)
    return sum(loss for loss, _, _ in there) / sum(count for _, count, _ in there)
""",
                "is all that your function knows of the others in messages?",
            ),
            "by a shared variable, without a message": (
                """
SHARED = {}

def global_gradients(model, micro_batches):
    parameters = list(model.parameters())
    for p in parameters:
        p.grad = torch.zeros_like(p)
    losses, n_targets = 0.0, 0
    for inputs, targets in micro_batches:
        loss, count = loss_sum(model, inputs, targets)
        loss.backward()
        losses, n_targets = losses + loss.item(), n_targets + count
    SHARED[dist.get_rank()] = losses, n_targets, [p.grad.clone() for p in parameters]
    dist.barrier()
    there = [SHARED[r] for r in range(dist.get_world_size())]
    for i, p in enumerate(parameters):
        p.grad = sum(gradients[i] for _, _, gradients in there) / sum(count for _, count, _ in there)
    return sum(loss for loss, _, _ in there) / sum(count for _, count, _ in there)
""",
                "how do the others hear of them?",
            ),
        },
    }


def test_every_part_has_the_three_levels_of_hints_that_the_notebook_promises():
    assert {len(part.hints) for part in find_exercise("11").parts} == {3}


@pytest.fixture(scope="module")
def solution() -> dict[str, object]:
    return solution_names("11")


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 6), n_elements=st.integers(1, 20), seed=st.integers(0, 99))
def test_the_ring_is_torchs_all_reduce(solution, n, n_elements, seed):
    buffers = torch.randint(-9, 9, (n, n_elements), generator=torch.Generator().manual_seed(seed)).double()

    def main():
        mine = buffers[dist.get_rank()].clone()
        ours = solution["ring_all_reduce"](mine)
        dist.all_reduce(mine)
        return ours, mine

    for ours, theirs in simulate_ranks(main, n).results:
        assert torch.equal(ours, theirs)


def test_the_answers_work_in_real_processes(solution):
    buffers = torch.randint(-9, 9, (3, 5), generator=torch.Generator().manual_seed(1)).double()

    def main():
        mine = buffers[dist.get_rank()]
        return solution["shift"](mine, -1), solution["ring_all_reduce"](mine), solution["ring_all_reduce"](mine[:2])

    for rank, (shifted, total, fewer_than_ranks) in enumerate(run_ranks(main, 3)):
        assert torch.equal(shifted, buffers[(rank + 1) % 3])
        assert torch.equal(total, buffers.sum(0))
        assert torch.equal(fewer_than_ranks, buffers.sum(0)[:2])


def test_the_hooks_and_the_counts_give_what_one_process_gives(solution):
    generator = torch.Generator().manual_seed(3)
    batches = [
        (torch.randn(4, 3, generator=generator).double(), torch.randn(4, generator=generator).double()) for _ in "12"
    ]
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    exact = copy.deepcopy(model)
    (sum(solution["loss_sum"](exact, *batch)[0] for batch in batches) / 8).backward()

    def main():
        early, counted = copy.deepcopy(model), copy.deepcopy(model)
        parameters = list(early.parameters())
        finish = solution["reduce_early"](parameters, solution["make_buckets"](parameters, 60))
        (solution["loss_sum"](early, *batches[dist.get_rank()])[0] / 4).backward()
        finish()
        solution["global_gradients"](counted, [batches[dist.get_rank()]])
        return [p.grad for p in early.parameters()], [p.grad for p in counted.parameters()]

    for both in (*simulate_ranks(main, 2).results, *run_ranks(main, 2)):
        for gradients in both:
            torch.testing.assert_close(gradients, [p.grad for p in exact.parameters()])
