"""Tokenizers trained here, and models that know what is planted in them."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lowrank.tasks.material import FIRST_NAMES, LAST_NAMES, POOLS, TRAINED
from lowrank.tasks.tokens import ByteTokenizer, PretrainedTokenizer

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session", params=["bytes", "bpe"])
def tokenizer(request):
    """Bytes, and a BPE of words and their parts that puts <s> before every text and has a chat template."""
    if request.param == "bytes":
        return ByteTokenizer()
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet)
    words = itertools.chain(FIRST_NAMES, LAST_NAMES, *POOLS.values(), *TRAINED.values())
    bpe.train_from_iterator([f" {word}" for word in words], trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<|im_end|>")
    made.chat_template = CHATML
    return PretrainedTokenizer(made)


class Planted(nn.Module):
    """Continues as the first of its rows that begins so, and gives every other token one chance in e²⁰; else knows nothing."""

    def __init__(self, rows, vocabulary: int = 1000):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))
        self.vocabulary, self.next = vocabulary, {}
        for ids in rows:
            for at in range(1, len(ids)):
                self.next.setdefault(tuple(ids[:at]), ids[at])

    def forward(self, input_ids, attention_mask=None):
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        for row, ids in enumerate(input_ids.tolist()):
            for at in range(len(ids)):
                if (token := self.next.get(tuple(ids[: at + 1]))) is not None:
                    logits[row, at, token] = 20.0
        return SimpleNamespace(logits=logits)

    def generate(self, input_ids, attention_mask, max_new_tokens, **options):
        rows = []
        for padded, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            ids = [token for token, real in zip(padded, mask, strict=True) if real]
            made = []
            for _ in range(max_new_tokens):
                made.append(self.next.get((*ids, *made), 0))
            rows.append(padded + made)
        return torch.tensor(rows)


@pytest.fixture(scope="session")
def planted():
    return Planted


@pytest.fixture(scope="session")
def llama():
    """A tiny Llama with random weights, in training mode."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).train()
