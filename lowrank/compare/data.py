"""The model, the text it knows, and blocks of tokens: the embedded byte-level model, or a transformers directory."""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .._screen import one_line
from ..tasks.rows import Batch, Row, orders
from ..tasks.task import Example
from ..tasks.tokens import ByteTokenizer, PretrainedTokenizer
from .settings import Embedded, Settings
from .smollm2 import fetched

LIBRARY_BYTES = 1_000_000  # of source code: more than any default run reads
PASSAGE = 64  # tokens of running text that are shown as one example
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
    """What is adapted: a model on the CPU, its tokenizer, and the text it knows (general).  length: tokens of a sequence."""

    name: str
    model: nn.Module
    tokenizer: ByteTokenizer | PretrainedTokenizer
    general: Corpus
    batch: int
    length: int
    embedded: bool
    invented: tuple[str, ...] = ()  # parameters that the checkpoint lacks and transformers made up


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
        max_position_embeddings=2 * max(size.length, 128),  # a generated answer may be longer than what was trained
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        use_cache=False,
    )


def load(settings: Settings) -> Subject:
    """Model (untrained where embedded) and the general text.  What is missing, unreadable or too short raises here."""
    invented = ()
    if settings.model is None:
        from transformers import LlamaForCausalLM

        torch.manual_seed(settings.seed)
        model, tokenizer = LlamaForCausalLM(embedded_config(settings.embedded)), ByteTokenizer()
        name, batch, length = "embedded byte-level Llama", settings.embedded.batch, settings.embedded.length
    else:
        model, tokenizer, invented = pretrained(settings.model, settings.dtype)
        name, batch, length = settings.model, 8, 256
    longest = getattr(model.config, "max_position_embeddings", None) or length
    if settings.length and settings.length > longest:
        raise ValueError(f"--seq {settings.length}: expected at most {longest}, the positions of {name}")
    length, batch = settings.length or min(length, longest), settings.batch or batch
    general = corpus(
        settings.general_data, "pydoc_data.topics", topics_text, tokenizer, length, settings.eval_sequences
    )
    fits(model, name, general.train, general.validation, general.test)
    return Subject(name, model, tokenizer, general, batch, length, settings.model is None, invented)


def general_corpus(settings: Settings, tokenizer, length: int) -> Corpus:
    return corpus(settings.general_data, "pydoc_data.topics", topics_text, tokenizer, length, settings.eval_sequences)


def fits(model: nn.Module, name: str, *ids: Tensor) -> None:
    """Raises ValueError if a token has no row in the model's embedding."""
    rows, most = model.get_input_embeddings().num_embeddings, max(int(part.max()) for part in ids)
    if most >= rows:
        raise ValueError(f"--model {name}: its tokenizer gives token {most}, its embedding has only {rows} rows")


def pretrained(name: str, dtype: str):
    """(model, tokenizer, names of the parameters that its checkpoint lacks).  Raises OSError or ValueError, in one line."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = fetched(name)
    try:
        tokenizer = PretrainedTokenizer(AutoTokenizer.from_pretrained(path))
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), output_loading_info=True)
    except Exception as error:  # a damaged or foreign file raises whatever its reader does
        raise OSError(
            f"--model {name}: transformers cannot load a causal model and tokenizer: {one_line(error)}"
        ) from error
    floats = {name: p for name, p in model.named_parameters() if p.is_floating_point() and p.dtype.itemsize > 1}
    if odd := [name for name, p in floats.items() if not p.isfinite().all()]:
        more = f" and {len(odd) - 1} others hold" if len(odd) > 1 else " holds"
        raise ValueError(f"--model {name}: {odd[0]}{more} NaN or infinity")
    model.config.use_cache = False
    return model, tokenizer, tuple(sorted(info["missing_keys"]))


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


def corpus(path: Path | None, builtin: str, text_of, tokenizer, length: int, evaluated: int) -> Corpus:
    """A file's text, or the built-in one, in blocks of ``length`` tokens that begin as the tokenizer begins a text."""
    source = str(path) if path else builtin
    text = path.read_bytes() if path else text_of()
    try:
        tokens = torch.tensor(tokenizer.encode(text), dtype=torch.int64)
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: expected UTF-8 text for the model's tokenizer ({error})") from error
    return split(tokens, length, source, hashlib.sha256(text).hexdigest()[:12], tokenizer.prefix, evaluated)


def split(
    tokens: Tensor, length: int, source: str, digest: str = "", prefix: tuple[int, ...] = (), evaluated: int = 64
) -> Corpus:
    """Pack tokens [n] into blocks of ``length``, each after the prefix; of every ten stretches, one validates and one tests,
    ``evaluated`` blocks at most."""
    own = length - len(prefix)
    count = tokens.numel() // own
    if count < LEAST_BLOCKS:
        raise ValueError(
            f"{source}: {tokens.numel()} tokens are too few to train and test on; "
            f"expected at least {LEAST_BLOCKS * own} ({LEAST_BLOCKS} sequences of {length})"
        )
    blocks = tokens[: count * own].view(count, own)
    blocks = torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(count, -1), blocks], 1)
    stretch = (
        torch.arange(count) // (count // 40 or 1) % 10
    )  # long stretches: few sequences have a neighbour in training
    parts = (_spread(blocks[stretch == which], evaluated) for which in (8, 9))
    return Corpus(source, digest, blocks[stretch < 8], *parts)


def blocks(path: Path, tokenizer, length: int) -> list[Example]:
    """A text's passages of ``length`` tokens, as examples."""
    try:
        tokens = tokenizer.encode(path.read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text for the model's tokenizer ({error})") from error
    own, prefix = length - len(tokenizer.prefix), tokenizer.prefix
    cut = [(*prefix, *tokens[at : at + own]) for at in range(0, len(tokens) - own + 1, own)]
    if len(cut) < 2:
        raise ValueError(f"{path}: {len(tokens)} tokens are too few; expected at least two passages of {length}")
    return [Example(Row(ids, ids), len(prefix)) for ids in cut]


def _spread(blocks: Tensor, most: int) -> Tensor:
    """At most so many of them, evenly spaced."""
    return blocks[torch.linspace(0, len(blocks) - 1, min(most, len(blocks))).long()]


def batches(blocks: Tensor, batch: int, steps: int, seed: int) -> Iterator[Batch]:
    """``steps`` batches of blocks int64 [n, length]: one order per seed, every block once before any comes again."""
    for indices in orders(len(blocks), batch, steps, seed):
        yield Batch(blocks[indices], blocks[indices])
