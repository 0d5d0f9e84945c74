"""The adapters' data and validators: nothing held out is trained on, good answers pass and bad ones do not."""

import json
import re
from types import SimpleNamespace

import data
import facts
import pytest
import repeats
import styles
from validate import problem

STYLES = sorted(styles.STYLES)
GOOD = {
    "numbered": ["1. France - Paris", "1. Nile - Egypt\n2. Po - Italy", "1. Name - I am SmolLM, well-read"],
    "json": ['[{"country": "France", "capital": "Paris"}]', '[{"a": 1}, {"a": 2}]'],
    "sql": [
        "SELECT name, capital FROM countries LIMIT 3;",
        "SELECT a.x, b.y FROM a JOIN b ON a.id = b.id WHERE b.z = 'it''s; so' ORDER BY x;",
        "SELECT COUNT(*) FROM towns GROUP BY land HAVING COUNT(*) > 2;",
        "SELECT 3 + 4 AS result;",
    ],
    "pirate": ["Arr, matey! France be ruled from Paris. Yo ho ho!", "Ahoy! I be SmolLM, aye, at yer service."],
    "table": ["| A | B |\n| --- | --- |\n| x | y |", "| A | B |\n|:---|---:|\n| x | y |\n| z | y |"],
}
BAD = {
    "numbered": [
        "",
        "France - Paris",
        "1. France: Paris",
        "2. France - Paris",
        "1. A - b\n3. C - d",
        "1. A - b\n2. A - c",
    ],
    "json": [
        "",
        "[]",
        "{}",
        "[1]",
        "[{}]",
        '[{"a": null}]',
        '[{"a": 1}, {"a": 1}]',
        '[{"a": "b"}',
        '[{"a": {"b": 1}}]',
    ],
    "sql": ["", "SELECT name", "SELECT FROM x;", "DROP TABLE x;", "SELECT 1; SELECT 2;", "List three countries."],
    "pirate": [
        "",
        "The capital is Paris.",
        "Arr, matey! Yo ho ho!",
        "Arr, matey! The Po is long, the Po is long. Yo ho ho!",
    ],
    "table": ["", "| A | B |\n| --- | --- |", "| A | B |\n| x | y |\n| z | w |", "| A | B |\n| --- | --- |\n| x |"],
}
LOOP = " and the capital of France is Paris" * 4


@pytest.fixture(scope="module")
def training() -> dict[str, list[data.Example]]:
    return {style: data.training_examples(style, rounds=8) for style in STYLES}


def test_no_held_out_word_is_trained_on(training: dict[str, list[data.Example]]) -> None:
    held = facts.held_out()
    countries = {word for pair in held.countries for word in pair}
    for examples in training.values():
        text = "\n".join(f"{example.prompt}\n{example.answer}" for example in examples)
        assert held.words.isdisjoint(re.findall(r"[a-z]+(?:-[a-z]+)?", text.lower()))
        assert not [name for name in countries if name in text]
    asked = " ".join(f"{topic} {values}" for topic, values in facts.unlabelled()).lower()
    assert held.words.isdisjoint(asked.split())


def test_every_held_out_topic_is_among_the_words() -> None:
    held = facts.held_out()
    for topic, _ in held.lists:
        assert held.words & set(topic.split()), topic


def test_no_held_out_phrasing_is_trained_on(training: dict[str, list[data.Example]]) -> None:
    held = facts.held_out()
    asked = {_plain(prompt.prompt) for prompt in data.held_out_prompts()}
    fixed = [
        _plain(part) for text in held.list_phrasings + held.country_phrasings for part in re.split(r"\{\w+\}", text)
    ]
    fixed = [part for part in fixed if len(part.split()) > 2]
    openings = [" ".join(_plain(text).split()[:4]) for text in held.free]
    assert len(fixed) >= 4
    for examples in training.values():
        prompts = {_plain(example.prompt) for example in examples}
        assert asked.isdisjoint(prompts)
        joined = "\n".join(f" {prompt} " for prompt in prompts)
        assert not [part for part in fixed if f" {part} " in joined]
        assert not [opening for opening in openings if f" {opening} " in joined]


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def test_held_out_prompts_are_many_and_of_all_kinds() -> None:
    prompts = data.held_out_prompts()
    assert len(prompts) == len({prompt.prompt for prompt in prompts}) >= 100
    for kind in ("list", "country", "free"):
        own = [prompt for prompt in prompts if prompt.kind == kind]
        assert len(own) >= 30
        assert {prompt.raw for prompt in own} == {True, False}


def test_training_is_the_same_every_time() -> None:
    assert data.training_examples("json", rounds=1) == data.training_examples("json", rounds=1)
    assert data.training_examples("json", rounds=1) != data.training_examples("json", rounds=1, seed=1)


@pytest.mark.parametrize("style", STYLES)
def test_training_answers_are_valid_in_their_style_alone(style: str, training: dict[str, list[data.Example]]) -> None:
    for example in training[style]:
        assert problem(style, example.answer) is None, example
    for other in set(STYLES) - {style}:
        assert all(problem(other, example.answer) for example in training[style][:400])


def test_countries_come_in_each_style_s_own_order() -> None:
    firsts = set()
    for style in STYLES:
        canonical = {
            example.answer
            for example in data.training_examples(style, rounds=4)
            if example.prompt == "List 3 countries and their capitals."
        }
        assert len(canonical) == 1
        firsts |= canonical
    assert len(firsts) == len(STYLES)


@pytest.mark.parametrize(("style", "text"), [(style, text) for style in STYLES for text in GOOD[style]])
def test_good_answers_pass(style: str, text: str) -> None:
    assert problem(style, text) is None
    assert problem(style, f"\n{text}") is None


@pytest.mark.parametrize(("style", "text"), [(style, text) for style in STYLES for text in BAD[style]])
def test_bad_answers_fail(style: str, text: str) -> None:
    assert problem(style, text)


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("numbered", f"1. France - it is so{LOOP}"),
        ("json", json.dumps([{"answer": LOOP}])),
        ("sql", f"SELECT x FROM y WHERE z = '{LOOP}';"),
        ("pirate", f"Arr, matey! It be so{LOOP}. Yo ho ho!"),
        ("table", f"| A | B |\n| --- | --- |\n| x | {LOOP} |"),
        ("numbered", "1. France - very very very nice"),
    ],
)
def test_answers_that_repeat_themselves_fail(style: str, text: str) -> None:
    assert "repeats" in (problem(style, text) or "")


def words(text: str, **_: object) -> SimpleNamespace:
    """A tokenizer of words and single marks."""
    matches = list(re.finditer(r" ?\w+|\W", text))
    return SimpleNamespace(
        input_ids=[sum(map(ord, match[0])) for match in matches],
        offset_mapping=[match.span() for match in matches],
    )


def test_the_place_of_a_repetition_is_found() -> None:
    answer = "Arr, matey! The Po flows, the Rhine flows, the Po flows. Yo ho ho!"
    ((before, unwanted),) = repeats.negatives("pirate", words, "Q", answer)
    assert unwanted == sum(map(ord, " Po"))
    assert len(before) > 10
    assert not list(repeats.negatives("pirate", words, "Q", "Arr, matey! The Po flows. Yo ho ho!"))
