"""The examples run, at toy size, on a model and a tokenizer made on the spot."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("peft")

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def model_and_text(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    text = "def f(x):\n    return x + 1  # the next number\n" * 100
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path / "model")
    (tmp_path / "data.txt").write_text(text)
    return tmp_path / "model", tmp_path / "data.txt"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_finetune_with_trainer(model_and_text, tmp_path, capsys):
    model, data = model_and_text
    options = ["--model", model, "--data", data, "--out", tmp_path / "out", "--steps", 2, "--batch", 2, "--length", 16]
    load("finetune_with_trainer").main([str(option) for option in options])
    assert "'fallback': {}, 'untouched': {}" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
