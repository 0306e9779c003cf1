"""The command's own parser, without a command line."""

import argparse

import pytest

from lowrank.cli import compare


@pytest.fixture(scope="session")
def parse():
    def parse(*argv) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        compare.add_arguments(parser)
        return parser.parse_args([str(a) for a in argv])

    return parse


@pytest.fixture(scope="session")
def save_tokenizer():
    """Writes a tokenizer of 300 tokens, trained here, beside a model."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")

    def save(path) -> None:
        text = ["The quick brown fox jumps over the lazy dog. "] * 50
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<unk>", "</s>"], initial_alphabet=alphabet
        )
        tokenizer.train_from_iterator(text, trainer)
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
        ).save_pretrained(path)

    return save
