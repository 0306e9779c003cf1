"""Texts as ids with their seams where the tokenizer has them: prompts, continuations, and examples that know their content."""

from collections.abc import Sequence

from .._screen import one_line
from .rows import Row
from .task import Example
from .tokens import shared


def question(tokenizer, text: str) -> tuple[int, ...]:
    """A question up to where its answer begins: by the chat template where there is one, which brings its own prefix.

    Raises: ValueError where the template refuses a question alone.
    """
    if tokenizer.template is None:
        return (*tokenizer.prefix, *tokenizer.encode(f"Question: {text}\nAnswer: "))
    messages = [{"role": "user", "content": text}]
    try:
        return tuple(tokenizer.encode(tokenizer.chat(messages, ask=True)))
    except Exception as error:  # whatever a template raises
        raise ValueError(f"the chat template refuses a question alone: {one_line(error)}") from error


def continuations(tokenizer, prompt: str, endings: Sequence[str]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """(ids of the prompt, ids of each ending), each ending as it is tokenized behind the prompt and a blank.

    A token that reaches over the seam belongs to the endings.
    """
    head, wholes = tokenizer.encode(prompt), [tokenizer.encode(f"{prompt} {ending}") for ending in endings]
    cut = min(shared(head, whole) for whole in wholes)
    return (*tokenizer.prefix, *head[:cut]), [tuple(whole[cut:]) for whole in wholes]


def ended(tokenizer, text: str) -> tuple[int, ...]:
    """The text's ids and the end of the sequence, where the tokenizer has one."""
    return (*tokenizer.encode(text), *(() if tokenizer.eos is None else (tokenizer.eos,)))


def example(
    tokenizer, head: Sequence[int], text: str, stretches: Sequence[tuple[int, int]], prompt: str = ""
) -> Example:
    """``text`` behind ``head``: the tokenizer's prefix, or a prompt's ids, which have no loss.

    content: the tokens of the stretches (begin, end) of the text, each with the blank before it.
    """
    ids = ended(tokenizer, text)
    content = [False] * (len(head) + len(ids))
    for begin, end in stretches:
        begin -= begin > 0 and text[begin - 1] == " "
        first, last = (len(head) + shared(tokenizer.encode(text[:at]), ids) for at in (begin, end))
        content[first:last] = [True] * (last - first)
    row = Row.of(head, ids) if prompt else Row((*head, *ids), (*head, *ids))
    begins = tuple(head[: len(tokenizer.prefix)]) == tokenizer.prefix  # a template may begin otherwise
    return Example(row, len(tokenizer.prefix) if begins else 0, prompt, text, tuple(content))
