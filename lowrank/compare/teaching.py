"""The tasks of a comparison, from its settings: generated, or out of the user's files."""

import hashlib
from collections.abc import Callable

from ..tasks import examples as own_examples
from ..tasks.format import Format
from ..tasks.knowledge import Knowledge
from ..tasks.own import OwnFormat, OwnKnowledge, Parts, Text
from ..tasks.rows import rows_of
from ..tasks.task import Example, Task
from ..tasks.validity import accepts_some, validator
from .data import Subject, corpus, library_text
from .settings import Settings, is_examples

Teach = Callable[[int], Task]  # seed -> what is taught with it


def teachings(settings: Settings, subject: Subject) -> dict[str, Teach]:
    """Every task's factory.  What is wrong with a file raises here, before anything trains, naming file and line."""
    if is_examples(settings.data):
        return _of_examples(settings, subject)
    if settings.data is not None and (others := [name for name in settings.tasks if name != "text"]):
        raise ValueError(
            f"--task {others[0]} with --data {settings.data}: running text can only be the task text; expected "
            "examples (.jsonl), or no --data for a generated task"
        )
    length, tokenizer = subject.length, subject.tokenizer
    chosen: dict[str, Teach] = {}
    for name in settings.tasks:
        if name == "text":
            own = corpus(
                settings.data, "standard library source", library_text, tokenizer, length, settings.eval_sequences
            )
            prefix = len(tokenizer.prefix)
            blocks = ([Example(row, prefix) for row in rows_of(b)] for b in (own.train, own.validation, own.test))
            parts = Parts(own.source, own.digest, *blocks)
            chosen[name] = lambda seed, parts=parts: Text(parts, tokenizer.pad, seed)
        else:
            chosen[name] = lambda seed, name=name: generated(name, settings, tokenizer, length, seed)
            chosen[name](settings.seed)  # what does not fit the length is said now
    return chosen


def generated(name: str, settings: Settings, tokenizer, length: int, seed: int) -> Task:
    """Raises: ValueError where a row of it is longer than the length."""
    if name == "knowledge":
        return Knowledge(tokenizer, length, seed, settings.people)
    return Format(tokenizer, length, seed, settings.pairs)


def _of_examples(settings: Settings, subject: Subject) -> dict[str, Teach]:
    tokenizer, length = subject.tokenizer, subject.length
    read = own_examples.read(settings.data, tokenizer, length, settings.loss or "all")
    train, validation, test = own_examples.split(read, settings.seed)
    most = settings.eval_sequences
    questions = own_examples.read_questions(settings.test, tokenizer, length) if settings.test else []
    own_examples.overlap(read.examples, questions)
    valid = validator(settings.valid) if settings.valid else None
    if valid:
        accepts_some(valid, [example.completion for example in train])
    digest = read.digest
    if settings.test:
        digest += "+" + hashlib.sha256(settings.test.read_bytes()).hexdigest()[:12]
    source = f"{read.source}, {len(read.examples)} examples"
    source += f", {read.left_out} more too long" if read.left_out else ""
    source += f", {len(questions)} questions" if questions else ""
    parts, pad = Parts(source, digest, train, validation[:most], test[:most]), tokenizer.pad
    make: dict[str, Teach] = {
        "text": lambda seed: Text(parts, pad, seed),
        "knowledge": lambda seed: OwnKnowledge(parts, tokenizer, seed, questions, most),
        "format": lambda seed: OwnFormat(parts, tokenizer, seed, valid),
    }
    chosen = {name: make[name] for name in settings.tasks}
    for teach in chosen.values():
        teach(settings.seed)  # what cannot be asked is said now
    return chosen
