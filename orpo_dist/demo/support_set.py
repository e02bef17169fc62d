"""A synthetic customer-support preference set, deterministic for a seed.

A pair is a customer's message about one (product, issue) of an invented shop. The chosen reply follows the shop's
policy: it greets by name, restates the order, gives the concrete next step and does not blame anyone. The rejected
reply has one flaw of `FLAWS`: some are loud (curt, blaming), some subtle (right form, wrong order number or wrong
policy). Neither side is systematically longer. Held-out pairs use (product, issue) combinations and names that do not
occur in training pairs.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_dist.demo.texts import (
    BLAME,
    CLOSINGS,
    CURT,
    FIRST_TURNS,
    GREETINGS,
    HELD_OUT_NAMES,
    INVENTED,
    ISSUES,
    OFF_TOPIC,
    PADDING,
    PRODUCTS,
    RESTATEMENTS,
    SIGNATURES,
    SYSTEM,
    TONES,
    TRAINING_NAMES,
    VAGUE,
    Issue,
    Product,
)

TRAINING_PAIRS = 320
HELD_OUT_PAIRS = 64
HELD_OUT_COMBINATIONS = 48
WRONG_YEARS = {1: 3, 2: 4, 5: 1}
FLAWS = (
    "curt",
    "blame",
    "wrong_policy",
    "wrong_order",
    "wrong_name",
    "invented",
    "off_topic",
    "vague",
    "over_long",
    "other_issue",
)


@dataclass(frozen=True)
class SupportSet:
    """Rows with the columns prompt, chosen, rejected (message lists), and product, issue, name, flaw for inspection."""

    train: list[dict[str, Any]]
    test: list[dict[str, Any]]


@dataclass(frozen=True)
class _Case:
    """One customer's request, from which the message and both replies are written."""

    product: Product
    issue: Issue
    name: str
    order: str

    def fill(self, text: str) -> str:
        years = self.product.warranty_years
        fields = {"product": self.product.name, "order": self.order, "name": self.name}
        return text.format(**{**fields, "years": _years(years), "wrong_years": _years(WRONG_YEARS[years])})


def make_support_set(
    training_pairs: int = TRAINING_PAIRS, held_out_pairs: int = HELD_OUT_PAIRS, seed: int = 7
) -> SupportSet:
    """The whole set, a pure function of its arguments."""
    rng = random.Random(seed)
    combinations = [(product, issue) for product in PRODUCTS for issue in ISSUES]
    rng.shuffle(combinations)
    held_out, training = combinations[:HELD_OUT_COMBINATIONS], combinations[HELD_OUT_COMBINATIONS:]
    return SupportSet(
        train=_rows(training, TRAINING_NAMES, training_pairs, rng),
        test=_rows(held_out, HELD_OUT_NAMES, held_out_pairs, rng),
    )


def write_support_set(folder: Path, support_set: SupportSet) -> None:
    """Writes train.jsonl and test.jsonl into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", support_set.train), ("test", support_set.test)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def _rows(
    combinations: Sequence[tuple[Product, Issue]], names: Sequence[str], count: int, rng: random.Random
) -> list[dict[str, Any]]:
    rows = []
    for index in range(count):
        product, issue = combinations[index % len(combinations)]
        case = _Case(product, issue, rng.choice(names), f"HP-{rng.randrange(10_000, 100_000)}")
        flaw = FLAWS[index % len(FLAWS)]
        rows.append(
            {
                "prompt": _prompt(case, rng),
                "chosen": _assistant(_good_reply(case, rng)),
                "rejected": _assistant(_flawed_reply(case, flaw, names, rng)),
                "product": product.name,
                "issue": issue.key,
                "name": case.name,
                "flaw": flaw,
            }
        )
    rng.shuffle(rows)
    return rows


def _prompt(case: _Case, rng: random.Random) -> list[dict[str, str]]:
    complaint = rng.choice(TONES).format(text=case.fill(rng.choice(case.issue.complaints)))
    messages = [{"role": "system", "content": SYSTEM}]
    if rng.random() < 0.15:
        question, answer = rng.choice(FIRST_TURNS)
        messages += [{"role": "user", "content": question}, *_assistant(answer)]
    return [*messages, {"role": "user", "content": complaint + case.fill(rng.choice(SIGNATURES))}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _opening(case: _Case, rng: random.Random) -> str:
    greeting, restatement = case.fill(rng.choice(GREETINGS)), rng.choice(RESTATEMENTS)
    return f"{greeting} {restatement.format(restated=case.fill(case.issue.restated))}"


def _good_reply(case: _Case, rng: random.Random) -> str:
    return _joined(_opening(case, rng), case.fill(rng.choice(case.issue.steps)), rng.choice(CLOSINGS))


def _flawed_reply(case: _Case, flaw: str, names: Sequence[str], rng: random.Random) -> str:
    opening, step, closing = _opening(case, rng), case.fill(rng.choice(case.issue.steps)), rng.choice(CLOSINGS)
    other_product = rng.choice([product.name for product in PRODUCTS if product != case.product])
    if flaw == "curt":
        return _joined(rng.choice(("", case.fill(rng.choice(GREETINGS)))), case.fill(rng.choice(CURT)))
    if flaw == "blame":
        return _joined(opening, case.fill(rng.choice(BLAME)), rng.choice((step, closing)))
    if flaw == "wrong_policy":
        return _joined(opening, case.fill(rng.choice(case.issue.wrong_steps)), closing)
    if flaw == "wrong_order":
        return _good_reply(case, rng).replace(case.order, _other_order(case.order, rng))
    if flaw == "wrong_name":
        other_name = rng.choice([name for name in names if name != case.name])
        return _good_reply(case, rng).replace(case.name, other_name)
    if flaw == "invented":
        return _joined(opening, rng.choice(INVENTED).format(other_product=other_product), closing)
    if flaw == "off_topic":
        return _joined(opening, rng.choice(OFF_TOPIC).format(other_product=other_product))
    if flaw == "vague":
        return _joined(opening, rng.choice(VAGUE))
    if flaw == "over_long":
        return _joined(opening, *rng.sample(PADDING, 2), step)
    if flaw == "other_issue":
        other = rng.choice([issue for issue in ISSUES if issue != case.issue])
        return _joined(opening, case.fill(rng.choice(other.steps)), closing)
    raise ValueError(f"unknown flaw {flaw!r}")


def _other_order(order: str, rng: random.Random) -> str:
    place = rng.randrange(3, len(order))
    digit = rng.choice([digit for digit in "123456789" if digit != order[place]])
    return order[:place] + digit + order[place + 1 :]


def _years(count: int) -> str:
    return "1 year" if count == 1 else f"{count} years"


def _joined(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)
