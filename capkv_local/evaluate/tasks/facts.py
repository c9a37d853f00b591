"""Facts: invented sentences planted into a real text, and questions about them."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from capkv_local.errors import EvaluationError
from capkv_local.evaluate.tasks.base import (
    Case,
    Question,
    Split,
    Text,
    Tokenizer,
    at_least_one,
    rng,
)
from capkv_local.evaluate.tasks.cutting import OFF_BY, fit, nearest, windows
from capkv_local.evaluate.tasks.vocabulary import (
    VOCABULARY,
    Draw,
    Form,
    Hop,
    Vocabulary,
    one_of,
)

SINGLE_DEPTHS = (0.1, 0.35, 0.6, 0.85)
CONFUSABLE_DEPTHS = (0.15, 0.4, 0.65, 0.9)
CONFUSABLE_ASKED = 2
HOP_DEPTHS = (0.2, 0.5, 0.8)
JITTER = 0.05
LEAST_TEXT = 0.4  # share of the context that must be real text

# Asked of everything of one form, so that the wording does not give away what has no answer.
MAY_BE_ABSENT = ' If the text does not say, answer "not mentioned".'


@dataclass(frozen=True)
class _Fact:
    """A sentence to plant at about a depth, and the question about it if there is one."""

    sentence: str
    depth: float
    question: Question | None = None


def facts(
    split: Split,
    texts: Sequence[Text],
    tokenizer: Tokenizer,
    n_tokens: int,
    n_cases: int,
    seed: int,
) -> list[Case]:
    """Make cases of a real text with eleven planted sentences, and eight questions about them.

    Four questions ask for facts of different kinds, two for facts among others of the same form
    ("confusable"), one for what two sentences tell only together ("multi-hop"), and one for a
    fact of the confusable form that was not planted ("absent").

    Parameters, returns and errors: see :class:`~capkv_local.evaluate.tasks.base.Task`.
    """
    random_ = rng("facts", split, n_tokens, seed)
    cases: list[Case] = []
    for window in windows(texts, tokenizer, n_tokens, random_):
        if len(cases) == n_cases:
            break
        planted, absent = _invent(VOCABULARY[split], window.text, random_)
        # A sentence may get a token or two more for what stands before and behind it.
        cost = sum(len(tokenizer(f" {fact.sentence}")) + 2 for fact in planted)
        if cost > (1 - LEAST_TEXT) * n_tokens:
            continue
        text = fit(window.text, tokenizer, n_tokens - cost)
        context, questions = _plant(text, planted)
        if not context or len(tokenizer(context)) > n_tokens:
            continue
        cases.append(
            Case(task="facts", name=window.name, context=context, questions=(*questions, absent))
        )
    return at_least_one(cases, "facts", n_tokens, "the facts do not fit, or the texts are shorter")


# ---- which facts --------------------------------------------------------------------------------


class _Invention:
    """Draws names and values that neither the text nor another fact has."""

    def __init__(self, text: str, random_: random.Random) -> None:
        self._text = text.lower()
        self._random = random_

    def draw(self, draw: Draw) -> str:
        for _ in range(200):
            word = draw(self._random)
            if word.lower() not in self._text:
                self._text += f"\n{word.lower()}"
                return word
        raise EvaluationError(
            "a text already has every name that a planted fact could use; leave that text out"
        )


def _invent(
    vocabulary: Vocabulary, text: str, random_: random.Random
) -> tuple[list[_Fact], Question]:
    """Draw the facts of a case, and the question that has no answer."""
    invention = _Invention(text, random_)
    planted = []
    forms = random_.sample(vocabulary.singles, len(SINGLE_DEPTHS))
    for i, (form, depth) in enumerate(zip(forms, SINGLE_DEPTHS, strict=True), 1):
        subject = invention.draw(one_of(*form.subjects))
        value = invention.draw(form.value)
        question = _question(form, subject, value, f"single-{i}", "single")
        planted.append(_Fact(f"{question.lead} {value}{form.tail}", depth, question))

    form = random_.choice(vocabulary.confusables)
    *present, missing = random_.sample(form.subjects, len(CONFUSABLE_DEPTHS) + 1)
    asked = random_.sample(present, CONFUSABLE_ASKED)
    for i, (subject, depth) in enumerate(zip(present, CONFUSABLE_DEPTHS, strict=True), 1):
        value = invention.draw(form.value)
        question = _question(form, subject, value, f"confusable-{i}", "confusable")
        sentence = f"{question.lead} {value}{form.tail}"
        planted.append(_Fact(sentence, depth, question if subject in asked else None))
    absent = _question(form, missing, "not mentioned", "absent", "absent")

    planted += _hop(random_.choice(vocabulary.hops), invention, random_)
    planted = [replace(f, depth=f.depth + random_.uniform(-JITTER, JITTER)) for f in planted]
    return planted, replace(absent, depth=None)


def _question(form: Form, subject: str, value: str, id_: str, kind: str) -> Question:
    hint = MAY_BE_ABSENT if kind in ("confusable", "absent") else ""
    return Question(
        id=id_,
        kind=kind,
        prompt=form.question.format(a=subject) + hint,
        lead=form.lead.format(a=subject),
        answer=f" {value}",
        depth=None,
    )


def _hop(hop: Hop, invention: _Invention, random_: random.Random) -> list[_Fact]:
    """Draw a fact in two sentences, and a third that answers for something else.

    Without the third, the one sentence with a value of this kind would do. The question's depth
    will be that of the sentence with the answer.
    """
    subject = invention.draw(one_of(*hop.subjects))
    link = invention.draw(one_of(*hop.links))
    value = invention.draw(hop.value)
    question = Question(
        id="multi-hop",
        kind="multi-hop",
        prompt=hop.question.format(a=subject),
        lead=hop.lead.format(a=subject),
        answer=f" {value}",
        depth=None,
    )
    other = hop.second.format(b=invention.draw(one_of(*hop.links)), v=invention.draw(hop.value))
    first, second, third = random_.sample(HOP_DEPTHS, 3)
    return [
        _Fact(hop.first.format(a=subject, b=link), first),
        _Fact(hop.second.format(b=link, v=value), second, question),
        _Fact(other, third),
    ]


# ---- where they stand ---------------------------------------------------------------------------

# The end of a sentence in running text; abbreviations, code, tables and headings do not match.
_SENTENCE_END = re.compile(r"(?:[a-z]{3}|[`)*\]])[.!?][\"”]?(?=\n|[ ]+[A-Z\"“])")
_RUNNING = re.compile(r"[A-Za-z\"“`:*(].{30}")


def _plant(text: str, planted: Sequence[_Fact]) -> tuple[str, list[Question]]:
    """Put sentences into a text, each behind the sentence that ends nearest to its depth.

    Returns
    -------
    context : str
        Empty if sentences end too far from where they should.
    questions : list of Question
        In the order in which their answers stand in the context, with depths.
    """
    free = _places(text, len(planted))
    at: list[tuple[int, _Fact]] = []
    for fact in planted:
        place = nearest(free, fact.depth, len(text))
        if abs(place - fact.depth * len(text)) > OFF_BY * len(text):
            return "", []
        free.remove(place)
        at.append((place, fact))
    at.sort(key=lambda pair: pair[0])
    context, done = "", 0
    begins: list[tuple[int, Question]] = []
    for place, fact in at:
        context += text[done:place]
        done = place
        if context and not context[-1].isspace():
            context += " "
        if fact.question is not None:
            begins.append((len(context), fact.question))
        context += fact.sentence
    context += text[done:]
    return context, [replace(question, depth=begin / len(context)) for begin, question in begins]


def _places(text: str, n: int) -> list[int]:
    """Return at least `n` places to plant a sentence: ends of sentences, else of lines or words.

    A text with few sentences has the same places more than once.
    """
    places = []
    for match in _SENTENCE_END.finditer(text):
        line = text.rfind("\n", 0, match.start()) + 1
        if _RUNNING.match(text, line):
            places.append(match.end())
    for pattern in (r"(?<=\S)(?=\n)", r"(?<=\S)(?=\s)"):
        if 3 * len(places) < n:
            places = [match.start() for match in re.finditer(pattern, text)]
    places = places or [len(text)]
    return places * (-(-n // len(places)))
