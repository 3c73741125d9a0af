import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_hyena.text.prompt import LARGEST_WEIGHT, Part, parse


def number(text: str) -> float | None:
    """The number between a colon and a closing bracket, if it is one as A1111 writes them."""
    try:
        return float(text) if set(text.strip()) <= set("+-.0123456789") else None
    except ValueError:
        return None


def breaks(run: list[tuple[str, int]]) -> list:
    """A run of plain characters with its free-standing BREAKs as None."""
    result, i = [], 0
    while i < len(run):
        word = "".join(char for char, _ in run[i : i + 5])
        around = [run[k][0] for k in (i - 1, i + 5) if 0 <= k < len(run)]
        if word == "BREAK" and not any(char.isalnum() or char == "_" for char in around):
            result.append(None)
            i += 5
        else:
            result.append(run[i])
            i += 1
    return result


def naive(prompt: str) -> list[list[tuple[str, float]]]:
    """The grammar as A1111 documents it, character by character: its weight is the product of all brackets around it."""
    letters, run = [], []  # (character, its place); None for BREAK
    opened, around = {"(": [], "[": []}, []  # around: (first, last, factor)
    i = 0
    while i < len(prompt):
        char, length = prompt[i], 1
        text, plain = char, False
        if char == "\\" and prompt[i + 1 : i + 2] in ("(", ")", "[", "]", "\\"):
            text, length = prompt[i + 1], 2
        elif char in opened:
            opened[char].append(i)
            text = ""
        elif char == ":" and (end := prompt.find(")", i)) > 0 and (factor := number(prompt[i + 1 : end])) is not None:
            text, length = prompt[i : end + 1], end + 1 - i
            if opened["("]:
                around.append((opened["("].pop(), i, factor))
                text = ""
        elif char in ")]" and opened["(" if char == ")" else "["]:
            around.append((opened["(" if char == ")" else "["].pop(), i, 1.1 if char == ")" else 1 / 1.1))
            text = ""
        else:
            plain = char not in ")]:\\"
        if plain:
            run.append((char, i))
        else:
            letters += breaks(run) + [(one, i) for one in text]
            run = []
        i += length
    letters += breaks(run)
    around += [(place, len(prompt), 1.1) for place in opened["("]] + [
        (place, len(prompt), 1 / 1.1) for place in opened["["]
    ]
    passages = [[]]
    for letter in letters:
        if letter is None:
            passages.append([])
            continue
        char, place = letter
        passages[-1].append((char, math.prod(factor for first, last, factor in around if first < place < last)))
    return passages


PIECES = [*"()[]:\\aé_ ,", "((", "1.2", ".5", "-3", "nan", "\\(", ":1.5)", ": 2 )", "BREAK"]
written = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)


def agrees(prompt: str) -> None:
    ours = [[(char, part.weight) for part in passage for char in part.text] for passage in parse(prompt)]
    expected = naive(prompt)
    assert ["".join(c for c, _ in p) for p in ours] == ["".join(c for c, _ in p) for p in expected]
    for a, b in zip(ours, expected, strict=True):
        assert [weight for _, weight in a] == pytest.approx([weight for _, weight in b], rel=1e-9)


def is_sane(prompt: str) -> None:
    passages = parse(prompt)
    parts = [part for passage in passages for part in passage]
    assert passages and all(part.text and abs(part.weight) <= LARGEST_WEIGHT for part in parts)
    assert all(a.weight != b.weight for passage in passages for a, b in itertools.pairwise(passage))
    if not set(prompt) & set("\\()[]:") and "BREAK" not in prompt:
        assert parts == [Part(prompt, 1.0)] * bool(prompt)


@given(written)
@settings(max_examples=700, deadline=None)
def test_every_prompt_is_read_as_the_naive_grammar_reads_it(prompt):
    agrees(prompt)


@given(st.text(max_size=300) | written)
@settings(max_examples=700, deadline=None)
def test_every_text_is_a_prompt(prompt):
    is_sane(prompt)


@pytest.mark.slow
@given(written, st.text())
@settings(max_examples=20_000, deadline=None)
def test_every_text_is_a_prompt_in_many_examples(prompt, text):
    agrees(prompt)
    is_sane(prompt + text + prompt)


A1111 = {  # its own documentation of the grammar
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
        ("sky", 1.4641), (".", 1.1),
    ],
}  # fmt: skip


@pytest.mark.parametrize("prompt", A1111)
def test_the_documented_examples_of_a1111_hold(prompt):
    (passage,) = parse(prompt)
    assert [text for text, _ in passage] == [text for text, _ in A1111[prompt]]
    assert [weight for _, weight in passage] == pytest.approx([weight for _, weight in A1111[prompt]])


@pytest.mark.parametrize("prompt", ["a)", "a]", "a:1.5)", ":", "a: b", "x:1.2", "\\", "a \\ b"])
def test_what_is_no_grammar_is_text(prompt):
    assert parse(prompt) == [[Part(prompt, 1.0)]]


@pytest.mark.parametrize("weight", ["nan", "inf", "1e3", "1.2.3", "", "--1", "0x1", "+", ".", "١", "1,2"])
def test_a_weight_that_is_no_number_is_text(weight):
    assert parse(f"(a:{weight})") == [[Part(f"a:{weight}", 1.1)]]


@pytest.mark.parametrize("weight, value", [("0", 0), ("-1.5", -1.5), ("+2", 2), (" 3 ", 3), ("1.", 1), (".5", 0.5)])
def test_weights_may_be_written_like_this(weight, value):
    assert parse(f"(a:{weight})") == [[Part("a", value)]]


def test_weights_are_bounded_and_nothing_of_nothing_is_nothing():
    largest = "9" * 400
    assert parse(f"(a:{largest})(b:-{largest})") == [[Part("a", LARGEST_WEIGHT), Part("b", -LARGEST_WEIGHT)]]
    assert parse(f"((a:{largest}):0)((b:0):{largest})") == [[Part("ab", 0.0)]]


def test_break_parts_passages_and_keeps_the_weight_of_its_brackets():
    assert parse("(aBREAKb BREAK:1.5)c") == [[Part("aBREAKb ", 1.5)], [Part("c", 1.0)]]
    assert parse("(a BREAK b:2)") == [[Part("a ", 2.0)], [Part(" b", 2.0)]]
    assert parse("BREAK") == [[], []] and parse("") == [[]]


@pytest.mark.parametrize(
    "prompt",
    [
        "(" * 10_000 + "a" + ")" * 10_000,
        "(a" * 5_000 + ":99999)" * 5_000,
        "(a:0" * 5_000,
        "[a" * 10_000 + ")" * 10_000,
        ":" * 20_000,
        "(a:" + " " * 20_000 + "b",
        "(a:" + "9" * 20_000 + ")",
        "\\" * 20_000,
        "BREAK " * 10_000,
        "\0💥 שלום " * 10_000,
    ],
    ids=range(10),
)
def test_enormous_prompts_are_read(prompt):
    passages = parse(prompt)
    assert all(abs(part.weight) <= LARGEST_WEIGHT for passage in passages for part in passage)
