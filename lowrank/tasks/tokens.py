"""One face for the embedded model's bytes and for a transformers tokenizer."""

import re
from collections.abc import Sequence

BYTES = 256  # beginning, end and padding of the byte-level model come after them


def shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many ids both begin with."""
    return next((at for at, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))


class ByteTokenizer:
    """UTF-8 bytes as tokens; no chat template."""

    prefix: tuple[int, ...] = ()
    special = frozenset((BYTES, BYTES + 1, BYTES + 2))
    eos, pad = BYTES + 1, BYTES + 2
    template = None

    def encode(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < BYTES).decode("utf-8", "replace")

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Per token of encode(text) the characters [begin, end) it is of."""
        return [(at, at + 1) for at, character in enumerate(text) for _ in character.encode()]


class PretrainedTokenizer:
    """prefix: what the tokenizer puts before every text (a beginning-of-sequence token, or nothing).
    eos, pad: token ids.  special: ids of all tokens that are no text.  template: the chat template's source, or None."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        plain, special = self.encode("a"), tokenizer("a", verbose=False)["input_ids"]
        at = next((i for i in range(len(special)) if special[i : i + len(plain)] == plain), 0)
        self.prefix = tuple(special[:at])
        self.eos = tokenizer.eos_token_id
        self.special = frozenset(tokenizer.all_special_ids)
        self.pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        self.template = getattr(tokenizer, "chat_template", None)

    def encode(self, text: str | bytes) -> list[int]:
        """Without special tokens.  Raises UnicodeDecodeError for bytes that are no UTF-8."""
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """As ByteTokenizer's.  Raises NotImplementedError for a tokenizer that is no fast one."""
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        return encoded["offset_mapping"]

    @property
    def marks_turns(self) -> bool:
        """Whether the chat template says itself, by {% generation %}, what the assistant writes."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.tokenizer.get_chat_template()) is not None

    def chat(self, messages: Sequence[dict], *, ask: bool = False, **options) -> str:
        """Messages by the chat template, which brings its own beginning of sequence; ask: up to where the assistant answers.

        options: tools and the template's own variables.  What the template raises comes through.
        """
        return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask, **options)

    def turns(self, messages: Sequence[dict], **options) -> list[bool]:
        """Per token of the encoded chat(messages) whether the template marks it as the assistant's."""
        marked = self.tokenizer.apply_chat_template(
            list(messages), return_dict=True, return_assistant_tokens_mask=True, **options
        )
        return [bool(m) for m in marked["assistant_masks"]]
