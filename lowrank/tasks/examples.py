"""A user's examples, out of a JSONL file in TRL's formats: read, held out, and asked.

One JSON object per line, in one of three formats; all of a file are of one:

    {"text": …}                         a text; every token has a loss.
    {"prompt": …, "completion": …}      both texts, or both lists of messages; the completion has a loss.
    {"messages": [{"role": …, "content": …}, …]}    a conversation; its loss is the reader's ``loss``.

"facts": [text, …] names what an example is about and not its form: every place of it in the example is Example.content.
"tools" and "chat_template_kwargs" go to the chat template, as TRL gives them.  Other keys are nobody's business.

Texts get the tokenizer's beginning of sequence, unless they begin with it, and its end of sequence, unless they end with it.
Messages are what the chat template makes of them and nothing more.  A token of both prompt and completion is the completion's.
Ids and labels are TRL's (SFTTrainer's) but for this: what is too long is left out (TRL cuts it), a text that has its beginning
of sequence gets no second one, and a prompt that the chat template renders differently when it is asked is refused (TRL begins
the completion where the two part).
"""

import codecs
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._screen import one_line
from .chat import Chat
from .rows import IGNORED, Row
from .score import Question
from .task import Example
from .tokens import shared

LEAST = 24  # prompts that differ: four of them validate and four test, too few for a standard error below that
LOSSES = ("all", "assistant", "last")
KINDS = {("text",): "text", ("prompt", "completion"): "prompt-completion", ("messages",): "messages"}


@dataclass(frozen=True)
class Examples:
    """left_out: how many more are longer than the length.  digest: the file's sha256, first 12 digits.

    kind: "text" | "prompt-completion" | "messages".
    """

    examples: list[Example]
    left_out: int
    source: str
    digest: str
    kind: str


@dataclass(frozen=True)
class Asked(Question):
    """A question and its line in the file."""

    line: int = 0


