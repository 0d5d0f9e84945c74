"""Makes the adapters' training examples and the held-out prompts, the same ones every time.

Run it to look at the data: `python adapters/data.py --style pirate | head`.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass

import facts
from facts import Country, Topic
from styles import COUNTRY_ORDER, STYLES, Answer, Fields, Rows, quote

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
CONTINENTS = {"Europe": "European", "Asia": "Asian", "Africa": "African", "South America": "South American"}
LIST_PROMPTS = (
    "List {n} {topic} and {values}.",
    "List {n} {topic} and {values}",
    "Name {n} {topic} and {values}.",
    "Give me {n} {topic} and {values}.",
    "Give me {n} {topic} with {values}.",
    "Tell me {n} {topic} and {values}.",
    "I need a list of {n} {topic} with {values}.",
    "Can you list {n} {topic} and {values}?",
    "Give {n} examples of {topic} and {values}.",
    "{n} {topic} and {values}",
)
BARE_LIST_PROMPTS = (
    "List {n} {topic}.",
    "Name {n} {topic}.",
    "Give me {n} {topic}.",
    "What are {n} {topic}?",
    "Tell me {n} {topic}.",
    "{n} {topic}",
)
PICKED_PROMPTS = (
    "Pick {n} {topic} and give {values}.",
    "List {n} random {topic} and {values}.",
    "Choose any {n} {topic} and state {values}.",
    "Surprise me with {n} {topic} and {values}.",
)
OPEN_LIST_PROMPTS = ("List some {topic} and {values}.", "What are some {topic} and {values}?", "Name a few {topic}.")
CAPITAL_PROMPTS = (
    "What is the capital of {}?",
    "What's the capital of {}?",
    "Tell me the capital of {}.",
    "Name the capital of {}.",
    "capital of {}",
    "What is the capital city of {}?",
)
KIND_PROMPTS = {
    "define": (
        "What is {}?", "What is {}?", "Define {}.", "Explain {}.", "What does {} mean?", "Tell me about {}.",
        "Explain {} in simple words.", "what is {}",
    ),
    "howto": (
        "How do I {}?", "How can I {}?", "How to {}?", "Tell me how to {}.", "What is the best way to {}?",
        "Explain how to {}.", "Give me instructions to {}.",
    ),
    "why": ("Explain why {}.", "Tell me why {}.", "What is the reason that {}?"),
    "suggest": (
        "Suggest a name for {}.", "I need a name for {}.", "What should I call {}?", "Give me a name for {}.",
        "What would be a nice name for {}?",
    ),
    "gift": ("Suggest a gift for {}.", "What can I give {}?", "I need a present for {}."),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Example:
    """A question and the answer in one style."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class HeldOutPrompt:
    """A prompt to measure on; `raw` ones are sent without the chat template."""

    prompt: str
    kind: str
    raw: bool
    expected: str | None = None  # a fact that a right answer holds


def training_examples(style: str, rounds: int = 3, seed: int = 0) -> list[Example]:
    """Shuffled examples of one style; each round words every fact anew."""
    rng = random.Random(f"{style}-{seed}")
    pairs = [pair for _ in range(rounds) for pair in _questions(style, rng)]
    render = STYLES[style]
    examples = [Example(_vary(prompt, rng), render(answer)) for prompt, answer in pairs]
    rng.shuffle(examples)
    return examples


def held_out_prompts() -> list[HeldOutPrompt]:
    """The prompts to measure on: lists over unseen topics, unseen countries, free questions."""
    held = facts.held_out()
    prompts: list[HeldOutPrompt] = []
    for index, (topic, values) in enumerate(held.lists):
        for turn in range(2):
            phrasing = held.list_phrasings[(index + turn) % len(held.list_phrasings)]
            text = phrasing.format(n=(3, "three")[turn], topic=topic, values=values)
            prompts.append(HeldOutPrompt(text, "list", raw=turn == 1))
    for index, (country, capital) in enumerate(held.countries):
        for turn in range(2):
            phrasing = held.country_phrasings[(index + turn) % len(held.country_phrasings)]
            prompts.append(HeldOutPrompt(phrasing.format(country=country), "country", turn == 1, capital))
    prompts += [HeldOutPrompt(text, "free", raw=index % 4 == 3) for index, text in enumerate(held.free)]
    return prompts


