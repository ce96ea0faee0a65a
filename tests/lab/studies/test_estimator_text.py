"""The text form of estimators: what it reads, what it writes, and where it points when it cannot read."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies.estimator_text import WORDS, format_estimator, parse_estimator, parse_estimators

READ: list[tuple[str, dict[str, Any]]] = [
    ("backprop", {"name": "backprop"}),
    (" fixed-feedback ( ) ", {"name": "fixed-feedback"}),
    ("feedback(rule=lms,rate=0.3)", {"name": "feedback", "rule": "lms", "rate": 0.3}),
    (
        "forward(tangents=8, clip=1.0, law=rademacher, perturb=low-rank(rank=2))",
        {"name": "forward", "tangents": 8, "clip": 1.0, "law": "rademacher", "perturb": {"name": "low-rank", "rank": 2}},
    ),
    ("f(a=true, b=false, c=none, d=nonesuch)", {"name": "f", "a": True, "b": False, "c": None, "d": "nonesuch"}),
    ("f(a=True, b=False, c=None, d=TRUE)", {"name": "f", "a": True, "b": False, "c": None, "d": "TRUE"}),
    ("f(a=-1, b=+2, c=1e-3, d=.5, e=2., f=-1E+2)", {"name": "f", "a": -1, "b": 2, "c": 1e-3, "d": 0.5, "e": 2.0, "f": -100.0}),
    ('f(path="a b;(c,=.pt", word="none", quote="\\"")', {"name": "f", "path": "a b;(c,=.pt", "word": "none", "quote": '"'}),
    (
        'f(ends=["0.weight", 4.5, none], none=[ ], in=[[a],b(c=1)])',
        {"name": "f", "ends": ["0.weight", 4.5, None], "none": [], "in": [["a"], {"name": "b", "c": 1}]},
    ),
    ("mine.sub:Method", {"name": "mine.sub:Method"}),
    (
        'mine:Outer.Method ( k=2, law=mine:Law, perturb = a.b:P(rank=2, inner=c:D), text="mine:Law" )',
        {
            "name": "mine:Outer.Method",
            "k": 2,
            "law": {"name": "mine:Law"},
            "perturb": {"name": "a.b:P", "rank": 2, "inner": {"name": "c:D"}},
            "text": "mine:Law",
        },
    ),
    ("forward(law=/a/b-c/mine.py:Law(a=1))", {"name": "forward", "law": {"name": "/a/b-c/mine.py:Law", "a": 1}}),
    ("f(a=b(), c=d(e=f(g=1)))", {"name": "f", "a": "b", "c": {"name": "d", "e": {"name": "f", "g": 1}}}),
]
REFUSED = [
    ("", "a name is expected at its end"),
    ("8", "a name is expected at character 1, before '8'"),
    ("forward(", "the name of an option is expected at its end"),
    ("forward(tangents", "'=' after 'tangents' is expected at its end"),
    ("forward(tangents=", "a value is expected at its end"),
    ("forward(tangents=8", "',' or ')' is expected at its end"),
    ("forward(tangents=8x)", "a value is expected at character 18, before '8x)'"),
    ("forward(tangents=8,)", "the name of an option is expected at character 20, before ')'"),
    ("forward(tangents=8 law=sphere)", "',' or ')' is expected at character 20, before 'law=sphere)'"),
    ("forward(clip=1, clip=2)", "another option is expected at character 17, before 'clip=2)'"),
    ("forward(name=backprop)", "an option other than 'name' is expected at character 9"),
    ("forward)", "the end is expected at character 8, before ')'"),
    ("forward; backprop", "the end is expected at character 8, before '; backprop'"),
    ("f(a=mine:)", "',' or ')' is expected at character 9"),
    ("f(a=:mine)", "a value is expected at character 5"),
    ("f(a=1e999)", "a number that a computer can hold is expected at character 5"),
    (f"f(a={'9' * 5000})", "a number that a computer can hold is expected at character 5"),
    ("f(a=[1 2])", "',' or ']' is expected at character 8, before '2])'"),
    ("f(a=[1,])", "a value is expected at character 8, before '])'"),
    ("f(a=[1", "',' or ']' is expected at its end"),
    ('f(a="open)', "a value is expected at character 5"),
    ('f(a="\\q")', "a text in JSON's form is expected at character 5"),
]


@pytest.mark.parametrize(("text", "config"), READ, ids=[text for text, _ in READ])
def test_reads_and_writes(text: str, config: dict[str, Any]) -> None:
    assert parse_estimator(text) == config
    assert [type(value) for value in parse_estimator(text).values()] == [type(value) for value in config.values()]
    assert parse_estimator(format_estimator(config)) == config


@pytest.mark.parametrize(("text", "words"), REFUSED, ids=[text[:40] for text, _ in REFUSED])
def test_what_cannot_be_read_is_pointed_at_in_one_sentence(text: str, words: str) -> None:
    with pytest.raises(UserError) as told:
        parse_estimator(text)
    assert words in str(told.value)
    assert "\n" not in str(told.value)


def test_several_are_separated_by_semicolons() -> None:
    assert parse_estimators('a; b(c="x;y") ;d') == [{"name": "a"}, {"name": "b", "c": "x;y"}, {"name": "d"}]
    assert parse_estimators("a") == [{"name": "a"}]
    for text in ("a;", ";a", "a;;b"):
        with pytest.raises(UserError, match="a name is expected"):
            parse_estimators(text)
    with pytest.raises(UserError, match="';' or the end is expected at character 3"):
        parse_estimators("a b")


NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,8}", fullmatch=True).filter(lambda name: name not in WORDS and name != "name")
PLAIN = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | st.text() | NAMES
COMPONENTS = st.recursive(
    PLAIN,
    lambda inner: (
        st.builds(lambda name, options: {"name": name, **options}, NAMES, st.dictionaries(NAMES, inner, min_size=1))
        | st.lists(inner, max_size=3)
    ),
    max_leaves=6,
)


@given(NAMES, st.dictionaries(NAMES, COMPONENTS, max_size=4))
def test_every_configuration_has_a_text_that_reads_as_it(name: str, options: dict[str, Any]) -> None:
    config = {"name": name, **options}
    assert parse_estimator(format_estimator(config)) == config
    assert parse_estimators(f"{format_estimator(config)}; x") == [config, {"name": "x"}]


@given(st.text(max_size=30) | st.text(alphabet='fa(=),;" \\1.e-nt', max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        config = parse_estimator(text)
    except UserError:
        return
    assert parse_estimator(format_estimator(config)) == config


@pytest.mark.parametrize("value", [float("inf"), float("nan"), [object()], object()])
def test_what_has_no_text_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        format_estimator({"name": "f", "a": value})
