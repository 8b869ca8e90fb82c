"""Every error is provoked, begins with what it is about, says what came, and stands in `docs/errors.md`."""

import re

import pytest

from tests.error_messages import FILES, PACKAGE, PAGE, PROVOCATIONS, find_messages, page, provoke, raises


def test_every_raise_is_provoked():
    found = {(message.file, message.line) for message in find_messages()}
    missing = [f"{file}:{first}" for file in FILES for first, _ in raises(file) if (file, first) not in found]
    assert not missing


def test_every_other_raise_is_in_the_tests_of_its_own():
    """The words that each of the other messages begins with stand in some test, or the error is handed on."""
    tests = "".join(path.read_text() for path in PACKAGE.parent.glob("tests/test_*.py"))
    tests = re.sub(r"\\(.)", r"\1", tests)
    for path in PACKAGE.rglob("*.py"):
        file = path.relative_to(PACKAGE).as_posix()
        if file in FILES:
            continue
        source = path.read_text().splitlines()
        for first, last in raises(file):
            text = " ".join(source[first - 1 : last])
            words = re.search(r"(\w+: expected|expected) [\w' -]{4,}?(?=[,{(:\"';.]|$)", text)
            if words and "(error" not in text:
                assert words[0].strip()[:30] in tests, f"{file}:{first}: no test expects {words[0]!r}"


@pytest.mark.parametrize("index", range(len(PROVOCATIONS)))
def test_a_message_names_the_argument_what_was_expected_and_what_came(index):
    message = provoke(PROVOCATIONS[index])
    assert re.match(r"[\w=]+: expected [^.]+", message.text), message.text
    expected, _, came = message.text.partition(", got ")
    assert came or "; pass" in expected or "; the first has" in message.text, message.text
    assert len(expected.splitlines()) == 1


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), "python -m tests.error_messages writes it anew"
