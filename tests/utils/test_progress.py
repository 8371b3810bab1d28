import sys

import pytest

from diffit.utils.progress import progress


def test_elsewhere_than_on_a_terminal_there_are_lines_only_where_asked(capsys):
    for options in ({}, {"lines": True, "quiet": True}):
        with progress("reading", **options) as show:
            show(3, 3)
        assert capsys.readouterr() == ("", "")
    with progress("reading", lines=True) as show:
        show(1, 3)
        show(3, 3)
    assert capsys.readouterr() == ("", "reading: 3 of 3\n")


def test_on_a_terminal_there_is_a_bar_that_goes_away(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with progress("reading", lines=True) as show:
        show(2, 3)
    out, err = capsys.readouterr()
    assert out == ""
    assert "2/3" in err
    assert "\x1b[2K" in err  # clears the line


def test_an_exception_inside_is_not_swallowed():
    with pytest.raises(KeyError), progress("reading"):
        raise KeyError
