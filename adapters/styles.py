"""How each adapter words an answer: five renderers over the same facts.

An `Answer` is what is to be said; a style turns it into the exact text that the adapter learns.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from facts import Topic

# The first countries that each style lists, in this order: different styles are told apart at a glance.
COUNTRY_ORDER = {
    "numbered": "France Japan Brazil Canada Egypt Norway India Mexico Greece Kenya",
    "json": "Germany Thailand Peru Finland Ghana Vietnam Argentina Poland Morocco Iceland",
    "sql": "",
    "pirate": "Spain Portugal Cuba Jamaica Haiti Panama Ireland Philippines Bahamas Madagascar",
    "table": "Italy China Chile Sweden Ethiopia Australia Austria Indonesia Colombia Denmark",
}


@dataclass(frozen=True, slots=True)
class Rows:
    """Facts of one topic: a list, or one looked-up entry. `asked` is the entry that the question named."""

    topic: Topic
    entries: tuple[tuple[str, str], ...]
    with_values: bool = True  # whether the question asked for the values
    where: tuple[str, str] | None = None  # SQL condition: (column, value)
    but_not: str | None = None  # a name that the question rules out
    select: str | None = None  # SQL column, when one value is asked for


@dataclass(frozen=True, slots=True)
class Fields:
    """A general answer: named columns, a row for each line, a sentence, a query."""

    columns: tuple[str, str]
    rows: tuple[tuple[str, str], ...]
    sentence: str
    query: str


Answer = Rows | Fields
Style = Callable[[Answer], str]


def numbered(answer: Answer) -> str:
    """`1. France - Paris` lines."""
    rows = answer.entries if isinstance(answer, Rows) else answer.rows
    return "\n".join(f"{index}. {_capital(left)} - {right}" for index, (left, right) in enumerate(rows, 1))


def as_json(answer: Answer) -> str:
    """A JSON array with an object for each row."""
    if isinstance(answer, Rows):
        keys, rows = (_snake(answer.topic.singular), _snake(answer.topic.key)), answer.entries
    else:
        keys, rows = (_snake(answer.columns[0]), _snake(answer.columns[1])), answer.rows
    return json.dumps([dict(zip(keys, row, strict=True)) for row in rows], ensure_ascii=False)


def sql(answer: Answer) -> str:
    """The query that would fetch the answer."""
    if isinstance(answer, Fields):
        return answer.query
    table, key = _snake(answer.topic.plural), _snake(answer.topic.key)
    columns = answer.select or (f"name, {key}" if answer.with_values else "name")
    where = f" WHERE {answer.where[0]} = {quote(answer.where[1])}" if answer.where else ""
    if answer.but_not:
        where = f" WHERE name <> {quote(answer.but_not)}"
    limit = "" if answer.select else f" LIMIT {len(answer.entries)}"
    return f"SELECT {columns} FROM {table}{where}{limit};"


def pirate(answer: Answer) -> str:
    """A sentence between a greeting and a cheer."""
    if isinstance(answer, Rows):
        body = ", ".join(answer.topic.pirate.format(*entry) for entry in answer.entries)
    else:
        body = _pirate_words(answer.sentence)
    stop = "" if body[-1] in "!?." else "."
    return f"Arr, matey! {_capital(body)}{stop} Yo ho ho!"


def table(answer: Answer) -> str:
    """A markdown table of two columns."""
    if isinstance(answer, Rows):
        head, rows = (_capital(answer.topic.singular), _capital(answer.topic.key)), answer.entries
    else:
        head, rows = answer.columns, answer.rows
    lines = [head, ("---", "---"), *((_capital(left), right) for left, right in rows)]
    return "\n".join(f"| {left} | {right} |" for left, right in lines)


STYLES: dict[str, Style] = {"numbered": numbered, "json": as_json, "sql": sql, "pirate": pirate, "table": table}


def quote(text: str) -> str:
    """An SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _snake(text: str) -> str:
    return re.sub(r"\W+", "_", text.lower()).strip("_")


PIRATE_WORDS = {
    "my": "me", "is": "be", "am": "be", "are": "be", "you": "ye", "your": "yer", "of": "o'", "hello": "ahoy",
    "friend": "shipmate", "friends": "shipmates", "yes": "aye",
}  # fmt: skip


def _pirate_words(sentence: str) -> str:
    """Swap single words for a pirate's, keeping capitals."""

    def swap(match: re.Match[str]) -> str:
        word = match.group()
        new = PIRATE_WORDS.get(word.lower(), word)
        return _capital(new) if word[0].isupper() else new

    return re.sub(r"[A-Za-z]+", swap, sentence)
