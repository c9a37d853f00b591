"""Question answering: real questions about settings, from the reference that documents them.

Reference pages state defaults in a fixed form, a heading with the name of a setting and below it
``Default: ...``, so questions and answers can be read off without anyone's judgement.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from capkv_local.evaluate.tasks.base import (
    Case,
    Question,
    Split,
    Text,
    Tokenizer,
    at_least_one,
    rng,
)
from capkv_local.evaluate.tasks.cutting import fit

QUESTIONS = (4, 6)  # least and most that a case asks

_SETTING = re.compile(
    r"^``(?P<name>\w+_\w+)``\n(?P<rule>[~^=\-\"'+])(?P=rule){2,}\n"
    r"(?:.*\n){0,3}?(?P<default>Default: (?P<text>.+))$",
    re.M,
)
_DEFAULT = re.compile(
    r"(?:``(?P<literal>[^`]+)``|:const:`(?P<const>[^`]+)`|(?P<plain>[\w.]*\w(?: seconds)?))"
    r"(?:\.|,? \(.*\)\.?|,? (?:by default|since) .*)?"
)
_VALUE = re.compile(r"[\w./:@+-]+(?: [\w./:@+-]+){0,3}")
_SWITCHES = {"True", "False", "Enabled", "Disabled"}  # half right by guessing, so only as a filler
_NOTHING = {"None", "Inf"}


@dataclass(frozen=True)
class _Setting:
    name: str
    answer: str
    section: int  # where its heading begins
    evidence: int  # where its default begins
    end: int


def qa(
    split: Split,
    texts: Sequence[Text],
    tokenizer: Tokenizer,
    n_tokens: int,
    n_cases: int,
    seed: int,
) -> list[Case]:
    """Make cases of consecutive sections of a reference, and ask for defaults of settings.

    Contexts may overlap, but no setting is asked for twice, and no two questions of a case have
    the same answer.

    Parameters, returns and errors: see :class:`~capkv_local.evaluate.tasks.base.Task`.
    """
    random_ = rng("qa", split, n_tokens, seed)
    cases: list[Case] = []
    for text in random_.sample(list(texts), len(texts)):
        for case in _cases(text, tokenizer, n_tokens, random_):
            if len(cases) == n_cases:
                break
            cases.append(case)
    cause = "no text is that long and documents four settings in the form 'Default: ...'"
    return at_least_one(cases, "qa", n_tokens, cause)


def _cases(
    text: Text, tokenizer: Tokenizer, n_tokens: int, random_: random.Random
) -> Iterator[Case]:
    settings = _settings(text.text)
    asked: set[str] = set()
    for begin in random_.sample([s.section for s in settings], len(settings)):
        context = fit(text.text[begin:], tokenizer, n_tokens)
        end = begin + len(context)
        if end == len(text.text):
            continue  # the end of the page: fewer tokens than were asked for
        inside = [s for s in settings if begin <= s.section and s.end <= end]
        chosen = _choose([s for s in inside if s.name not in asked], random_)
        if len(chosen) < QUESTIONS[0]:
            continue
        asked.update(setting.name for setting in chosen)
        questions = tuple(
            Question(
                id=setting.name,
                kind="qa",
                prompt=f"What is the default of {setting.name}? Leave out quotation marks.",
                lead=f"The default of {setting.name} is",
                answer=f" {setting.answer}",
                depth=(setting.evidence - begin) / len(context),
            )
            for setting in chosen
        )
        yield Case("qa", f"{text.name}@{begin}", context, questions)


def _settings(text: str) -> list[_Setting]:
    """Find the settings whose default is a few words or a number; names must be unambiguous."""
    found = []
    for match in _SETTING.finditer(text):
        name = match["name"]
        answer = _value(match["text"])
        if answer and len(re.findall(rf"^``{name}``$", text, re.M)) == 1:
            found.append(_Setting(name, answer, match.start(), match.start("default"), match.end()))
    return found


def _value(default: str) -> str:
    """Return the value that a default states, without marks around it; empty if it states none."""
    match = _DEFAULT.fullmatch(default.strip())
    if match is None:
        return ""
    value = (match["literal"] or match["const"] or match["plain"]).strip("\"'")
    return value if _VALUE.fullmatch(value) and value not in _NOTHING else ""


def _choose(settings: Sequence[_Setting], random_: random.Random) -> list[_Setting]:
    """Draw settings with different answers, in the order of the text; switches only if need be."""
    drawn: list[_Setting] = []
    shuffled = random_.sample(list(settings), len(settings))
    for setting in sorted(shuffled, key=lambda setting: setting.answer in _SWITCHES):
        wanted = QUESTIONS[0] if setting.answer in _SWITCHES else QUESTIONS[1]
        if len(drawn) < wanted and setting.answer not in {other.answer for other in drawn}:
            drawn.append(setting)
    return sorted(drawn, key=lambda setting: setting.section)
