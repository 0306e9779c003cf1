"""What a valid answer is, as the user says it: JSON, a regular expression, or a function."""

import importlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Validator:
    """Called with an answer, whose white space at both ends does not count: it depends on where a prompt's tokens end.

    An answer that ``accepts`` raises on is not valid: an evaluation never ends there.
    """

    spec: str
    accepts: Callable[[str], object]

    def __call__(self, answer: str) -> bool:
        try:
            return bool(self.accepts(answer.strip()))
        except Exception:
            return False


def validator(spec: str) -> Validator:
    """spec is read as the first of these that it can be:

    ``json``: the whole answer is one JSON object or array (RFC 8259: no NaN or Infinity).
    ``re:REGEX``: the whole answer matches (``re.fullmatch``; ``(?s)`` in front lets a dot match line ends).
    ``module:function``, Python names alone: that function of an installed module, or of one in the working directory, called
    with the answer (str); what it returns is taken as true or false.
    Anything else: REGEX without ``re:``.

    Raises ValueError, before any answer is looked at, for a regular expression that does not compile and for a function that
    cannot be imported or called.
    """
    if spec == "json":
        return Validator(spec, _is_json)
    if FUNCTION.fullmatch(spec) and not spec.startswith("re:"):
        return Validator(spec, _imported(spec))
    try:
        return Validator(spec, re.compile(spec.removeprefix("re:")).fullmatch)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{spec!r} is no regular expression: {error}") from error


def accepts_some(valid: Validator, completions: Sequence[str]) -> None:
    """Raises ValueError if valid accepts none of completions: nothing could be learnt that it calls valid."""
    if any(map(valid, completions)):
        return
    shown = completions[0] if len(completions[0]) <= 60 else completions[0][:60] + "…"
    reason = ""
    try:
        valid.accepts(completions[0].strip())
    except Exception as error:
        reason = f" ({type(error).__name__}: {' '.join(str(error).split())})"
    raise ValueError(
        f"{valid.spec!r} accepts none of {len(completions)} training answers; the first is {shown!r}{reason}"
    )


def _is_json(answer: str) -> bool:
    return isinstance(json.loads(answer, parse_constant=_refuse), (dict, list))


def _refuse(constant: str):
    raise ValueError(f"{constant} is no JSON")


def _imported(spec: str) -> Callable[[str], object]:
    module, _, name = spec.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last: what is installed comes first
    try:
        function = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # a foreign module raises whatever it likes
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"{spec!r} cannot be imported ({reason}); a regular expression that looks like it is written re:{spec}"
        ) from error
    if not callable(function):
        raise ValueError(f"{spec!r} names a value of type {type(function).__name__}; expected a function of the answer")
    return function
