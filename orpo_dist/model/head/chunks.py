"""Which scored rows the loss head handles together: host numbers only.

Shape legend: B pairs, N scored rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

CHOSEN, REJECTED = 0, 1


@dataclass(frozen=True)
class PairRows:
    """Scored rows of one pair, in this order: `nll_prompt` rows of the prompt (0 when the NLL is the completion's
    alone), then the chosen, then the rejected completion's (at least 1 each)."""

    nll_prompt: int
    chosen: int
    rejected: int


@dataclass(frozen=True)
class PairStarts:
    """Rows where the parts of a pair begin, and where it ends."""

    prompt: int
    chosen: int
    rejected: int
    end: int


@dataclass(frozen=True)
class Chunk:
    """Rows [start, stop) that are scored at once.

    closes: pairs whose last row is here; their coefficients are known after this chunk.
    open_branch: CHOSEN or REJECTED when all rows are a cut completion's whose coefficient is not known yet.
    """

    start: int
    stop: int
    closes: range
    open_branch: int | None = None


def plan_chunks(pair_rows: Sequence[PairRows], size: int) -> list[Chunk]:
    """Cuts the scored rows into chunks of at most `size`. Prompts may be cut anywhere, the two completions of a pair
    only when they do not fit one chunk together."""
    starts = pair_starts(pair_rows)
    chunks, at, pair = [], 0, 0
    while pair < len(starts):
        this = starts[pair]
        if at >= this.chosen and this.end - at > size:
            branch = CHOSEN if at < this.rejected else REJECTED
            stop = min(at + size, this.rejected if branch == CHOSEN else this.end)
            chunks.append(Chunk(at, stop, range(0), branch))
            at = stop
            continue
        first, stop = pair, at
        while pair < len(starts) and starts[pair].end <= at + size:
            stop = starts[pair].end
            pair += 1
        if pair < len(starts):
            stop = max(stop, min(at + size, starts[pair].chosen))
        chunks.append(Chunk(at, stop, range(first, pair)))
        at = stop
    return chunks


def pair_starts(pair_rows: Sequence[PairRows]) -> list[PairStarts]:
    starts, at = [], 0
    for pair in pair_rows:
        chosen = at + pair.nll_prompt
        rejected = chosen + pair.chosen
        starts.append(PairStarts(at, chosen, rejected, rejected + pair.rejected))
        at = starts[-1].end
    return starts


def plan_slice(
    here: Sequence[PairRows], whole: Sequence[PairRows], rounds: Sequence[Sequence[int]], size: int
) -> tuple[list[list[Chunk]], list[Chunk]]:
    """The chunks of the rows that one rank of a sequence-parallel group holds.

    here, whole: scored rows of each pair on this rank, and on all of them. rounds: pairs whose completions lie on
    several ranks (packing/split.py). Those here are the first or the last rows of the slice.

    Returns: per round, the open chunks of its pairs here, none for most; then the plan of the other rows.
    """
    starts = pair_starts(here)
    first = [[chunk for pair in pairs for chunk in _open_chunks(starts[pair], size)] for pairs in rounds]
    spanning = {pair for pairs in rounds for pair in pairs}
    rest = [PairRows(p.nll_prompt, 0, 0) if i in spanning else p for i, p in enumerate(here)]
    present = [i for i, p in enumerate(rest) if p.nll_prompt + p.chosen + p.rejected]
    if not present:
        return first, []
    offset = starts[present[0]].prompt  # the rows before are of completions that began on another rank
    plan = []
    for chunk in plan_chunks([rest[i] for i in present], size):
        # A pair of which only prompt rows lie here has its completions elsewhere, and nothing to close.
        closes = [i for i in (present[k] for k in chunk.closes) if rest[i].chosen and rest[i].chosen == whole[i].chosen]
        pairs = range(closes[0], closes[-1] + 1) if closes else range(0)
        plan.append(Chunk(chunk.start + offset, chunk.stop + offset, pairs, chunk.open_branch))
    return first, plan


def _open_chunks(start: PairStarts, size: int) -> list[Chunk]:
    branches = ((CHOSEN, start.chosen, start.rejected), (REJECTED, start.rejected, start.end))
    return [
        Chunk(at, min(at + size, stop), range(0), branch)
        for branch, begin, stop in branches
        for at in range(begin, stop, size)
    ]
