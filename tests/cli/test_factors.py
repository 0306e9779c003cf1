import json
import os
import subprocess
import sys

import pytest
import torch

from lowrank import cli
from lowrank.adapters.factor_files import load_factors, save_factors

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=60)


def llama(dtype=torch.bfloat16, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES | changes)).to(dtype)


def loaded(path, **kwargs):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def run(*arguments):
    return cli.main(["tools", "factors", *map(str, arguments)])


def edit_config(path, **changes):
    file = path / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture
def checkpoint(tmp_path):
    llama().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def never_loaded(monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("the model was loaded"))


@pytest.mark.parametrize("shards", ["1GB", "10KB"])
def test_a_checkpoint_without_loading_it(tmp_path, request, capsys, shards):
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "m", max_shard_size=shards)
    assert (tmp_path / "m" / "model.safetensors").exists() is (shards == "1GB")
    expected = save_factors(model, tmp_path / "expected", progress=False)
    request.getfixturevalue("never_loaded")
    assert run(tmp_path / "m", "--out", tmp_path / "f") == 0
    assert (tmp_path / "f").read_bytes() == expected.read_bytes()
    request.getfixturevalue("monkeypatch").undo()
    assert len(load_factors(tmp_path / "f", loaded(tmp_path / "m"))) == 14
    table = capsys.readouterr().out
    assert "gate_proj" in table
    assert f"{(tmp_path / 'f').stat().st_size:,} bytes" in table
    assert max(map(len, table.splitlines()[:-1])) <= 112
    assert "…" not in table


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_in_the_dtype_that_from_pretrained_gives(tmp_path, never_loaded, monkeypatch, stored):
    llama(stored).save_pretrained(tmp_path / "m")
    edit_config(tmp_path / "m", dtype="bfloat16")
    assert run(tmp_path / "m", "--out", tmp_path / "f", "--k", 4) == 0
    monkeypatch.undo()
    load_factors(tmp_path / "f", loaded(tmp_path / "m"))
    with pytest.raises(ValueError, match=r"q_proj is float32: load the model with dtype=torch\.bfloat16"):
        load_factors(tmp_path / "f", loaded(tmp_path / "m", dtype=torch.float32))


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["q_proj", "mlp.up_proj"], {"q_proj", "up_proj"}),
        (["lm_head"], {"lm_head"}),
        ([r"model\.layers\.1\.self_attn\..*"], {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (["model.layers.0.mlp.down_proj"], {"down_proj"}),
    ],
)
def test_target_modules(tmp_path, checkpoint, never_loaded, targets, names):
    assert run(checkpoint, "--out", tmp_path / "f", "--k", 2, "--target-modules", *targets) == 0
    assert {name.rpartition(".")[2] for name in load_factors(tmp_path / "f")} == names


def test_options(tmp_path, checkpoint, never_loaded):
    out = tmp_path / "f"
    assert run(checkpoint, "--out", out, "--k", 5, "--method", "svd", "--dtype", "float64", "--device", "cpu") == 0
    file = load_factors(out)
    assert {(facts["k"], facts["method"]) for facts in file.layers.values()} == {(5, "svd")}
    assert file["model.layers.0.mlp.up_proj"].U.dtype is torch.float64


def bin_files(path):
    torch.save(llama().state_dict(), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (bin_files, "no safetensors"),
        (lambda path: edit_config(path, dtype=None), "its configuration has no dtype"),
    ],
)
def test_what_is_not_stored_as_it_is_loaded(tmp_path, checkpoint, capsys, change, reason):
    change(checkpoint)
    assert run(checkpoint, "--out", tmp_path / "f", "--k", 3) == 0
    assert f"loading the whole model: {reason}" in capsys.readouterr().err
    assert len(load_factors(tmp_path / "f", loaded(checkpoint))) == 14


def test_a_model_with_fused_experts(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = SIZES | dict(num_key_value_heads=2, num_local_experts=2)
    MixtralForCausalLM(MixtralConfig(**sizes)).save_pretrained(tmp_path / "m")
    assert run(tmp_path / "m", "--out", tmp_path / "f", "--k", 3) == 0
    load_factors(tmp_path / "f", loaded(tmp_path / "m"))


@pytest.mark.parametrize("cut", [lambda t: None, lambda t: t[:5].clone()], ids=["lost", "of another shape"])
def test_weights_that_loading_would_make_up(tmp_path, checkpoint, capsys, cut):
    from safetensors.torch import load_file, save_file

    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.1.mlp.up_proj.weight"
    tensors[key] = cut(tensors[key])
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, file, {"format": "pt"})
    assert run(checkpoint, "--out", tmp_path / "f") == 2
    assert not (tmp_path / "f").exists()
    assert (
        "lacks the weights of 1 layers, or has others in their place, such as model.layers.1.mlp.up_proj"
        in capsys.readouterr().err
    )


