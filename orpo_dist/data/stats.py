"""How long the pairs are, what padding and doubled prompts cost with them, and how large their images are."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from datasets import Dataset

PERCENTILES = (5, 25, 50, 75, 95, 99)
BOUNDS = (512, 1024, 2048, 4096, 8192)
BARS = 12
BAR_WIDTH = 50


@dataclass(frozen=True)
class Lengths:
    """Tokens of one part of the pairs, over all pairs. `percentiles` holds those of PERCENTILES."""

    mean: float
    percentiles: tuple[int, ...]
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Lengths":
        ordered = sorted(lengths)
        # nearest rank: a percentile is a length that occurs
        at = tuple(ordered[max(0, math.ceil(p / 100 * len(ordered)) - 1)] for p in PERCENTILES)
        return cls(sum(ordered) / len(ordered), at, ordered[-1])


@dataclass(frozen=True)
class PairStats:
    """Lengths of B pairs and the cost of layouts; P, C, R are tokens of prompt, chosen and rejected.

    Attributes:
        sequence: tokens of a pair's longer sequence, P + max(C, R): what max_length bounds.
        padding_waste: share of padding in the padded layout, 2B rows per batch as long as its longest, for batches of
            `batch_size` pairs in random order.
        prefix_sharing_gain: sum of 2P+C+R over sum of P+C+R: tokens saved by computing each prompt once.
        padded_over_packed: tokens of the padded layout over those of the packed one.
        longer_than: number of pairs whose longer sequence has more tokens than each of BOUNDS.
    """

    pairs: int
    prompt: Lengths
    chosen: Lengths
    rejected: Lengths
    sequence: Lengths
    sequence_lengths: list[int]
    batch_size: int
    padding_waste: float
    prefix_sharing_gain: float
    padded_over_packed: float
    longer_than: dict[int, int]


def pair_stats(dataset: Dataset, batch_size: int, seed: int = 0) -> PairStats:
    """Statistics of a tokenised data set (columns prompt_ids, chosen_ids, rejected_ids), which must not be empty."""
    prompt, chosen, rejected = (
        [len(ids) for ids in dataset[name]] for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    sequence = [p + max(c, r) for p, c, r in zip(prompt, chosen, rejected, strict=True)]
    doubled = 2 * sum(prompt) + sum(chosen) + sum(rejected)
    packed = sum(prompt) + sum(chosen) + sum(rejected)
    padded = _padded_tokens(sequence, batch_size, seed)
    return PairStats(
        pairs=len(prompt),
        prompt=Lengths.of(prompt),
        chosen=Lengths.of(chosen),
        rejected=Lengths.of(rejected),
        sequence=Lengths.of(sequence),
        sequence_lengths=sequence,
        batch_size=batch_size,
        padding_waste=1 - doubled / padded,
        prefix_sharing_gain=doubled / packed,
        padded_over_packed=padded / packed,
        longer_than={bound: sum(length > bound for length in sequence) for bound in BOUNDS},
    )


@dataclass(frozen=True)
class ImageStats:
    """Images of `pairs` pairs. `per_pair`: pairs by their number of images; `tokens`: None without a processor."""

    pairs: int
    images: int
    per_pair: dict[int, int]
    width: Lengths
    height: Lengths
    tokens: Lengths | None = None
    share_of_tokens: float = 0.0


def image_stats(sizes: Sequence[Sequence[Sequence[int]]], pairs: int) -> ImageStats:
    """sizes: (width, height) of each image, by pair, of at least one pair that has images."""
    flat = [size for of_pair in sizes for size in of_pair]
    counts = Counter(len(of_pair) for of_pair in sizes if of_pair)
    without = pairs - sum(counts.values())
    per_pair = ({0: without} if without else {}) | dict(sorted(counts.items()))
    width, height = (Lengths.of([size[side] for size in flat]) for side in (0, 1))
    return ImageStats(pairs, len(flat), per_pair, width, height)


def image_stats_of(dataset: Dataset) -> ImageStats | None:
    """Of a tokenised data set; None where no pair has an image. Tokens per image are a pair's image tokens over its
    images."""
    if "image_sizes" not in dataset.column_names:
        return None
    sizes, tokens = dataset["image_sizes"][:], dataset["image_tokens"][:]
    if not any(sizes):
        return None
    each = [round(count / len(of_pair)) for of_pair, count in zip(sizes, tokens, strict=True) for _ in of_pair]
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    total = sum(len(ids) for name in columns for ids in dataset[name])
    stats = image_stats(sizes, len(dataset))
    return replace(stats, tokens=Lengths.of(each), share_of_tokens=sum(tokens) / total)


def describe_images(stats: ImageStats) -> list[str]:
    """The statistics as lines for the terminal."""
    each = ", ".join(f"{pairs} with {count}" for count, pairs in stats.per_pair.items())
    lines = [
        f"{stats.images} images in {stats.pairs} pairs: {each}",
        f"{'':10}{'mean':>8}" + "".join(f"{f'p{p}':>8}" for p in PERCENTILES) + f"{'max':>8}",
        _line("width", stats.width),
        _line("height", stats.height),
    ]
    if stats.tokens is not None:
        lines.append(_line("tokens", stats.tokens))
        lines.append(f"(width and height in pixels; images are {stats.share_of_tokens:.0%} of the packed tokens)")
    return lines


def _line(name: str, lengths: Lengths) -> str:
    middle = "".join(f"{value:>8}" for value in lengths.percentiles)
    return f"{name:10}{lengths.mean:>8.0f}{middle}{lengths.longest:>8}"


def _padded_tokens(sequence: list[int], batch_size: int, seed: int) -> int:
    order = sequence[:]
    random.Random(seed).shuffle(order)
    batches = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    return sum(2 * len(batch) * max(batch) for batch in batches)


def describe(stats: PairStats) -> str:
    """The statistics as a table and a histogram for the terminal."""
    header = "".join(f"{f'p{p}':>8}" for p in PERCENTILES)
    lines = [f"{stats.pairs} pairs, lengths in tokens", f"{'':10}{'mean':>8}{header}{'max':>8}"]
    for name, lengths in (
        ("prompt", stats.prompt),
        ("chosen", stats.chosen),
        ("rejected", stats.rejected),
        ("sequence", stats.sequence),
    ):
        lines.append(_line(name, lengths))
    lines += ["(sequence: prompt + the longer completion, which max_length bounds)", ""]
    longer = ", ".join(f"{count} over {bound}" for bound, count in stats.longer_than.items() if count)
    lines.append(f"Pairs with longer sequences: {longer or f'none over {BOUNDS[0]}'}")
    lines.append(
        f"Padding would waste {stats.padding_waste:.1%} of the tokens of padded batches of {stats.batch_size} pairs."
    )
    lines.append(f"Prefix sharing computes {stats.prefix_sharing_gain:.2f} times fewer tokens: (2P+C+R) / (P+C+R).")
    lines.append(f"Padded batches hold {stats.padded_over_packed:.2f} times the tokens of the packed layout.")
    return "\n".join([*lines, "", "Tokens of a pair's longer sequence:", *histogram(stats.sequence_lengths)])


def histogram(lengths: Sequence[int]) -> list[str]:
    """One line per bin of equal width: its bounds, a bar, the number of pairs."""
    width = max(1, math.ceil((max(lengths) + 1) / BARS))
    counts = [0] * (max(lengths) // width + 1)
    for length in lengths:
        counts[length // width] += 1
    digits = len(str(width * len(counts)))
    lines = []
    for index, count in enumerate(counts):
        bar = "#" * math.ceil(BAR_WIDTH * count / max(counts))
        lines.append(f"{index * width:>{digits}} - {(index + 1) * width - 1:>{digits}} | {bar} {count}")
    return lines
