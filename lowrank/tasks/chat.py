"""Messages as a chat template renders them, and where the assistant's turns stand in that."""

from collections.abc import Callable
from typing import Any

from .._screen import one_line
from .tokens import shared


class Chat:
    """Messages rendered as a whole, and where single turns stand in it."""

    def __init__(self, tokenizer, messages: list[dict], options: dict[str, Any]):
        if tokenizer.template is None:
            raise ValueError("messages need a chat template, and the tokenizer has none; expected texts")
        self.tokenizer, self.messages, self.options = tokenizer, messages, options
        self.text = self.render(len(messages), ask=False)
        self.ids = tokenizer.encode(self.text)
        self.marks = self._by_template(tokenizer.turns) if tokenizer.marks_turns else None
        self.assistant = [at for at, message in enumerate(messages) if message["role"] == "assistant"]

    def render(self, count: int, *, ask: bool) -> str:
        """The first messages, as a question or as they are."""
        return self._by_template(self.tokenizer.chat, count, ask=ask)

    def _by_template(self, method: Callable, count: int | None = None, **how):
        try:
            return method(self.messages[:count], **how, **self.options)
        except Exception as error:  # templates raise whatever they like
            raise ValueError(f"the chat template refuses these messages: {one_line(error)}") from error

    def begin(self, message: int) -> int:
        """Where an assistant's message begins: behind the question before it or, if that is no prefix, where the template
        marks it.  A token that reaches over the seam is the assistant's."""
        asked = self._prefix(message, ask=True) if message else None
        if asked is not None:
            return asked
        if self.marks is not None:
            starts = [at for at, mark in enumerate(self.marks) if mark and not (at and self.marks[at - 1])]
            if len(starts) == len(self.assistant):
                return starts[self.assistant.index(message)]
        if not message:
            raise ValueError("the first message is the assistant's; expected one that it answers")
        raise ValueError(
            f"the chat template renders what comes before message {message + 1} differently when it is asked (as "
            "templates do that strip thinking): where the answer begins is not known; expected a template with "
            "{% generation %}, or prompt and completion as texts"
        )

    def end(self, message: int) -> int:
        if message == len(self.messages) - 1:
            return len(self.ids)
        end = self._prefix(message + 1, ask=False)
        if end is None:
            raise ValueError(
                f"the chat template renders message {message + 1} differently when others follow: where it ends is not "
                "known; expected a template with {% generation %}, a loss on the last turn alone, or on all"
            )
        return end

    def _prefix(self, count: int, *, ask: bool) -> int | None:
        """How many ids the first messages are; None if the whole does not begin with them."""
        text = self.render(count, ask=ask)
        return shared(self.tokenizer.encode(text), self.ids) if self.text.startswith(text) else None

    def turn(self, message: int) -> list[bool]:
        """Per id whether the assistant writes it in this message; by a template's marks, also in those behind it."""
        begin = self.begin(message)
        if self.marks is None:
            end = self.end(message)
            return [begin <= at < end for at in range(len(self.ids))]
        return [mark and at >= begin for at, mark in enumerate(self.marks)]
