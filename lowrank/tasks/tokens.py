"""One face for the embedded model's bytes and for a transformers tokenizer."""

from collections.abc import Sequence

BYTES = 256  # beginning, end and padding of the byte-level model come after them


class ByteTokenizer:
    """UTF-8 bytes as tokens; no chat template."""

    prefix: tuple[int, ...] = ()
    eos, pad = BYTES + 1, BYTES + 2
    template = None

    def encode(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < BYTES).decode("utf-8", "replace")


class PretrainedTokenizer:
    """prefix: what the tokenizer puts before every text (a beginning-of-sequence token, or nothing).
    eos, pad: token ids.  template: the chat template's source, or None."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        plain, special = self.encode("a"), tokenizer("a", verbose=False)["input_ids"]
        at = next((i for i in range(len(special)) if special[i : i + len(plain)] == plain), 0)
        self.prefix = tuple(special[:at])
        self.eos = tokenizer.eos_token_id
        self.pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        self.template = getattr(tokenizer, "chat_template", None)

    def encode(self, text: str | bytes) -> list[int]:
        """Without special tokens.  Raises UnicodeDecodeError for bytes that are no UTF-8."""
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)
