"""Lookup: a long list of keys and values, and questions for values."""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Iterator, Sequence

from capkv_local.evaluate.tasks.base import (
    SPLITS,
    Case,
    Question,
    Split,
    Text,
    Tokenizer,
    at_least_one,
    rng,
)
from capkv_local.evaluate.tasks.cutting import nearest

DEPTHS = (0.05, 0.23, 0.41, 0.59, 0.77, 0.95)
JITTER = 0.04

_ADJECTIVES: dict[Split, str] = {
    "tuning": """amber brave calm dusty eager faint gentle hollow icy jolly keen lively mellow noble
        odd plain quiet rapid silver tidy urban vivid warm young zesty""",
    "report": """ancient bold clever damp early fancy golden humble ivory jagged kind loud misty
        narrow olive proud quick rusty steady tall useful velvet wild yellow zealous""",
}
_NOUNS: dict[Split, str] = {
    "tuning": """anchor basket candle dragon engine falcon garden hammer island jacket kettle
        ladder mirror needle orchard pepper quarry ribbon saddle temple umbrella valley window""",
    "report": """arrow bridge castle desert emerald forest guitar harbor insect jungle kitten
        lantern meadow notebook onion pillow quiver rocket shovel tunnel uniform violin wagon""",
}
_FIRST_NAMES: dict[Split, str] = {
    "tuning": """Adam Betty Carl Diana Edgar Fiona George Hannah Isaac Julia Kevin Laura Michael
        Nora Oscar Paula Robert Sylvia Thomas Ursula Victor Wendy""",
    "report": """Alan Brenda Cedric Donna Eric Frances Gerald Helen Ivan Janet Keith Linda Martin
        Nancy Owen Phyllis Ronald Sandra Trevor Una Vincent Winifred""",
}
_LAST_NAMES: dict[Split, str] = {
    "tuning": """Archer Barton Clayton Dalton Ellis Foster Gibson Harper Ingram Jensen Keller
        Lawson Mercer Norton Parker Ramsey Sutton Turner Vaughn Weaver""",
    "report": """Atkins Benson Carver Dixon Emery Fletcher Graves Hopkins Irwin Jarvis Kendall
        Lowell Marsh Newell Palmer Reeves Spencer Tucker Wallis Yates""",
}


def lookup(
    split: Split,
    texts: Sequence[Text],
    tokenizer: Tokenizer,
    n_tokens: int,
    n_cases: int,
    seed: int,
) -> list[Case]:
    """Make cases of a generated list with a key and a number on each line, and ask for six of them.

    Every other list has names of persons as keys, the others have two words and a number. Keys
    and numbers are unique in their list. The texts are not used.

    Parameters, returns and errors: see :class:`~capkv_local.evaluate.tasks.base.Task`.
    """
    random_ = rng("lookup", split, n_tokens, seed)
    cases = []
    for i in range(n_cases):
        style, prompt, lead, keys = (
            ("codes", "What is the value of {}?", "The value of {} is", _codes),
            ("names", "Which number does {} have?", "The number of {} is", _names),
        )[i % 2]
        lines = _lines(keys(split), split, n_tokens, random_)
        context, table = _fill(lines, tokenizer, n_tokens)
        if len(table) < len(DEPTHS):
            break
        questions = []
        for j, depth in enumerate(DEPTHS, 1):
            share = depth + random_.uniform(-JITTER, JITTER)
            begin = nearest(list(table), share, len(context))
            key, value = table.pop(begin)
            questions.append(
                Question(
                    id=f"lookup-{j}",
                    kind="lookup",
                    prompt=prompt.format(key),
                    lead=lead.format(key),
                    answer=f" {value}",
                    depth=begin / len(context),
                )
            )
        cases.append(Case("lookup", f"{style}-{i}", context, tuple(questions)))
    return at_least_one(cases, "lookup", n_tokens, "six lines do not fit")


def _codes(split: Split) -> list[str]:
    """Return all keys like ``amber-falcon-27``."""
    words = itertools.product(_ADJECTIVES[split].split(), _NOUNS[split].split(), range(10, 100))
    return [f"{adjective}-{noun}-{number}" for adjective, noun, number in words]


def _names(split: Split) -> list[str]:
    """Return all keys like ``Nora K. Harper``."""
    words = itertools.product(
        _FIRST_NAMES[split].split(), string.ascii_uppercase, _LAST_NAMES[split].split()
    )
    return [f"{first} {initial}. {last}" for first, initial, last in words]


def _lines(
    keys: list[str], split: Split, most: int, random_: random.Random
) -> Iterator[tuple[str, str]]:
    """Draw keys with numbers, odd ones for tuning and even ones for report, none twice."""
    numbers = range(1000 + (split == SPLITS[0]), 100_000, 2)
    n = min(len(keys), len(numbers), most)
    return zip(random_.sample(keys, n), map(str, random_.sample(numbers, n)), strict=True)


def _fill(
    lines: Iterator[tuple[str, str]], tokenizer: Tokenizer, n_tokens: int
) -> tuple[str, dict[int, tuple[str, str]]]:
    """Write as many lines as fit; return them, and where each begins."""
    left, written = n_tokens, []
    for key, value in lines:
        left -= len(tokenizer(f"{key}: {value}\n"))
        if left < 0:
            break
        written.append((key, value))
    while True:
        context = "".join(f"{key}: {value}\n" for key, value in written)
        # A token can span two lines, so that together they have fewer or (rarely) more.
        if len(tokenizer(context)) <= n_tokens:
            break
        written.pop()
    table, begin = {}, 0
    for key, value in written:
        table[begin] = (key, value)
        begin += len(f"{key}: {value}\n")
    return context, table