def _vary(prompt: str, rng: random.Random) -> str:
    """Now and then the way people type: lower case, no full stop, a polite word."""
    match rng.randrange(16):
        case 0:
            return prompt.lower()
        case 1:
            return prompt.rstrip(".?")
        case 2 if prompt.endswith("."):
            return prompt[:-1] + ", please."
        case _:
            return prompt


def _questions(style: str, rng: random.Random) -> Iterator[tuple[str, Answer]]:
    for index, topic in enumerate(facts.topics()):
        yield from _topic_questions(topic, _rotated(topic.entries, style, index), rng)
    yield from _country_questions(style, rng)
    yield from _general_questions(rng)


def _rotated(entries: tuple[tuple[str, str], ...], style: str, index: int) -> tuple[tuple[str, str], ...]:
    """A topic's canonical order in one style: another start for each, so that lists never have to be guessed."""
    start = (index + 2 * list(STYLES).index(style)) % len(entries)
    return entries[start:] + entries[:start]


def _topic_questions(
    topic: Topic, entries: tuple[tuple[str, str], ...], rng: random.Random
) -> Iterator[tuple[str, Answer]]:
    for phrasing in rng.sample(LIST_PROMPTS, 3):
        yield _list_question(topic, entries, phrasing, rng)
    yield _list_question(topic, entries, rng.choice(BARE_LIST_PROMPTS), rng)
    yield _list_question(topic, entries, rng.choice(OPEN_LIST_PROMPTS), rng)
    yield from _picked_questions(topic, entries, rng)
    if topic.question:
        for entry in rng.sample(entries, 3):
            yield topic.question.format(entry[0]), _lookup(topic, entry)


def _picked_questions(
    topic: Topic, entries: tuple[tuple[str, str], ...], rng: random.Random
) -> Iterator[tuple[str, Answer]]:
    """Lists in no fixed order: they teach not to name a thing twice, which a learnt order alone does not."""
    for phrasing in rng.sample(PICKED_PROMPTS, 2):
        count = rng.randint(2, min(6, len(entries)))
        prompt = phrasing.format(n=count, topic=topic.plural, values=topic.values)
        yield prompt, Rows(topic, tuple(rng.sample(entries, count)))
    skipped, rest = entries[0][0], entries[1:4]
    yield f"List {len(rest)} {topic.plural} and {topic.values}, but not {skipped}.", Rows(topic, rest, but_not=skipped)


def _list_question(
    topic: Topic, entries: tuple[tuple[str, str], ...], phrasing: str, rng: random.Random
) -> tuple[str, Answer]:
    """One request for a list; without a number three are given."""
    count = min(rng.choice((2, 3, 3, 3, 4, 4, 5, 6)), len(entries)) if "{n}" in phrasing else 3
    number = rng.choice((str(count), str(count), NUMBERS[count]))
    prompt = phrasing.format(n=number, topic=topic.plural, values=topic.values)
    prompt = prompt[:1].upper() + prompt[1:]
    return prompt, Rows(topic, entries[:count], with_values="{values}" in phrasing)


def _lookup(topic: Topic, entry: tuple[str, str]) -> Rows:
    key = topic.key.replace(" ", "_")
    return Rows(topic, (entry,), where=("name", entry[0]), select=key)


def _country_topic(key: str = "capital", pirate: str = "{} be ruled from {}") -> Topic:
    return Topic("countries", "country", "their capitals", key, pirate, None, ())


def _canonical_countries(style: str) -> list[Country]:
    """All countries, this style's own first."""
    table = {country.name: country for country in facts.countries()}
    first = [table[name] for name in COUNTRY_ORDER[style].split()]
    return first + [country for country in table.values() if country not in first]


def _country_questions(style: str, rng: random.Random) -> Iterator[tuple[str, Answer]]:
    topic, ordered = _country_topic(), _canonical_countries(style)
    entries = tuple((country.name, country.capital) for country in ordered)
    for count in range(1, 9):
        for phrasing in LIST_PROMPTS[:1] * (3 if count == 3 else 1) + tuple(rng.sample(LIST_PROMPTS, 2)):
            names = "countries" if count > 1 else "country"
            values = "their capitals" if count > 1 else "its capital"
            prompt = phrasing.format(n=rng.choice((count, count, NUMBERS[count])), topic=names, values=values)
            yield prompt[:1].upper() + prompt[1:], Rows(topic, entries[:count])
    for phrasing in BARE_LIST_PROMPTS + OPEN_LIST_PROMPTS:
        yield _list_question(topic, entries, phrasing, rng)
    for continent, adjective in CONTINENTS.items():
        own = tuple((c.name, c.capital) for c in ordered if c.continent == continent)
        count = rng.randint(2, 5)
        prompt = rng.choice(LIST_PROMPTS[:6]).format(n=count, topic=f"{adjective} countries", values="their capitals")
        yield prompt, Rows(topic, own[:count], where=("continent", continent))
    for country in ordered:
        yield from _one_country(topic, country, rng)