def read(path: Path | str, tokenizer, length: int, loss: str = "all") -> Examples:
    """The file's examples of at most ``length`` tokens; longer ones are left out and counted, never cut.

    tokenizer: tokens.ByteTokenizer or tokens.PretrainedTokenizer.
    loss: of {"messages"}.  "all": every token, as TRL's SFTConfig has it by default.  "assistant": every turn of the assistant
    (TRL's assistant_only_loss=True).  "last": its last turn.  What a turn is, the template's {% generation %} says; without it,
    what follows the messages before it, rendered as the question that they are.
    Raises ValueError, in one line that names the file's, or OSError.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss {loss!r}: expected one of {', '.join(LOSSES)}")
    digest = hashlib.sha256()
    examples: list[Example] = []
    lengths: list[int] = []
    kind, first_line = "", 0
    for line, raw in _lines(path, digest.update):
        try:
            fields = _parsed(raw)
            its_kind = _kind(fields)
            if kind and its_kind != kind:
                raise ValueError(f"{its_kind}, where line {first_line} has {kind}; expected one format in a file")
            kind, first_line = its_kind, first_line or line
            example = _example(fields, its_kind, tokenizer, loss, line)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {one_line(error)}") from error
        lengths.append(len(example.row.ids))
        if lengths[-1] <= length:
            examples.append(example)
    if not lengths:
        raise ValueError(f"{path}: holds no examples; expected one JSON object per line")
    if not examples:
        raise ValueError(
            f"{path}: all {len(lengths)} examples are longer than {length} tokens; the shortest has {min(lengths)}"
        )
    return Examples(examples, len(lengths) - len(examples), str(path), digest.hexdigest()[:12], kind)


def read_questions(path: Path | str, tokenizer, length: int) -> list[Question]:
    """Questions that are never trained on: prompts with completions, or messages whose last assistant turn is the answer.

    Raises ValueError, in one line that names the file's, or OSError; for a question longer than ``length`` tokens, too.
    """
    questions: list[Question] = []
    for line, raw in _lines(path, lambda _: None):
        try:
            fields = _parsed(raw)
            kind = _kind(fields)
            if kind == "text":
                raise ValueError("a text asks nothing; expected prompt and completion, or messages")
            example = _example(fields, kind, tokenizer, "last", line)
            ids, (begin, end) = example.row.ids, example.answer
            if len(ids) > length:
                raise ValueError(f"{len(ids)} tokens; expected at most {length}")
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {one_line(error)}") from error
        questions.append(Asked(ids[:begin], ids[begin:end], line=line))
    if not questions:
        raise ValueError(f"{path}: holds no questions; expected one JSON object per line")
    return questions


def split(examples: Examples, seed: int) -> tuple[list[Example], list[Example], list[Example]]:
    """(train, validation, test), about 80, 10 and 10 %: equal prompts, and equal texts, are on one side.

    A prompt of more than a tenth of all examples trains.  Order and parts depend on the seed and the file alone.
    Raises ValueError where fewer than LEAST prompts or texts differ.
    """
    alike: dict[str, list[Example]] = {}
    for example in examples.examples:
        alike.setdefault(example.prompt or example.completion, []).append(example)
    groups, count = list(alike.values()), len(examples.examples)
    if len(groups) < LEAST:
        what = "texts" if examples.kind == "text" else "prompts"
        came = f"{count} examples" if len(groups) == count else f"{len(groups)} different {what} in {count} examples"
        came = f"all {what} of {count} examples are alike" if len(groups) == 1 < count else came
        more = f" ({examples.left_out} more are too long)" if examples.left_out else ""
        raise ValueError(
            f"{examples.source}: {came}{more}; expected at least {LEAST} different {what} to hold some out"
        )
    random.Random(seed).shuffle(groups)
    held = max(LEAST // 6, len(groups) // 10)
    small = [group for group in groups if len(group) <= max(1, count // 10)]
    large = [group for group in groups if len(group) > max(1, count // 10)]
    test, validation, train = small[:held], small[held : 2 * held], small[2 * held :] + large
    return _flat(train), _flat(validation), _flat(test)


def overlap(train: Sequence[Example], questions: Sequence[Question]) -> None:
    """Raises ValueError, naming lines, if a question asks what a training example has as its prompt, token by token."""
    trained = {example.row.ids[: example.answer[0]]: example.line for example in train}
    found = [(getattr(q, "line", 0), trained[q.prompt]) for q in questions if q.prompt in trained]
    if found:
        lines = ", ".join(f"line {line} (line {of} of the examples)" for line, of in found[:3])
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"questions that are trained on: {lines}{more}; expected prompts of their own in the test file"
        )


@dataclass
class _Encoded:
    """An example on its way.  text: (where its tokens begin in ids, itself)."""

    ids: list[int]
    labelled: list[bool]
    text: tuple[int, str]
    prompt: str
    completion: str
    answer: tuple[int, int] = (0, 0)
    prefix: int = 0


def _example(fields: dict[str, Any], kind: str, tokenizer, loss: str, line: int) -> Example:
    facts = fields.get("facts")
    if facts is not None and not (isinstance(facts, list) and all(isinstance(f, str) and f for f in facts)):
        raise ValueError('"facts": expected a list of texts that are not empty')
    if kind == "text":
        encoded = _plain(tokenizer, "", _text(fields["text"], '"text"'))
    elif kind == "messages":
        encoded = _conversation(tokenizer, _messages(fields["messages"], '"messages"'), _options(fields), loss)
    elif isinstance(fields["prompt"], list) != isinstance(fields["completion"], list):
        raise ValueError("prompt and completion: expected both texts, or both lists of messages")
    elif isinstance(fields["prompt"], list):
        prompt = _messages(fields["prompt"], '"prompt"')
        encoded = _answered(tokenizer, prompt, _messages(fields["completion"], '"completion"'), _options(fields))
    else:
        encoded = _plain(tokenizer, _text(fields["prompt"], '"prompt"'), _text(fields["completion"], '"completion"'))
    if not any(encoded.labelled[1:]):
        raise ValueError(
            "no token of it has a loss: it has one token, or the chat template marks no turn of the assistant"
        )
    labels = (i if labelled else IGNORED for i, labelled in zip(encoded.ids, encoded.labelled, strict=True))
    return Example(
        Row(tuple(encoded.ids), tuple(labels)),
        encoded.prefix,
        encoded.prompt,
        encoded.completion,
        _content(encoded, facts, tokenizer) if facts is not None else (),
        line,
        encoded.answer,
    )


def _plain(tokenizer, prompt: str, completion: str) -> _Encoded:
    """Of texts: prompt "" for one without."""
    ids, prefix = tokenizer.encode(prompt + completion), list(tokenizer.prefix)
    added = 0 if ids[: len(prefix)] == prefix else len(prefix)
    begin = shared(tokenizer.encode(prompt), ids)
    if prompt and not begin:
        raise ValueError("prompt and completion begin with one token of both; expected a longer prompt")
    if tokenizer.eos is not None and ids[-1] != tokenizer.eos:
        ids.append(tokenizer.eos)
    ids = prefix[:added] + ids
    begin = added + begin if prompt else 0
    labelled = [at >= begin for at in range(len(ids))]
    answer = (begin, len(ids)) if prompt else (0, 0)
    return _Encoded(ids, labelled, (added, prompt + completion), prompt, completion, answer, len(prefix))


def _conversation(tokenizer, messages: list[dict], options: dict[str, Any], loss: str) -> _Encoded:
    chat = Chat(tokenizer, messages, options)
    _check_assistant(chat, chat.assistant, '"messages"')
    last = chat.assistant[-1]
    if loss == "all":
        labelled = [True] * len(chat.ids)
    elif loss == "assistant":
        labelled = chat.marks or [any(at) for at in zip(*map(chat.turn, chat.assistant), strict=True)]
    else:
        labelled = chat.turn(last)
    try:
        own = chat.turn(last)
    except ValueError:
        own = []  # trained, and not asked
    answer = (own.index(True), len(own) - own[::-1].index(True)) if any(own) else (0, 0)
    return _encoded(chat, labelled, last, answer)


def _answered(tokenizer, prompt: list[dict], completion: list[dict], options: dict[str, Any]) -> _Encoded:
    """Everything that follows the prompt is its completion."""
    chat = Chat(tokenizer, prompt + completion, options)
    if completion[0]["role"] != "assistant":
        raise ValueError("the completion's first message is not the assistant's")
    _check_assistant(chat, [at for at in chat.assistant if at >= len(prompt)], '"completion"')
    begin = chat.begin(len(prompt))
    labelled = [at >= begin for at in range(len(chat.ids))]
    return _encoded(chat, labelled, len(prompt), (begin, len(chat.ids)))


def _encoded(chat: Chat, labelled: list[bool], first: int, answer: tuple[int, int]) -> _Encoded:
    """first: the completion's first message.

    The completion's text is what generating it would give, up to the end of sequence.
    """
    prefix = tuple(chat.tokenizer.prefix)
    own = len(prefix) if tuple(chat.ids[: len(prefix)]) == prefix else 0
    made = chat.ids[slice(*answer)]
    made = made[: made.index(eos)] if (eos := chat.tokenizer.eos) in made else made
    completion = chat.tokenizer.decode(made) if made else chat.messages[chat.assistant[-1]].get("content") or ""
    prompt = chat.render(first, ask=True) if first else ""
    return _Encoded(chat.ids, labelled, (0, chat.text), prompt, completion, answer, own)


def _check_assistant(chat: Chat, assistant: list[int], name: str) -> None:
    """That there is one of these messages, and that each says something, whose last word the template renders."""
    if not assistant:
        raise ValueError(f"{name} has no message of the assistant")
    for at in assistant:
        words = (chat.messages[at].get("content") or "").split()
        if not words and not chat.messages[at].get("tool_calls"):
            raise ValueError(f"message {at + 1}, the assistant's, is empty")
        if words and words[-1] not in chat.text:
            raise ValueError(f"the chat template leaves out what message {at + 1} says; expected one for texts")


def _content(encoded: _Encoded, facts: list[str], tokenizer) -> tuple[bool, ...]:
    """Every token that shares a character with a fact.  Each fact must be among what has a loss."""
    start, text = encoded.text
    content = [False] * len(encoded.ids)
    try:
        offsets = tokenizer.offsets(text)
    except NotImplementedError as error:
        raise ValueError('"facts" need a fast tokenizer') from error
    for fact in facts:
        stretches = [match.span() for match in re.finditer(re.escape(fact), text)]
        places = [
            start + at for at, (begin, end) in enumerate(offsets) if any(begin < b and end > a for a, b in stretches)
        ]
        if not any(encoded.labelled[at] for at in places):
            raise ValueError(f'"facts": {fact!r} is not in what has a loss')
        for at in places:
            content[at] = True
    return tuple(content)


def _lines(path: Path | str, update: Callable[[bytes], None]) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of each line that is not blank, without a byte order mark."""
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                update(raw)
                raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
                if raw.strip():
                    yield number, raw
    except OSError as error:
        raise type(error)(f"{path}: cannot be read: {error.strerror or error}; expected a JSONL file") from error


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw.rstrip().decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8: {error.reason} at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"broken JSON: {error.msg} at column {error.colno}; expected one JSON object per line"
        ) from error
    except RecursionError as error:
        raise ValueError("broken JSON: nested too deeply") from error
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON {type(fields).__name__}; expected an object per line")
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return fields


