"""Which pieces of a Unigram model are needed least.

Source: Kudo, "Subword regularization" (2018), section 3.2: the loss of a piece is how much the likelihood of the corpus
falls when it is taken away.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from heapq import heapify, heappop, heapreplace
from math import log

import numpy as np
import numpy.typing as npt

from minillm.tokenizers.unigram_expectation import Floats, WordLattices


def prune(
    pieces: Sequence[str], counts: Floats, scores: Floats, size: int, required: Collection[str] = ()
) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Take away pieces, the one with the smallest loss first, until `size` are left.

    A piece x that is taken away is spelled by others: by the parts y_1 ... y_m of its second best segmentation (the
    best is x itself). They get its c(x) occurrences. With N occurrences of all pieces, the log likelihood falls by

        c(x) * (log c(x)/N - sum_i log (c(y_i) + c(x))/N'),      N' = N + (m - 1) c(x)

    The libraries compute all losses once and take away a quarter of the pieces at a time. Then two pieces that stand in
    for each other ("▁Element" and "▁" + "Element") may both go, each because the other is there. Here counts are moved
    as pieces are taken away, and a loss is computed anew before it is acted upon; where a part is gone, its own parts
    stand for it.

    Args:
        pieces: All single characters among them: these are kept.
        counts: How often each piece is expected.
        scores: Log probabilities, which decide on second best segmentations.
        size: How many pieces to keep; at least the single characters and the required ones remain.
        required: Pieces to keep.

    Returns:
        Which pieces remain, and the counts of these.
    """
    spelled = WordLattices(dict.fromkeys(pieces, 1), pieces, whole_words=False).best_paths(scores)
    parts = [spelled[piece] for piece in pieces]
    count = counts.tolist()
    total = sum(count)
    removed = [False] * len(pieces)

    def loss(i: int) -> float:
        if not count[i]:
            return 0.0
        new_total = total + count[i] * (len(parts[i]) - 1)
        gained = sum(log(count[part] + count[i]) for part in parts[i]) - len(parts[i]) * log(new_total)
        return float(count[i] * (log(count[i] / total) - gained))

    queue = [(loss(i), i) for i, piece in enumerate(pieces) if len(piece) > 1 and piece not in required]
    heapify(queue)
    for _ in range(min(len(pieces) - size, len(queue))):
        while True:
            old, i = queue[0]
            while any(removed[part] for part in parts[i]):
                parts[i] = [new for part in parts[i] for new in (parts[part] if removed[part] else [part])]
            # If the loss has become greater, another piece may come first; if this one comes again, it is up to date.
            if (now := loss(i)) <= old or len(queue) == 1:
                break
            heapreplace(queue, (now, i))
        heappop(queue)
        removed[i] = True
        total += count[i] * (len(parts[i]) - 1)
        for part in parts[i]:
            count[part] += count[i]
    kept = ~np.array(removed)
    return kept, np.array(count)[kept]
