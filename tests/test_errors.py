"""What a user is shown is one line of text, whatever it quotes."""

import logging

import pytest

from diffit.cli import Lines, fail
from diffit.errors import MESSAGE_LIMIT, UserError, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain – ünïcode 日本 👩‍🚀", "plain – ünïcode 日本 👩‍🚀"),
        ("a\nerror: all is well", "a\\nerror: all is well"),
        ("\x1b[2J\x9b31m\x7f\r\0", "\\x1b[2J\\x9b31m\\x7f\\r\\x00"),
        ("\u202eright to left\u2066\u2028\ufeff", "\\u202eright to left\\u2066\\u2028\\ufeff"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_a_terminal_obeys_becomes_an_escape(text, shown):
    assert printable(text) == shown
    assert str(UserError(text)) == shown


def test_a_long_value_loses_its_middle_and_keeps_the_remedy():
    message = str(UserError("path: " + "x" * 40_000 + "; use another one"))
    assert message.startswith("path: xxx")
    assert message.endswith("xxx; use another one")
    assert len(message) < MESSAGE_LIMIT + 50
    assert printable("a" * 200) == "a" * 200
    assert printable("a" * 201, 200) == "a" * 133 + "…(2 characters)…" + "a" * 66


def test_errors_and_log_lines_of_the_command_line_are_one_line_each(capsys):
    with pytest.raises(SystemExit):
        fail("file\nname\x1b[1m", 1)
    assert capsys.readouterr().err == "error: file\\nname\\x1b[1m\n"
    record = logging.LogRecord("diffit", logging.WARNING, "", 0, "%s: skipped", ("a\nb",), None)
    assert Lines().format(record) == "warning: a\\nb: skipped"
