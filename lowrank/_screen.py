"""A text stream that a reader who leaves, or an encoding without our characters, cannot make raise."""

import io


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
