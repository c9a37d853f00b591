"""Plant facts in a long text, ask for each, and see whether the first citation is its passage.

Questions that the text does not answer are asked as well: of these every citation is wrong. The
tuning set chose how evidence is weighed and what stands out; the report set did not.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import llama_cpp

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from capkv_local.chat import DocumentChat
from capkv_local.citations import Evidence, Passage, rank
from capkv_local.documents import Document
from capkv_local.models import default_model

TEXT = Path(__file__).resolve().parents[2] / "tests" / "data" / "licence.txt"


@dataclass(frozen=True)
class Fact:
    sentence: str
    question: str
    answer: str


@dataclass(frozen=True)
class QuestionSet:
    """Facts to plant in a part of the text, and questions that it has no answer to."""

    characters: slice
    facts: tuple[Fact, ...]
    absent: tuple[str, ...]

    def text(self) -> str:
        """The part of the text with each fact as a paragraph, at even distances."""
        text = TEXT.read_text(encoding="utf-8")[self.characters]
        out, start = [], 0
        for i, fact in enumerate(self.facts):
            end = text.rindex("\n\n", 0, int((i + 0.5) / len(self.facts) * len(text)))
            out += [text[start:end], "\n\n", fact.sentence]
            start = end
        return "".join([*out, text[start:]])


SETS = {
    "tuning": QuestionSet(
        slice(0, 12500),
        (
            Fact(
                "The access code of the harbour gate is 48213.",
                "What is the access code of the harbour gate?",
                "48213",
            ),
            Fact(
                "The captain of the ferry Alma is Ingrid Solberg.",
                "Who is the captain of the ferry Alma?",
                "Solberg",
            ),
            Fact(
                "The inventory number of the blue piano is 70952.",
                "What is the inventory number of the blue piano?",
                "70952",
            ),
            Fact(
                "The baker of Elmford is called Tobias Crane.",
                "What is the baker of Elmford called?",
                "Crane",
            ),
            Fact(
                "The telephone extension of the night nurse is 31687.",
                "What is the telephone extension of the night nurse?",
                "31687",
            ),
            Fact(
                "The lighthouse of Norrvik was built in 1874.",
                "When was the lighthouse of Norrvik built?",
                "1874",
            ),
            Fact(
                "The favourite drink of Professor Lindqvist is ginger tea.",
                "What is the favourite drink of Professor Lindqvist?",
                "ginger",
            ),
            Fact(
                "The red bicycle of Marta weighs 14 kilograms.",
                "How much does the red bicycle of Marta weigh?",
                "14",
            ),
            Fact(
                "The password of the garden shed is mulberry.",
                "What is the password of the garden shed?",
                "mulberry",
            ),
            Fact(
                "The train to Ostrava leaves from platform 9.",
                "From which platform does the train to Ostrava leave?",
                "9",
            ),
        ),
        (
            "Who painted the ceiling of the theatre?",
            "What is the room number of the dentist?",
            "When was the bridge of Halden opened?",
            "What is the name of the mayor's dog?",
            "How many seats has the cinema of Torvik?",
            "What is the capital of France?",
            "What colour is the sky?",
            "Say hello.",
            "How many days has a week?",
            "What is the serial number of the green tractor?",
        ),
    ),
    "report": QuestionSet(
        slice(15000, 27500),
        (
            Fact(
                "The combination of the museum safe is 60347.",
                "What is the combination of the museum safe?",
                "60347",
            ),
            Fact(
                "The owner of the windmill is Henrik Dahl.",
                "Who is the owner of the windmill?",
                "Dahl",
            ),
            Fact(
                "The licence plate of the yellow van is 52918.",
                "What is the licence plate of the yellow van?",
                "52918",
            ),
            Fact(
                "The teacher of the violin class is called Paula Reyes.",
                "What is the teacher of the violin class called?",
                "Reyes",
            ),
            Fact(
                "The customer number of the flower shop is 27486.",
                "What is the customer number of the flower shop?",
                "27486",
            ),
            Fact(
                "The chapel of Bergholt was finished in 1693.",
                "When was the chapel of Bergholt finished?",
                "1693",
            ),
            Fact(
                "The favourite fruit of Captain Moreau is the quince.",
                "What is the favourite fruit of Captain Moreau?",
                "quince",
            ),
            Fact(
                "The tallest pine of Varna is 38 metres high.",
                "How high is the tallest pine of Varna?",
                "38",
            ),
            Fact(
                "The secret word of the chess club is lantern.",
                "What is the secret word of the chess club?",
                "lantern",
            ),
            Fact(
                "The bus to Kilmore stops at gate 17.",
                "At which gate does the bus to Kilmore stop?",
                "17",
            ),
        ),
        (
            "Who wrote the song about the river?",
            "What is the postcode of the hospital?",
            "When was the tunnel of Arlen closed?",
            "What is the name of the cook's daughter?",
            "How many rooms has the hotel in Bray?",
            "What is the capital of Italy?",
            "What colour is grass?",
            "Tell me a joke.",
            "How many legs has a spider?",
            "What is the part number of the silver clock?",
        ),
    ),
}


class WatchedChat(DocumentChat):
    """Keeps all passages of the last answer, those that do not stand out as well."""

    passages: list[Passage]

    def _note_citations(self, evidence: Evidence) -> None:
        self.passages = rank(evidence, self._sources)
        super()._note_citations(evidence)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-citations", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--set", choices=SETS, default="report", help="of questions")
    parser.add_argument("--budget", nargs="+", default=["1.0", "0.25"], help="share of the text")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    for budget in map(float, args.budget):
        measure(args, SETS[args.set], budget)


def measure(args: argparse.Namespace, questions: QuestionSet, budget: float) -> None:
    text = questions.text()
    model = args.model or default_model()
    n_tokens = len(
        llama_cpp.Llama(str(model), vocab_only=True, verbose=False).tokenize(text.encode())
    )
    cells = n_tokens + 1024 if budget >= 1 else int(budget * n_tokens)
    chat = WatchedChat(model=model, kv_budget=cells, n_ctx=n_tokens + 1024, n_threads=args.threads)
    chat.ingest([Document(TEXT.name, text, "text")])
    chat.set_keep_turns(False)
    chat.set_cite(True)
    rows = []
    for fact in questions.facts:
        answer = "".join(chat.ask(fact.question, max_tokens=40)).strip()
        line = text[: text.index(fact.sentence)].count("\n") + 1
        right = [p.source.place.first <= line <= p.source.place.last for p in chat.passages]
        rows.append((fact.answer.lower() in answer.lower(), right, chat.citations()))
        show(fact.question, answer, chat, "+" if right[0] else "-")
    n_named = 0
    for question in questions.absent:
        answer = "".join(chat.ask(question, max_tokens=40)).strip()
        n_named += bool(chat.citations())
        show(question, answer, chat, "0")
    chat.close()
    for name, some in (("all", rows), ("answered", [row for row in rows if row[0]])):
        first, among = (sum(any(right[:n]) for _, right, _ in some) for n in (1, 3))
        print(
            f"budget {budget:.0%}, {name}: of {len(some)} facts the right passage is first in "
            f"{first}, among three in {among}; "
            f"named first {sum(bool(c) and r[0] for _, r, c in some)}, "
            f"another named first {sum(bool(c) and not r[0] for _, r, c in some)}, "
            f"none {sum(not c for _, _, c in some)}"
        )
    print(f"budget {budget:.0%}: {n_named} of {len(questions.absent)} absent are cited", flush=True)


def show(question: str, answer: str, chat: WatchedChat, mark: str) -> None:
    shares = " ".join(f"{passage.share:.3f}" for passage in chat.passages[:3])
    print(f"{mark} {shares} {question} {answer!r} {[str(c) for c in chat.citations()]}")


if __name__ == "__main__":
    main()
