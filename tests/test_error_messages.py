"""Every error is provoked, begins with what it is about, says what came, and stands in `docs/errors.md`."""

import re

import pytest

from tests.error_messages import FILES, PAGE, PROVOCATIONS, find_messages, page, provoke, raises


def test_every_raise_is_provoked():
    found = {(message.file, message.line) for message in find_messages()}
    missing = [f"{file}:{first}" for file in FILES for first, _ in raises(file) if (file, first) not in found]
    assert not missing


@pytest.mark.parametrize("index", range(len(PROVOCATIONS)))
def test_a_message_names_the_argument_what_was_expected_and_what_came(index):
    message = provoke(PROVOCATIONS[index])
    assert re.match(r"[\w=]+: expected [^.]+", message.text), message.text
    expected, _, came = message.text.partition(", got ")
    assert came or "; pass" in expected or "; the first has" in message.text, message.text
    assert len(expected.splitlines()) == 1


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), "python -m tests.error_messages writes it anew"
