"""Tells whether a text is an answer in an adapter's style: it parses, it says something, it does not repeat itself."""

import json
import re
import sqlite3
from collections.abc import Callable, Iterable
from typing import Any

REPEAT_WORDS = 8  # as many words twice in one answer are a loop; shorter runs occur in honest lists
PIRATE_MARKS = ("arr", "matey", "ahoy", "yo ho", "shiver me timbers", "davy jones", "landlubber", "aye")


class Invalid(Exception):
    """Why a text is no answer in the style."""


def problem(style: str, text: str) -> str | None:
    """None for a valid answer, else the first thing that is wrong with it."""
    try:
        _check_loops(text)
        VALIDATORS[style](text.strip())
    except Invalid as error:
        return str(error)
    return None


def check_numbered(text: str) -> None:
    """Every line is `n. X - Y`, counted from 1, no X twice."""
    names = []
    for index, line in enumerate(text.splitlines(), 1):
        match = re.fullmatch(r"(\d+)\. (\S.*?) - (\S.*)", line.strip())
        if match is None:
            raise Invalid(f"not an `n. X - Y` line: {line!r}")
        if int(match[1]) != index:
            raise Invalid(f"line {index} is numbered {match[1]}")
        names.append(match[2])
    _check_some(names)
    _check_distinct(names)


def check_json(text: str) -> None:
    """A JSON array of distinct, flat, non-empty objects."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Invalid(f"not JSON: {error}") from error
    if not isinstance(value, list) or not all(isinstance(item, dict) and item for item in value):
        raise Invalid("not an array of objects")
    _check_some(value)
    fields = [field for item in value for field in item.values()]
    if any(field is None or field == "" or isinstance(field, (list, dict)) for field in fields):
        raise Invalid("an object with an empty or nested field")
    _check_distinct(str(next(iter(item.values()))) for item in value)


def check_sql(text: str) -> None:
    """One complete SELECT statement that sqlite prepares, given tables and columns of the names it uses."""
    if not text.endswith(";") or not re.match(r"(?i)(select|with)\b", text):
        raise Invalid("not a SELECT statement that ends in a semicolon")
    if any(text[:end].endswith(";") and sqlite3.complete_statement(text[:end]) for end in range(1, len(text))):
        raise Invalid("more than one statement")
    _prepare(text)


def check_pirate(text: str) -> None:
    """At least two different pirate's words around something said, no clause twice."""
    lowered = text.lower()
    marks = [mark for mark in PIRATE_MARKS if re.search(rf"\b{mark}", lowered)]
    if len(marks) < 2:
        raise Invalid(f"pirate's words: {marks}")
    for mark in marks:
        lowered = re.sub(rf"\b{mark}\w*", " ", lowered)
    if len(re.findall(r"\w+", lowered)) < 3:
        raise Invalid("says nothing")
    clauses = (clause.strip() for clause in re.split(r"[,.;:!?\n]|\band\b|\bthen\b", lowered))
    _check_distinct(clause for clause in clauses if len(clause.split()) > 2)


def check_table(text: str) -> None:
    """A markdown table: head, rule, rows of as many cells, no first cell twice."""
    lines = [line.strip() for line in text.splitlines()]
    if len(lines) < 3 or not all(line.startswith("|") and line.endswith("|") for line in lines):
        raise Invalid("not a table of three lines or more")
    head, rule, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)
    if len(head) < 2 or not all(re.fullmatch(r":?-{3,}:?", cell) for cell in rule):
        raise Invalid("no head of two columns with a rule under it")
    if any(len(row) != len(head) or not all(row) for row in (head, rule, *rows)):
        raise Invalid("rows of different length, or an empty cell")
    _check_distinct(row[0] for row in rows)


VALIDATORS: dict[str, Callable[[str], None]] = {
    "numbered": check_numbered,
    "json": check_json,
    "sql": check_sql,
    "pirate": check_pirate,
    "table": check_table,
}


def _prepare(statement: str) -> None:
    """Let sqlite compile the statement; what it misses is created until it is content or complains otherwise."""
    with sqlite3.connect(":memory:") as database:
        tables: list[str] = []
        for _ in range(50):
            try:
                database.execute(f"EXPLAIN {statement}")
                return
            except sqlite3.Error as error:
                _supply(database, str(error), tables)
    raise Invalid("sqlite is never content")


def _supply(database: sqlite3.Connection, complaint: str, tables: list[str]) -> None:
    """Create the table or column that sqlite missed."""
    missing = re.fullmatch(r"no such (table|column): (?:\w+\.)?(\w+)", complaint)
    if missing is None or (missing[1] == "column" and not tables):
        raise Invalid(f"sqlite: {complaint}")
    if missing[1] == "table":
        database.execute(f'CREATE TABLE "{missing[2]}" (loramux_row)')
        tables.append(missing[2])
        return
    for table in tables:
        columns = {row[1].lower() for row in database.execute(f'PRAGMA table_info("{table}")')}
        if missing[2].lower() not in columns:
            database.execute(f'ALTER TABLE "{table}" ADD COLUMN "{missing[2]}"')
            return  # one table is enough; in several the name would be ambiguous
    raise Invalid(f"sqlite: {complaint}")


def _check_loops(text: str) -> None:
    words = re.findall(r"\w+", text.lower())
    runs = [tuple(words[start : start + REPEAT_WORDS]) for start in range(len(words) - REPEAT_WORDS + 1)]
    if len(set(runs)) < len(runs):
        raise Invalid("repeats itself")
    if any(first == second == third for first, second, third in zip(words, words[1:], words[2:], strict=False)):
        raise Invalid("repeats a word")


def _check_some(items: list[Any]) -> None:
    if not items:
        raise Invalid("empty")


def _check_distinct(items: Iterable[str]) -> None:
    seen: set[str] = set()
    for item in items:
        if item.casefold() in seen:
            raise Invalid(f"repeats {item!r}")
        seen.add(item.casefold())
