"""Text to blocks of tokens, and the model that reads them: the embedded byte-level one, or a transformers directory."""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .settings import Embedded, Settings

LIBRARY_BYTES = 1_000_000  # of source code: more than any default run reads
EVALUATED = 64  # held-out sequences per domain, split and evaluation
LEAST_BLOCKS = 80  # leaves eight sequences to test on, too few for a standard error below that


@dataclass(frozen=True)
class Corpus:
    """One domain.  train, validation, test: int64 [blocks, length]; validation picks rates, test is reported."""

    source: str
    digest: str
    train: Tensor
    validation: Tensor
    test: Tensor


@dataclass(frozen=True)
class Subject:
    """What is adapted: a model on the CPU, the text it knows (general) and the text it shall learn (new)."""

    name: str
    model: nn.Module
    general: Corpus
    new: Corpus
    batch: int
    embedded: bool
    invented: tuple[str, ...] = ()  # parameters that the checkpoint lacks and transformers made up

    @property
    def length(self) -> int:
        return self.new.train.shape[1]


def embedded_config(size: Embedded = Embedded()):  # noqa: B008 (frozen)
    """transformers.LlamaConfig of the embedded model: 256 bytes and three special tokens."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=259,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=max(size.length, 128),
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        use_cache=False,
    )


def load(settings: Settings) -> Subject:
    """Model (untrained where embedded) and both corpora.  What is missing, unreadable or too short raises here."""
    invented = ()
    if settings.model is None:
        from transformers import LlamaForCausalLM

        torch.manual_seed(settings.seed)
        model, tokenize = LlamaForCausalLM(embedded_config(settings.embedded)), _bytes
        name, batch, length = "embedded byte-level Llama", settings.embedded.batch, settings.embedded.length
    else:
        model, tokenize, invented = _pretrained(settings)
        name, batch = settings.model, 8
        length = min(256, getattr(model.config, "max_position_embeddings", None) or 256)
    general = _corpus(settings.general_data, "pydoc_data.topics", topics_text, tokenize, length)
    new = _corpus(settings.data, "standard library source", library_text, tokenize, length)
    rows = model.get_input_embeddings().num_embeddings
    most = max(int(part.max()) for corpus in (general, new) for part in (corpus.train, corpus.validation, corpus.test))
    if most >= rows:
        raise ValueError(f"--model {name}: its tokenizer gives token {most}, its embedding has only {rows} rows")
    return Subject(name, model, general, new, batch, settings.model is None, invented)


def _pretrained(settings: Settings):
    """(model, tokenize, names of the parameters that its checkpoint lacks).  Raises OSError or ValueError, in one line."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        model, info = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=getattr(torch, settings.dtype), output_loading_info=True
        )
    except Exception as error:  # a damaged or foreign file raises whatever its reader does
        raise OSError(
            f"--model {settings.model}: transformers cannot load a causal model and tokenizer: {one_line(error)}"
        ) from error
    floats = {name: p for name, p in model.named_parameters() if p.is_floating_point() and p.dtype.itemsize > 1}
    if odd := [name for name, p in floats.items() if not p.isfinite().all()]:
        more = f" and {len(odd) - 1} others hold" if len(odd) > 1 else " holds"
        raise ValueError(f"--model {settings.model}: {odd[0]}{more} NaN or infinity")

    def tokenize(text: bytes) -> Tensor:
        ids = tokenizer(text.decode("utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    return model, tokenize, tuple(sorted(info["missing_keys"]))


def one_line(error: BaseException, longest: int = 400) -> str:
    """What an exception says; its type too where the message does not speak for itself."""
    text = " ".join(str(error).split())
    text = text if len(text) <= longest else text[:longest] + " …"
    plain = isinstance(error, (ValueError, TypeError, OSError, ImportError)) and text
    return text if plain else f"{type(error).__name__}: {text}"


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long() if text else torch.empty(0, dtype=torch.int64)


def topics_text() -> bytes:
    """The documentation topics behind Python's own help(): English prose about Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics)).encode()


def library_text() -> bytes:
    """The standard library's public top-level modules in order of name, until LIBRARY_BYTES."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        text += path.read_bytes() + b"\n\n"
        if len(text) >= LIBRARY_BYTES:
            break
    return bytes(text[:LIBRARY_BYTES])


def _corpus(path: Path | None, builtin: str, text_of, tokenize, length: int) -> Corpus:
    source = str(path) if path else builtin
    text = path.read_bytes() if path else text_of()
    try:
        tokens = tokenize(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: expected UTF-8 text for the model's tokenizer ({error})") from error
    return split(tokens, length, source, hashlib.sha256(text).hexdigest()[:12])


def split(tokens: Tensor, length: int, source: str, digest: str = "") -> Corpus:
    """Pack tokens [n] into blocks [n // length, length]; of every ten stretches, one validates and one tests."""
    count = tokens.numel() // length
    if count < LEAST_BLOCKS:
        raise ValueError(
            f"{source}: {tokens.numel()} tokens are too few to train and test on; "
            f"expected at least {LEAST_BLOCKS * length} ({LEAST_BLOCKS} sequences of {length})"
        )
    blocks = tokens[: count * length].view(count, length)
    stretch = (
        torch.arange(count) // (count // 40 or 1) % 10
    )  # long stretches: few sequences have a neighbour in training
    return Corpus(source, digest, blocks[stretch < 8], _spread(blocks[stretch == 8]), _spread(blocks[stretch == 9]))


def _spread(blocks: Tensor) -> Tensor:
    """At most EVALUATED of them, evenly spaced."""
    return blocks[torch.linspace(0, len(blocks) - 1, min(EVALUATED, len(blocks))).long()]


def batches(blocks: Tensor, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """steps batches int64 [batch, length]: one order per seed, every block once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-batch * steps // len(blocks))
    order = torch.cat([torch.randperm(len(blocks), generator=generator) for _ in range(epochs)])
    for step in range(steps):
        yield blocks[order[step * batch : (step + 1) * batch]]
