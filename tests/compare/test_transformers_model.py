"""--model: a directory with a tokenizer trained here, and a user's text."""

import json

import pytest

from lowrank.cli import compare

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
    options += ("--rates", "full=0.001", "--rates", "lora=0.01")
    assert compare.main(parse(*options, "--methods", "full,lora", "--steps", 6, "--rank", 2, "--dtype", dtype)) == 0
    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert result["settings"]["length"] == 48  # the model's own maximum
    assert result["settings"]["dtype"] == dtype
    assert result["answer"][0].startswith(f"Taught to {model_directory}, ")
    assert not result["model"]["embedded"]


def test_tokenizer_larger_than_the_embedding(parse, model_directory, tmp_path):
    config = transformers.LlamaConfig(vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                      num_attention_heads=2, max_position_embeddings=48)  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(model_directory)
    with pytest.raises(ValueError, match="its embedding has only 16 rows"):
        compare.main(parse("--model", model_directory, "--device", "cpu"))


def refused(model_directory, capsys) -> str:
    """The one line that a run on the directory ends with."""
    from lowrank import cli

    out = model_directory.parent / "out"
    assert cli.main(["compare", "--model", str(model_directory), "--device", "cpu", "--out", str(out)]) == 2
    assert not out.exists()
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("lowrank compare: error: --model ")
    return line


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_a_part_of_a_checkpoint_is_refused(model_directory, capsys, share):
    file = model_directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    assert "transformers cannot load a causal model and tokenizer: SafetensorError: " in refused(
        model_directory, capsys
    )


def changed(model_directory, change):
    from safetensors.torch import load_file, save_file

    file = model_directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(model_directory, capsys, value):
    changed(model_directory, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"][3, 4].fill_(value))
    assert "model.layers.0.mlp.up_proj.weight holds NaN or infinity" in refused(model_directory, capsys)


def test_a_model_without_a_finite_loss_is_refused(model_directory, capsys):
    changed(model_directory, lambda tensors: tensors["lm_head.weight"].fill_(3e38))
    assert "before any training" in refused(model_directory, capsys)


def test_an_encoder_is_refused(model_directory, capsys):
    config = transformers.BertConfig(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                     num_attention_heads=2, max_position_embeddings=48)  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(model_directory)
    assert "BertLMHeadModel sees the tokens it is to predict" in refused(model_directory, capsys)


def test_without_a_tokenizer(model_directory, capsys):
    for file in model_directory.glob("tokenizer*"):
        file.unlink()
    assert "transformers cannot load a causal model and tokenizer" in refused(model_directory, capsys)


def test_an_unknown_architecture_is_refused(model_directory, capsys):
    config = json.loads((model_directory / "config.json").read_text())
    (model_directory / "config.json").write_text(json.dumps({**config, "model_type": "nobodys"}))
    assert "model type `nobodys`" in refused(model_directory, capsys)


def test_a_head_that_the_checkpoint_lacks_is_named(parse, model_directory, tmp_path, capsys):
    changed(model_directory, lambda tensors: tensors.pop("lm_head.weight"))
    (tmp_path / "text.txt").write_text("Sphinx of black quartz, judge my vow.\n" * 300)
    files = ("--model", model_directory, "--data", tmp_path / "text.txt", "--general-data", tmp_path / "text.txt")
    options = ("--methods", "svf", "--steps", 6, "--rank", 2, "--device", "cpu", "--out", tmp_path / "out")
    options += ("--rates", "svf=0.1")
    assert compare.main(parse(*files, *options)) == 0
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["model"]["invented"] == ["lm_head.weight"]
    assert "checkpoint has no lm_head.weight" in (tmp_path / "out" / "compare.md").read_text()
    assert "checkpoint has no lm_head.weight" in " ".join(capsys.readouterr().err.split())