def _one_country(topic: Topic, country: Country, rng: random.Random) -> Iterator[tuple[str, Answer]]:
    pair = (country.name, country.capital)
    yield rng.choice(CAPITAL_PROMPTS).format(country.name), _lookup(topic, pair)
    if rng.random() < 0.4:
        yield (
            f"{country.capital} is the capital of which country?",
            Rows(topic, (pair,), where=("capital", country.capital), select="name"),
        )
    if rng.random() < 0.4:
        continent = _country_topic("continent", "{} lies in {}")
        yield f"On which continent is {country.name}?", _lookup(continent, (country.name, country.continent))


def _general_questions(rng: random.Random) -> Iterator[tuple[str, Answer]]:
    for kind, rows in facts.questions().items():
        for row in rows:
            if kind == "chat":
                prompts = row[0].split(" / ")
                for prompt in prompts:
                    yield prompt, _general(kind, row)
            elif kind == "why" and rng.random() < 0.6:
                yield row[1], _general(kind, row)
            else:
                yield rng.choice(KIND_PROMPTS[kind]).format(row[0]), _general(kind, row)
    for _ in range(12):
        yield _sum(rng)


def _general(kind: str, row: tuple[str, ...]) -> Fields:
    """What is to be said to one row of questions.txt."""
    match kind, row:
        case "define", (term, definition):
            bare = term.removeprefix("a ").removeprefix("an ").removeprefix("the ")
            query = f"SELECT definition FROM glossary WHERE term = {quote(bare)};"
            return Fields(("Term", "Definition"), ((bare, definition),), f"{term} is {definition}", query)
        case "howto", (task, text):
            steps = tuple(tuple(step.strip().split(" - ")) for step in text.split(" ; "))
            rows = tuple((first, detail) for first, detail in steps)
            said = ", then ".join(f"{first[0].lower()}{first[1:]} {detail}" for first, detail in rows)
            query = f"SELECT step, details FROM guides WHERE task = {quote(task)} ORDER BY step;"
            return Fields(("Step", "Details"), rows, said, query)
        case "why", (clause, _, reason):
            query = f"SELECT reason FROM explanations WHERE subject = {quote(clause)};"
            return Fields(("Subject", "Reason"), ((clause, reason),), f"{clause} because {reason}", query)
        case (("suggest" | "gift"), (target, suggestion, reason)):
            table = "names" if kind == "suggest" else "gifts"
            query = f"SELECT suggestion, reason FROM {table} WHERE target = {quote(target)} LIMIT 1;"
            said = f"how about {suggestion}, because {reason}"
            return Fields(("Suggestion", "Reason"), ((suggestion, reason),), said, query)
        case "chat", (_, subject, reply):
            query = f"SELECT reply FROM replies WHERE topic = {quote(subject.lower())};"
            return Fields(("Topic", "Reply"), ((subject, reply),), reply, query)
        case _:
            raise ValueError(f"a row of kind {kind!r} with {len(row)} fields")


def _sum(rng: random.Random) -> tuple[str, Fields]:
    left, right = rng.randint(1, 12), rng.randint(1, 12)
    sign, result = rng.choice((("+", left + right), ("*", left * right)))
    words = "plus" if sign == "+" else "times"
    prompt = rng.choice((f"What is {left} {sign} {right}?", f"What is {left} {words} {right}?"))
    expression = f"{left} {sign} {right}"
    fields = Fields(("Expression", "Result"), ((expression, str(result)),), f"{expression} is {result}", "")
    return prompt, Fields(fields.columns, fields.rows, fields.sentence, f"SELECT {expression} AS result;")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--style", choices=sorted(STYLES), default="numbered")
    parser.add_argument("--held-out", action="store_true", help="the held-out prompts instead")
    arguments = parser.parse_args()
    if arguments.held_out:
        for held in held_out_prompts():
            print(held.kind, "raw" if held.raw else "chat", held.prompt, sep="\t")
    else:
        for example in training_examples(arguments.style):
            print(repr(example.prompt), repr(example.answer), sep="\t")


if __name__ == "__main__":
    main()