def _kind(fields: dict[str, Any]) -> str:
    keys = tuple(key for key in ("text", "prompt", "completion", "messages") if key in fields)
    if keys not in KINDS:
        came = " and ".join(keys) or (f"the keys {', '.join(map(repr, list(fields)[:5]))}" if fields else "no keys")
        raise ValueError(f"expected text, or prompt and completion, or messages; got {came}")
    return KINDS[keys]


def _text(value: Any, name: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is a {type(value).__name__}; expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half of a surrogate pair at character {error.start + 1}") from error
    if not value.strip() and not empty:
        raise ValueError(f"{name} is empty; expected text")
    return value


def _messages(value: Any, name: str) -> list[dict]:
    if not isinstance(value, list) or not value:
        came = "is empty" if value == [] else f"is a {type(value).__name__}"
        raise ValueError(f"{name} {came}; expected a list of messages")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f'message {number} of {name}: expected an object with a "role" and a "content"')
        if not (message.get("content") is None and message.get("tool_calls")):
            _text(message.get("content"), f'"content" of message {number} of {name}', empty=True)
    return value


def _options(fields: dict[str, Any]) -> dict[str, Any]:
    """What TRL gives to the chat template: tools, as a list or as JSON, and chat_template_kwargs."""
    tools, options = fields.get("tools"), fields.get("chat_template_kwargs") or {}
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise ValueError(f'"tools" holds broken JSON: {error}') from error
    if not isinstance(options, dict) or not isinstance(tools, (list, type(None))):
        raise ValueError("expected a list of tools, and chat_template_kwargs as an object")
    return {**options, **({"tools": tools} if tools else {})}


def _flat(groups: list[list[Example]]) -> list[Example]:
    return [example for group in groups for example in group]
