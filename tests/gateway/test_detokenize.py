"""The detokenizer against a full decode, and stop strings against a search in the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer

from gateway.detokenize import Detokenizer, StopMatch, StopStrings, StopWatch
from gateway.tokenizer import Tokenizer
from tests.gateway.tokenizer_files import byte_fallback, byte_level, metaspace

RAW = {
    "byte_level": byte_level(),
    "byte_level_odd_specials": byte_level(specials=("<\uff5cend\uff5c>", "é", "a b")),
    "byte_fallback": byte_fallback(),
    "byte_fallback_unstripped": byte_fallback(strip=False),
    "metaspace": metaspace(),
}
TOKENIZERS = {name: Tokenizer(raw, {}) for name, raw in RAW.items()}


def full_decode(raw: RawTokenizer, ids: list[int], skip: bool) -> str:
    text: str = raw.decode(ids, skip_special_tokens=skip)
    return text


def streamed(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True, fresh: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip, fresh=fresh)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


def id_lists(name: str) -> st.SearchStrategy[list[int]]:
    """Any ids. Byte fallback's bytes come as whole characters: of a run that is broken anywhere, its full decode makes
    one replacement for each byte, and nobody can know that before the run ends.
    """
    size = RAW[name].get_vocab_size()
    if not name.startswith("byte_fallback"):
        return st.lists(st.integers(0, size - 1), max_size=24)
    words = st.sampled_from([token for token in range(size) if not 3 <= token < 259]).map(lambda token: [token])
    characters = st.characters(codec="utf-8").map(lambda character: [3 + byte for byte in character.encode()])
    return st.lists(words | characters, max_size=12).map(lambda parts: [token for part in parts for token in part])


@pytest.mark.parametrize("name", RAW)
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_pieces_add_up_to_the_full_decode(name: str, data: st.DataObject) -> None:
    ids = data.draw(id_lists(name))
    skip = data.draw(st.booleans())
    assert "".join(streamed(TOKENIZERS[name], ids, skip=skip)) == full_decode(RAW[name], ids, skip)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@given(text=st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back_and_no_piece_holds_half_a_character(name: str, text: str) -> None:
    ids = RAW[name].encode(text, add_special_tokens=False).ids
    pieces = streamed(TOKENIZERS[name], ids, skip=False)
    assert "".join(pieces) == full_decode(RAW[name], ids, False)
    assert text.count("�") == "".join(pieces).count("�")


def test_a_character_comes_with_its_last_byte() -> None:
    ids = RAW["byte_level"].encode("你!").ids
    assert streamed(TOKENIZERS["byte_level"], ids) == ["", "", "你", "!", ""]


def test_an_unfinished_character_becomes_a_replacement_at_the_end() -> None:
    ids = RAW["byte_level"].encode("a你").ids[:-1]
    assert streamed(TOKENIZERS["byte_level"], ids) == ["a", "", "", "�"]


@pytest.mark.parametrize("name", ["byte_fallback", "metaspace"])
def test_text_that_continues_a_prompt_keeps_its_leading_space(name: str) -> None:
    token = RAW[name].token_to_id("▁world")
    assert token is not None
    assert streamed(TOKENIZERS[name], [token], fresh=False) == [" world", ""]
    assert streamed(TOKENIZERS[name], [token], fresh=True) == ["world", ""]


def test_ids_without_a_token_add_nothing() -> None:
    assert streamed(TOKENIZERS["byte_level"], [10_000]) == ["", ""]


def test_length_counts_the_characters_decoded() -> None:
    detokenizer = Detokenizer(TOKENIZERS["byte_level"])
    lengths = []
    for token in RAW["byte_level"].encode("é!").ids:
        lengths.append(detokenizer.length)
        detokenizer.push(token)
    assert lengths == [0, 0, 1]
    assert detokenizer.length == 2


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Brute force: the stop string that is complete first, the longest of those; its start and itself."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return end - len(longest), longest
    return None


def watch(pieces: list[str], stops: list[str], include: bool) -> tuple[list[str], str | None]:
    watcher = StopWatch(StopStrings(stops), include=include)
    shown: list[str] = []
    for piece in pieces:
        result = watcher.push(piece)
        if isinstance(result, StopMatch):
            return [*shown, result.text], result.stop
        shown.append(result)
    return [*shown, watcher.flush()], None


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4),
    include=st.booleans(),
)
@settings(max_examples=500, deadline=None)
def test_stop_strings_against_brute_force(pieces: list[str], stops: list[str], include: bool) -> None:
    text = "".join(pieces)
    expected = first_stop(text, stops)
    shown, stop = watch(pieces, stops, include)
    if expected is None:
        assert ("".join(shown), stop) == (text, None)
        return
    start, wanted = expected
    assert stop == wanted
    assert "".join(shown) == text[: start + (len(wanted) if include else 0)]


@given(
    text=st.text("ab", max_size=20),
    cuts=st.lists(st.integers(1, 4), min_size=20, max_size=20),
    stops=st.lists(st.text("ab", min_size=2, max_size=6), min_size=1, max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_what_is_shown_never_ends_in_the_beginning_of_a_stop(text: str, cuts: list[int], stops: list[str]) -> None:
    """Held back as little as may be, too: what is held is the longest such beginning."""
    watcher = StopWatch(StopStrings(stops), include=False)
    shown, position = "", 0
    for cut in cuts:
        piece, position = text[position : position + cut], position + cut
        result = watcher.push(piece)
        if isinstance(result, StopMatch):
            return
        shown += result
        seen = text[:position]
        begun = [k for stop in stops for k in range(1, len(stop)) if seen.endswith(stop[:k])]
        assert len(shown) == len(seen) - max(begun, default=0)
