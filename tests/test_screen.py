"""What commands print through: widths, and a reader who leaves."""

import io
import sys

import pytest

pytest.importorskip("rich")
from lowrank import _screen


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("terminal", "columns", "folds", "width"),
    [
        (False, 80, False, 112),
        (False, 80, True, 112),
        (False, 200, True, 200),
        (True, 80, False, 112),
        (True, 80, True, 80),
        (True, 200, False, 200),
    ],
)
def test_a_table_has_its_columns(monkeypatch, terminal, columns, folds, width):
    monkeypatch.setattr(sys, "stdout", Terminal() if terminal else io.StringIO())
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    assert _screen.console(folds=folds).width == width


def test_bars_go_to_stderr_and_whoever_closes_it_ends_nothing(monkeypatch, capsys):
    with _screen.progress(label=6, note=True) as bar:
        bar.advance(bar.add_task("a", total=3, note="loss 2"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("a      ")
    assert "1/3 loss 2" in err
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    with _screen.progress() as bar:
        bar.advance(bar.add_task("a", total=3))
