"""What a valid answer is."""

import sys

import pytest

from lowrank.tasks.validity import accepts_some, validator


@pytest.mark.parametrize("answer", ['{"a": 1}', "[]", ' \n{"a": [1, {"b": null}]}\n'])
def test_json(answer):
    assert validator("json")(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "1",
        '"a"',
        "null",
        "{",
        '{"a": 1} and',
        '{"a": 1}{"b": 2}',
        "{'a': 1}",
        '{"a": NaN}',
        "[-Infinity]",
        "[" * 100_000,
    ],
)
def test_no_json(answer):
    assert not validator("json")(answer)


@pytest.mark.parametrize("spec", [r"\d+", r"re:\d+"])
def test_regular_expression_matches_the_whole_answer(spec):
    valid = validator(spec)
    assert valid("12")
    assert valid(" 12\n")  # where white space goes depends on the tokens of the prompt
    assert not valid("1 2")
    assert not valid("a12")


def test_a_regular_expression_that_looks_like_a_function_or_json():
    assert validator("re:yes:no")("yes:no")
    assert validator("re:json")("json")
    assert validator(r"\w+: yes")("fine: yes")


def test_function_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "answer_checks.py").write_text("def short(answer):\n    return len(answer) < 4\nLIMIT = 4\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    valid = validator("answer_checks:short")
    assert valid("abc")
    assert not valid("abcd")
    with pytest.raises(ValueError, match=r"'answer_checks:LIMIT' names a value of type int; expected a function"):
        validator("answer_checks:LIMIT")
    with pytest.raises(
        ValueError, match=r"'answer_checks:long' cannot be imported \(AttributeError: .*re:answer_checks:long"
    ):
        validator("answer_checks:long")


def test_a_function_that_raises_does_not_accept():
    valid = validator("ast:literal_eval")
    assert valid("[1]")
    assert not valid("[1")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("(", r"'\(' is no regular expression: missing \)"),
        ("re:[", r"'re:\[' is no regular expression"),
        ("a{99999999999999999999}", "is no regular expression"),
        ("no_such_module_here:f", r"'no_such_module_here:f' cannot be imported \(ModuleNotFoundError"),
        ("json.nowhere:f", "cannot be imported"),
    ],
)
def test_refused(spec, says):
    with pytest.raises(ValueError, match=says) as raised:
        validator(spec)
    assert "\n" not in str(raised.value)


def test_a_module_that_exits_on_import_is_refused(tmp_path, monkeypatch):
    (tmp_path / "exits_at_once.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="SystemExit: 3"):
        validator("exits_at_once:f")


def test_accepts_some():
    accepts_some(validator("json"), ["no", "{}"])
    with pytest.raises(
        ValueError, match=r"'json' accepts none of 2 training answers; the first is 'no' \(JSONDecodeError"
    ):
        accepts_some(validator("json"), ["no", "neither"])
    with pytest.raises(ValueError, match=r"accepts none of 1 training answers; the first is 'x{60}…'$"):
        accepts_some(validator(r"\d"), ["x" * 70])
