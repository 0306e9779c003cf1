"""What commands print through: a stream that cannot raise, rich's tables and bars on it, and errors in a line."""

import io
import sys

WIDTH = 112  # of tables at least: a pipe counts as 80 columns, and whole numbers matter more


def console(*, folds: bool = False):
    """A rich Console on stdout, at least WIDTH columns wide.  ``folds``: what is printed fits a narrower terminal too."""
    from rich.console import Console

    screen = Console(file=Unbreakable(sys.stdout), highlight=False)
    if not (folds and screen.is_terminal):
        screen.width = max(screen.width, WIDTH)
    return screen


def progress(*, label: int = 0, bar: int = 40, note: bool = False, disable: bool = False):
    """A rich Progress on stderr: description, bar, how many of how many, seconds.

    Stdout may be read by a program; and whoever closes stderr does not end the work.

    Args:
        label, bar: widths of the description, at least, and of the bar.
        note: tasks have a field of that name, shown behind the numbers.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [TextColumn(f"{{task.description:<{label}}}"), BarColumn(bar), MofNCompleteColumn()]
    if note:
        columns.append(TextColumn("{task.fields[note]}"))
    screen = Console(file=Unbreakable(sys.stderr), highlight=False)
    return Progress(*columns, TimeElapsedColumn(), console=screen, disable=disable)


class Unbreakable(io.TextIOBase):
    """Writes through to ``stream``; what it cannot encode becomes "?", and after its first OSError nothing is written."""

    def __init__(self, stream):
        self.stream, self.broken = stream, stream is None

    @property
    def encoding(self) -> str:
        return getattr(self.stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return not self.broken and self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    def write(self, text: str) -> int:
        self._do(lambda: self.stream.write(text.encode(self.encoding, "replace").decode(self.encoding)))
        return len(text)

    def flush(self) -> None:
        self._do(lambda: self.stream.flush())

    def _do(self, action) -> None:
        if not self.broken:
            try:
                action()
            except (OSError, ValueError):  # a closed pipe; a closed file
                self.broken = True


def one_line(error: BaseException, longest: int = 400) -> str:
    """What an exception says; its type too where the message does not speak for itself."""
    text = " ".join(str(error).split())
    text = text if len(text) <= longest else text[:longest] + " …"
    plain = isinstance(error, (ValueError, TypeError, OSError, ImportError)) and text
    return text if plain else f"{type(error).__name__}: {text}"