def test_a_base_model_saved_without_its_prefix(tmp_path, never_loaded, monkeypatch):
    llama().model.save_pretrained(tmp_path / "m")
    assert run(tmp_path / "m", "--out", tmp_path / "f", "--k", 3) == 0
    monkeypatch.undo()
    load_factors(tmp_path / "f", loaded(tmp_path / "m"))


def test_conv1d(tmp_path, never_loaded, monkeypatch):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30)).save_pretrained(tmp_path / "m")
    assert run(tmp_path / "m", "--out", tmp_path / "f") == 0
    monkeypatch.undo()
    file = load_factors(tmp_path / "f", loaded(tmp_path / "m"))
    assert file["transformer.h.0.attn.c_attn"].U.shape == (48, 16)


def test_interrupted_and_continued(tmp_path, checkpoint, capsys):
    out = tmp_path / "f"
    code = """
import os, signal, sys
from lowrank import cli
from lowrank.adapters import factor_files
real, calls = factor_files.svd_factors, []
def killed(*args, **kwargs):
    calls.append(0)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
factor_files.svd_factors = killed
cli.main(sys.argv[1:])
"""
    command = ["tools", "factors", str(checkpoint), "--out", str(out)]
    assert subprocess.run([sys.executable, "-c", code, *command]).returncode == -9
    assert not out.exists()
    assert run(*command[2:]) == 0
    assert "5 of 14 layers were there from an interrupted run" in capsys.readouterr().out
    load_factors(out, loaded(checkpoint))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at-all"], "no config for 'nowhere/at-all'"),
        ([""], "MODEL: expected a checkpoint's folder or a hub id, got an empty string"),
        (["llama-3.2-1b"], "llama-3.2-1b is a built-in shape without weights"),
        (["{empty}"], "no config for"),
        (["{file}"], "config.json is a file"),
        (["{checkpoint}", "--k", "0"], "--k: expected a positive integer, got 0"),
        (["{checkpoint}", "--k", "33"], "min(N, K) = 32, or None, got 33"),
        (["{checkpoint}", "--target-modules", "q_prj"], "no module of LlamaForCausalLM is called 'q_prj'"),
        (["{checkpoint}", "--target-modules", "("], "'(' is not a regular expression"),
        (["{checkpoint}", "--target-modules", "q_proj", "mlp"], "matches the LlamaMLP model.layers.0.mlp"),
        (["{checkpoint}", "--out", "{empty}"], "expected a file name to write to, got a directory"),
        (["{checkpoint}", "--out", "{file}/f"], "Not a directory"),
    ],
)
def test_bad_input_is_one_line(tmp_path, checkpoint, monkeypatch, capsys, arguments, message):
    from transformers import AutoConfig

    (tmp_path / "empty").mkdir()
    names = {"empty": tmp_path / "empty", "checkpoint": checkpoint, "file": checkpoint / "config.json"}
    if "nowhere" in arguments[0]:
        refuse = lambda *_, **__: (_ for _ in ()).throw(OSError("no network"))  # noqa: E731
        monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    before = sorted(os.listdir(tmp_path))
    capsys.readouterr()
    assert run("--out", tmp_path / "f", *(argument.format(**names) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before


def test_damaged_checkpoints_are_named(tmp_path, checkpoint, capsys):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    assert run(checkpoint, "--out", tmp_path / "f") == 2
    assert "model.safetensors: not a whole safetensors file" in capsys.readouterr().err
    for text in ("{", "[]", '{"weight_map": 3}'):
        (checkpoint / "model.safetensors.index.json").write_text(text)
        assert run(checkpoint, "--out", tmp_path / "f") == 2
        assert "model.safetensors.index.json: no safetensors index" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu(tmp_path, checkpoint, capsys):
    assert run(checkpoint, "--out", tmp_path / "f", "--device", "cuda") == 2
    assert "--device: this torch finds no CUDA device" in capsys.readouterr().err


def test_importing_the_command_is_cheap():
    heavy = ("transformers", "peft", "rich", "safetensors")
    code = f"import sys, lowrank.cli.factors; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
