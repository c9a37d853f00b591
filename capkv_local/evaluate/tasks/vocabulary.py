"""Invented facts: the wordings, names and values of the two splits, which share none of them.

All names of persons and places are made up, so that a model cannot know an answer beforehand.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from capkv_local.evaluate.tasks.base import SPLITS, Split

Draw = Callable[[random.Random], str]
"""Draws a value."""


def number(split: Split, low: int, high: int) -> Draw:
    """Draw a number in ``[low, high)``: odd for tuning, even for report."""
    first = low + (low + 1 + SPLITS.index(split)) % 2
    return lambda random_: str(random_.randrange(first, high, 2))


def date(*months: str) -> Draw:
    """Draw a day, e.g. ``"14 March"``."""
    return lambda random_: f"{random_.randint(1, 28)} {random_.choice(months)}"


def one_of(*words: str) -> Draw:
    """Draw one of a few words."""
    return lambda random_: random_.choice(words)


@dataclass(frozen=True)
class Form:
    """One kind of fact: ``{a}`` is what it is about, the value follows the lead.

    The sentence that states the fact is ``lead + " " + value + tail``.
    """

    lead: str
    question: str
    subjects: tuple[str, ...]
    value: Draw
    tail: str = "."


@dataclass(frozen=True)
class Hop:
    """A fact in two sentences: ``{a}`` leads to ``{b}``, and ``{b}`` to the value ``{v}``."""

    first: str
    second: str
    question: str
    lead: str
    subjects: tuple[str, ...]
    links: tuple[str, ...]
    value: Draw


@dataclass(frozen=True)
class Vocabulary:
    """All that the facts of a split are made of."""

    singles: tuple[Form, ...]
    confusables: tuple[Form, ...]
    hops: tuple[Hop, ...]


VOCABULARY: dict[Split, Vocabulary] = {
    "tuning": Vocabulary(
        singles=(
            Form(
                "The locker number of {a} is",
                "What is the locker number of {a}?",
                ("Agnes Whitlock", "Bruno Castell", "Clara Fenwick", "Dorian Hale"),
                number("tuning", 10000, 100000),
            ),
            Form(
                "The lighthouse of {a} is tended by Captain",
                "Which captain tends the lighthouse of {a}?",
                ("Skarrow Island", "Pellin Rock", "Brannock Point", "Ostrey Sound"),
                one_of("Holloway", "Dunstable", "Merriman", "Treadwell", "Ashgrove", "Pomfret"),
            ),
            Form(
                "The harvest fair in {a} opens on",
                "On which day does the harvest fair in {a} open?",
                ("Aldermere", "Brackwater", "Cobhollow", "Dunsel"),
                date("January", "February", "March", "April", "May", "June"),
            ),
            Form(
                "The garden gate of {a} is painted",
                "In which colour is the garden gate of {a} painted?",
                ("Tarnley Lodge", "Withy Cottage", "Crowfold Manor", "Larkrise Farm"),
                one_of("turquoise", "maroon", "beige", "crimson", "lilac", "ochre", "mauve"),
            ),
            Form(
                "A ticket for the {a} costs",
                "How many crowns does a ticket for the {a} cost?",
                ("puppet theatre", "cable railway", "glass museum", "river ferry"),
                number("tuning", 100, 1000),
                " crowns.",
            ),
            Form(
                "The mascot of the {a} is a",
                "Which animal is the mascot of the {a}?",
                ("Elmsworth Rovers", "Farrowby Rowers", "Gantry Cyclists", "Tolbury Wanderers"),
                one_of("badger", "heron", "lynx", "walrus", "porcupine", "tortoise", "weasel"),
            ),
            Form(
                "The password of the {a} is",
                "What is the password of the {a}?",
                ("seed archive", "tide station", "map cellar", "plaster workshop"),
                one_of("marzipan", "thimble", "quartz", "tambourine", "parsnip", "haystack"),
            ),
            Form(
                "The stone bridge at {a} was finished in",
                "In which year was the stone bridge at {a} finished?",
                ("Wexcombe", "Yarmley", "Ottersford", "Stavenby"),
                number("tuning", 1610, 1900),
            ),
        ),
        confusables=(
            Form(
                "The access code of the {a} cabin is",
                "What is the access code of the {a} cabin?",
                ("red", "blue", "green", "yellow", "white", "brown", "purple"),
                number("tuning", 10000, 100000),
            ),
            Form(
                "The extension of the {a} office is",
                "What is the telephone extension of the {a} office?",
                ("payroll", "harbour", "forestry", "customs", "census", "passport", "lottery"),
                number("tuning", 1000, 10000),
            ),
        ),
        hops=(
            Hop(
                "{a} rents the room above the {b}.",
                "The {b} is in {v}.",
                "In which street does {a} rent a room?",
                "The street in which {a} rents a room is",
                ("Edith Marlow", "Felix Osgood", "Greta Lindqvist", "Hugo Varley"),
                ("clock shop", "lamp shop", "chess shop", "candle shop"),
                one_of("Tallow Street", "Cooper Street", "Weaver Street", "Lantern Street"),
            ),
            Hop(
                "The parcel for {a} was put into the {b}.",
                "The {b} was taken to {v}.",
                "To which town was the parcel for {a} taken?",
                "The parcel for {a} was taken to",
                ("Irene Sandoval", "Jonas Petrie", "Katrin Voss", "Leopold Ames"),
                ("wicker basket", "tin trunk", "canvas sack", "cedar chest"),
                one_of("Rushmere", "Haverstock", "Pembleton", "Quarley", "Thackham"),
            ),
        ),
    ),
    "report": Vocabulary(
        singles=(
            Form(
                "The library card of {a} has the number",
                "Which number does the library card of {a} have?",
                ("Martha Quill", "Nestor Brandt", "Olga Prentiss", "Piers Langdon"),
                number("report", 10000, 100000),
            ),
            Form(
                "The bakery in {a} belongs to Mrs",
                "To whom does the bakery in {a} belong?",
                ("Hexley", "Ickford", "Jarrowdale", "Kelmouth"),
                one_of("Pettigrew", "Hathersage", "Sorley", "Winterbourne", "Kettle", "Rookwood"),
            ),
            Form(
                "The next concert of the {a} choir takes place on",
                "On which day does the next concert of the {a} choir take place?",
                ("Lowick", "Marsden Vale", "Norhurst", "Ombersley"),
                date("July", "August", "September", "October", "November", "December"),
            ),
            Form(
                "The sails of the ship {a} are",
                "Which colour do the sails of the ship {a} have?",
                ("Grey Petrel", "Silver Wake", "Northern Maid", "Merry Gale"),
                one_of("scarlet", "indigo", "teal", "magenta", "khaki", "vermilion", "cobalt"),
            ),
            Form(
                "A night in the {a} costs",
                "How many florins does a night in the {a} cost?",
                ("Plough Inn", "Hotel Bellamy", "Miller's Hostel", "Swan Guesthouse"),
                number("report", 100, 1000),
                " florins.",
            ),
            Form(
                "The postmaster of {a} keeps a tame",
                "Which animal does the postmaster of {a} keep?",
                ("Sedgeworth", "Upper Tilling", "Vantley", "Ravensby"),
                one_of("otter", "raccoon", "magpie", "ferret", "jackdaw", "hedgehog", "gecko"),
            ),
            Form(
                "The secret word of the {a} is",
                "What is the secret word of the {a}?",
                ("stamp collectors", "bell ringers", "kite makers", "night gardeners"),
                one_of("cinnamon", "trombone", "pumice", "walnut", "saffron", "corkscrew"),
            ),
            Form(
                "The old well behind {a} was dug in",
                "In which year was the old well behind {a} dug?",
                ("Caldmoor Abbey", "Priest Hill", "Thornley Barn", "Ferncliff House"),
                number("report", 1610, 1900),
            ),
        ),
        confusables=(
            Form(
                "The combination of the {a} safe is",
                "What is the combination of the {a} safe?",
                ("oak", "iron", "copper", "brass", "marble", "leather", "bamboo"),
                number("report", 10000, 100000),
            ),
            Form(
                "The catalogue entry of the {a} vase is",
                "Which catalogue entry does the {a} vase have?",
                ("Persian", "Danish", "Roman", "Korean", "Spanish", "Mexican", "Turkish"),
                number("report", 1000, 10000),
            ),
        ),
        hops=(
            Hop(
                "{a} is a member of the {b}.",
                "The {b} meets in the {v}.",
                "In which building does the club of {a} meet?",
                "The club of {a} meets in the",
                ("Ruth Calder", "Simon Abbott", "Tilda Norgaard", "Ulric Mayhew"),
                ("Falcon Circle", "Compass Union", "Anchor League", "Hawthorn Guild"),
                one_of("tram depot", "brewery", "boathouse", "sawmill", "orangery"),
            ),
            Hop(
                "The violin of {a} was made in the {b}.",
                "The owner of the {b} is {v}.",
                "Who owns the workshop in which the violin of {a} was made?",
                "The owner of the workshop in which the violin of {a} was made is",
                ("Vera Stroud", "Walter Pike", "Yvonne Lacey", "Zachary Thorne"),
                ("Linden workshop", "Juniper workshop", "Alder workshop", "Rowan workshop"),
                one_of("Mr Babcock", "Mr Dunwoody", "Mr Fairweather", "Mr Greenhalgh"),
            ),
        ),
    ),
}
