"""The tables in adapters/data as typed values. All that the adapters learn or are measured on is there."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True)
class Topic:
    """A table of one kind of thing with one attribute."""

    plural: str  # "metals"
    singular: str  # "metal"
    values: str  # "their chemical symbols"
    key: str  # "symbol"
    pirate: str  # "the sign for {} be {}"
    question: str | None  # "What is the chemical symbol of {}?"
    entries: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Country:
    name: str
    capital: str
    continent: str


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Material for measuring: none of it may be in the training data."""

    words: frozenset[str]
    lists: tuple[tuple[str, str], ...]  # (topic, values asked for)
    list_phrasings: tuple[str, ...]
    countries: tuple[tuple[str, str], ...]  # (country, capital)
    country_phrasings: tuple[str, ...]
    free: tuple[str, ...]


@cache
def topics() -> tuple[Topic, ...]:
    return tuple(_topic(header, lines) for header, lines in _sections("lists.txt"))


@cache
def countries() -> tuple[Country, ...]:
    lines = _lines("countries.txt")
    pairs = (line.split(" = ") for line in lines)
    return tuple(Country(name, *rest.split(", ")) for name, rest in pairs)


@cache
def questions() -> dict[str, tuple[tuple[str, ...], ...]]:
    """Rows of each kind of general question: define, howto, why, suggest, gift, chat."""
    return {
        header.split(":")[0]: tuple(tuple(field.strip() for field in line.split(" | ")) for line in lines)
        for header, lines in _sections("questions.txt")
    }


@cache
def unlabelled() -> tuple[tuple[str, str], ...]:
    """(topic, values asked for) of lists that an adapter answers by itself in training."""
    return tuple(_pair(line, " | ") for line in _lines("unlabelled.txt"))


@cache
def held_out() -> HeldOut:
    sections = {header.split(":")[0]: lines for header, lines in _sections("heldout.txt")}
    return HeldOut(
        words=frozenset(word for line in sections["words"] for word in line.split()),
        lists=tuple(_pair(line, " | ") for line in sections["lists"]),
        list_phrasings=tuple(sections["list phrasings"]),
        countries=tuple(_pair(line, " = ") for line in sections["countries"]),
        country_phrasings=tuple(sections["country phrasings"]),
        free=tuple(sections["free questions"]),
    )


def _topic(header: str, lines: list[str]) -> Topic:
    plural, singular, values, key, pirate, *question = header.split(" | ")
    entries = tuple(_pair(line, " = ") for line in lines)
    return Topic(plural, singular, values, key, pirate, question[0] if question else None, entries)


def _pair(line: str, separator: str) -> tuple[str, str]:
    left, right = line.split(separator)
    return left.strip(), right.strip()


def _lines(name: str) -> list[str]:
    text = (DATA / name).read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("# ")]


def _sections(name: str) -> Iterator[tuple[str, list[str]]]:
    """(header, lines) of each `== header` section."""
    header, lines = "", list[str]()
    for line in _lines(name):
        if line.startswith("== "):
            if header:
                yield header, lines
            header, lines = line.removeprefix("== "), []
        else:
            lines.append(line)
    yield header, lines
