"""The facts of the tiny world: what is true in it, which of it SFT never asks, and names that mean nothing."""

import functools
import random
from dataclasses import dataclass

from nanochat import tinyworld_tables as tables

SUBJECT_KINDS = {"capital": "country", "continent": "country", "language": "country", "currency": "country"}
SUBJECT_KINDS |= {"symbol": "element", "class": "animal", "young": "animal", "sound": "animal"}


@dataclass(frozen=True)
class Fact:
    """A true statement: the `relation` of `subject` is `answer`."""

    relation: str
    subject: str
    answer: str


def _rows(table: str) -> list[list[str]]:
    return [row.split() for line in table.strip().splitlines() for row in line.split(",")]


@functools.cache
def facts() -> tuple[Fact, ...]:
    """All facts, in a stable order, relation by relation."""
    countries = [row.strip().split(",") for line in tables.COUNTRIES.strip().splitlines() for row in line.split(";")]
    animals, months, days = _rows(tables.ANIMALS), tables.MONTHS.split(), tables.DAYS.split()
    columns = {name: [(row[0], row[k]) for row in countries] for k, name in enumerate(SUBJECT_KINDS, 1) if k < 5}
    columns["symbol"] = _rows(tables.ELEMENTS)
    columns |= {name: [(row[0], row[k]) for row in animals] for k, name in enumerate(("class", "young", "sound"), 1)}
    for name, cycle in (("month", months), ("day", days)):
        columns[f"{name}_after"] = [(cycle[k - 1], cycle[k]) for k in range(len(cycle))]
        columns[f"{name}_before"] = [(cycle[k], cycle[k - 1]) for k in range(len(cycle))]
    columns["month_number"] = [(month, str(number)) for number, month in enumerate(months, 1)]
    columns |= {"opposite": _rows(tables.OPPOSITES), "plural": _rows(tables.PLURALS), "past": _rows(tables.PASTS)}
    columns["color"] = [(" ".join(row[:-1]), row[-1]) for row in _rows(tables.COLORS)]
    return tuple(
        Fact(relation, subject, answer)
        for relation, pairs in columns.items()
        for subject, answer in pairs
        if answer != "-"
    )


@functools.cache
def by_relation() -> dict[str, tuple[Fact, ...]]:
    """The facts of each relation."""
    names = dict.fromkeys(fact.relation for fact in facts())
    return {name: tuple(fact for fact in facts() if fact.relation == name) for name in names}


@functools.cache
def answers(relation: str) -> tuple[str, ...]:
    """The different answers of a relation, in the order of its facts."""
    return tuple(dict.fromkeys(fact.answer for fact in by_relation()[relation]))


@functools.cache
def _never_asked() -> frozenset[Fact]:
    held = []
    for relation, members in by_relation().items():
        held += random.Random(f"never asked {relation}").sample(members, round(len(members) / 5))
    return frozenset(held)


def never_asked(fact: Fact) -> bool:
    """True for the one fact in five of each relation that SFT never asks in any form."""
    return fact in _never_asked()


@functools.cache
def _true_names() -> frozenset[str]:
    return frozenset(fact.subject.lower() for fact in facts())


def invented_name(kind: str, rng: random.Random, test: bool = False) -> str:
    """A country, element or animal that does not exist; names for tests begin with syllables of their own."""
    while True:
        first = rng.choice((tables.INVENTED_FIRST_TEST if test else tables.INVENTED_FIRST).split())
        middle = rng.sample(tables.INVENTED_MIDDLE.split(), rng.choice((1, 1, 2)))
        name = first + "".join(middle) + rng.choice(tables.INVENTED_LAST[kind].split())
        name = name if kind == "country" else name.lower()
        if name.lower() not in _true_names():
            return name


def invented_fact(rng: random.Random, test: bool = False) -> Fact:
    """A fact about an invented name: it has no answer."""
    relation = rng.choice(list(SUBJECT_KINDS))
    return Fact(relation, invented_name(SUBJECT_KINDS[relation], rng, test), "?")


def choices(fact: Fact, rng: random.Random, count: int = 4) -> list[str]:
    """The right answer at a random place among wrong ones of the same relation."""
    wrong = [other for other in answers(fact.relation) if other not in (fact.answer, fact.subject)]
    options = rng.sample(wrong, min(count - 1, len(wrong)))
    options.insert(rng.randint(0, len(options)), fact.answer)
    return options
