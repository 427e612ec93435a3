"""Which rank does what: named axes over the ranks 0 ... world_size - 1, in plain arithmetic."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from html import escape

DIMENSIONS = ("pp", "dp", "cp", "tp")  # outermost first: the factors of the world
AXES = (*DIMENSIONS, "ep", "expert_dp")
_SHOWN = 512  # ranks in a table


@dataclass(frozen=True)
class MeshLayout:
    """``rank = ((pp_index * dp + dp_index) * cp + cp_index) * tp + tp_index``; world size ``pp * dp * cp * tp``.

    The axes stand in the order of how much they talk, because ranks with neighbouring numbers share a node and its
    fast links (Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters", sections 3.1
    and 3.2): tensor parallel ranks (``tp``, innermost) exchange activations several times in every layer, with nothing
    to do meanwhile; context parallel ranks (``cp``) keys and values once in every layer; data parallel ranks (``dp``)
    gradients or parameters, which overlaps with the work; pipeline stages (``pp``, outermost) only what passes from
    one stage to the next.

    Expert parallelism divides data parallelism, as in Megatron-LM and DeepSpeed-MoE (Rajbhandari et al. 2022, section
    5): the ranks of a data parallel group see different tokens and exchange them, ``ep`` neighbours on the dp axis
    hold one expert each set between them. It is no factor of the world, and divides ``dp``. Its groups are the axis
    ``"ep"``; the ``dp / ep`` ranks that hold the same experts, which average the experts' gradients, are the axis
    ``"expert_dp"``: ``dp_index = expert_dp_index * ep + ep_index``.

    Raises TypeError or ValueError for sizes that are no integers of at least 1, or an ep that does not divide dp.
    """

    dp: int = 1
    pp: int = 1
    tp: int = 1
    cp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            size = getattr(self, field.name)
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"{field.name} must be an integer, got {size!r}")
            if size < 1:
                raise ValueError(f"{field.name} must be at least 1, got {size}")
        if self.dp % self.ep:
            raise ValueError(f"ep must divide dp={self.dp}, whose ranks share the experts, got {self.ep}")

    @property
    def expert_dp(self) -> int:
        """How many ranks hold the same experts, for one place on the other axes."""
        return self.dp // self.ep

    @property
    def world_size(self) -> int:
        return math.prod(self.size(axis) for axis in DIMENSIONS)

    @property
    def sizes(self) -> dict[str, int]:
        """The factors of the world, outermost first; with experts shared, dp as its two factors."""
        names = DIMENSIONS if self.ep == 1 else ("pp", "expert_dp", "ep", "cp", "tp")
        return {name: self.size(name) for name in names}

    def size(self, axis: str) -> int:
        """How many ranks a group of `axis` has: "pp", "dp", "cp", "tp", "ep" or "expert_dp"."""
        if axis not in AXES:
            raise ValueError(f"axis must be one of {', '.join(AXES)}, got {axis!r}")
        return int(getattr(self, axis))

    def coordinates(self, rank: int) -> dict[str, int]:
        """The index of `rank` on each axis, by the axis' name."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank must be in 0 ... {self.world_size - 1}, got {rank}")
        found, rest = {}, rank
        for axis in reversed(DIMENSIONS):
            rest, found[axis] = divmod(rest, self.size(axis))
        place = {axis: found[axis] for axis in DIMENSIONS}
        place["expert_dp"], place["ep"] = divmod(place["dp"], self.ep)
        return place

    def rank(self, **coordinates: int) -> int:
        """The rank at an index on each axis; axes that are not named are at 0.

        On the dp axis, "dp" or "ep" and "expert_dp" say where; all three may be named if they agree.
        """
        for axis, index in coordinates.items():
            if not 0 <= index < self.size(axis):
                raise ValueError(f"{axis} must be in 0 ... {self.size(axis) - 1}, got {index}")
        place = dict(coordinates)
        place.setdefault("dp", place.get("expert_dp", 0) * self.ep + place.get("ep", 0))
        expert_dp, ep = divmod(place["dp"], self.ep)
        if place.get("ep", ep) != ep or place.get("expert_dp", expert_dp) != expert_dp:
            raise ValueError(f"dp={place['dp']} is at expert_dp={expert_dp} and ep={ep}, got {coordinates}")
        number = 0
        for axis in DIMENSIONS:
            number = number * self.size(axis) + place.get(axis, 0)
        return number

    def groups(self, axis: str) -> list[list[int]]:
        """The groups of `axis`: lists of ranks that differ in nothing but their index on it, in its order."""
        self.size(axis)
        moving = {"dp": ("dp", "ep", "expert_dp"), "ep": ("ep", "dp"), "expert_dp": ("expert_dp", "dp")}
        groups: dict[tuple[tuple[str, int], ...], list[int]] = {}
        for rank in range(self.world_size):
            place = self.coordinates(rank)
            fixed = tuple((name, at) for name, at in place.items() if name not in moving.get(axis, (axis,)))
            groups.setdefault(fixed, []).append(rank)
        return list(groups.values())

    def rows(self) -> tuple[list[str], list[tuple[str, list[int]]]]:
        """The layout as a table: names of its columns, and for each row its name and its ranks.

        Down go the pipeline stages and data parallel ranks, across the ranks that share the work on the same tokens.
        """
        down = [axis for axis in self.sizes if axis not in ("cp", "tp")]
        columns = [self._named(("cp", "tp"), indices) for indices in self._indices(("cp", "tp"))]
        starts = itertools.count(0, self.cp * self.tp)
        return columns, [
            (self._named(down, indices), list(range(start, start + self.cp * self.tp)))
            for indices, start in zip(self._indices(down), starts, strict=False)
        ]

    def __str__(self) -> str:
        if self.world_size > _SHOWN:
            return self._title()
        columns, rows = self.rows()
        wide = max(len(str(self.world_size)), *map(len, columns))
        left = max(len(name) for name, _ in rows)
        lines = [self._title(), " " * left + "".join(f"  {name:>{wide}}" for name in columns)]
        lines += [f"{name:<{left}}" + "".join(f"  {rank:>{wide}}" for rank in ranks) for name, ranks in rows]
        return "\n".join(line.rstrip() for line in lines if line.strip())

    def _repr_html_(self) -> str:
        if self.world_size > _SHOWN:
            return f"<p>{escape(self._title())}</p>"
        columns, rows = self.rows()
        head = "".join(f"<th>{escape(name)}</th>" for name in ["", *columns])
        body = "".join(
            f"<tr><th>{escape(name)}</th>{''.join(f'<td>rank {rank}</td>' for rank in ranks)}</tr>"
            for name, ranks in rows
        )
        return f"<table><caption>{escape(self._title())}</caption><tr>{head}</tr>{body}</table>"

    def _title(self) -> str:
        factors = " x ".join(f"{axis}={size}" for axis, size in self.sizes.items())
        return f"{factors}: {self.world_size} rank{'s' if self.world_size > 1 else ''}"

    def _named(self, axes: tuple[str, ...] | list[str], indices: tuple[int, ...]) -> str:
        """Only axes on which there is a choice."""
        return " ".join(f"{axis}={at}" for axis, at in zip(axes, indices, strict=True) if self.size(axis) > 1)

    def _indices(self, axes: tuple[str, ...] | list[str]) -> Iterator[tuple[int, ...]]:
        return itertools.product(*(range(self.size(axis)) for axis in axes))


def nearest_layouts(layout: MeshLayout, world_size: int, n: int = 3) -> list[MeshLayout]:
    """The n layouts of `world_size` ranks that differ from `layout` in the fewest sizes, and then by the least factor.

    ep stays where it divides the new dp, else it becomes the largest size below it that does.
    """

    def distance(other: MeshLayout) -> tuple[int, float, bool]:
        ratios = [abs(math.log(other.size(axis) / layout.size(axis))) for axis in (*DIMENSIONS, "ep")]
        return sum(ratio > 0 for ratio in ratios), sum(ratios), other.dp == layout.dp

    divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
    found = []
    for tp, cp, pp in itertools.product(divisors, repeat=3):
        if world_size % (tp * cp * pp) == 0:
            dp = world_size // (tp * cp * pp)
            ep = next(size for size in range(min(layout.ep, dp), 0, -1) if dp % size == 0)
            found.append(MeshLayout(dp=dp, pp=pp, tp=tp, cp=cp, ep=ep))
    return sorted(found, key=distance)[:n]
