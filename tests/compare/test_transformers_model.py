"""--model: a directory with a tokenizer trained here, and a user's text."""

import json

import pytest

from lowrank import compare

transformers = pytest.importorskip("transformers")


@pytest.fixture
def model_directory(tmp_path, save_tokenizer):
    save_tokenizer(tmp_path / "model")
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=48,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_runs_on_a_saved_model_and_a_text_file(parse, model_directory, tmp_path, dtype):
    (tmp_path / "text.txt").write_text("Sphinx of black quartz, judge my vow: größer, schöner.\n" * 300)
    options = (
        "--model",
        model_directory,
        "--data",
        tmp_path / "text.txt",
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
    )
    assert compare.main(parse(*options, "--methods", "full,lora", "--steps", 6, "--rank", 2, "--dtype", dtype)) == 0
    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert result["settings"]["length"] == 48  # the model's own maximum
    assert result["settings"]["dtype"] == dtype
    assert result["verdict"][0].startswith("One model (")
    assert not result["model"]["embedded"]


def test_tokenizer_larger_than_the_embedding(parse, model_directory, tmp_path):
    config = transformers.LlamaConfig(vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                      num_attention_heads=2, max_position_embeddings=48)  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(model_directory)
    with pytest.raises(ValueError, match="its embedding has only 16 rows"):
        compare.main(parse("--model", model_directory, "--device", "cpu"))
