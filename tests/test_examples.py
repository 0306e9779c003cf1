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


@pytest.fixture
def one_thread():
    """Of a model this small: more of them wait for one another, on a busy machine for most of the time."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def test_transformer2(one_thread, tmp_path, capsys):
    import torch
    from transformers import LlamaForCausalLM

    import lowrank

    example = load("transformer2")
    sizes = dict(
        hidden=48, pretrain_steps=60, steps=20, rate=0.3, rl_steps=4, rl_batch=16, population=6, iterations=2, shots=2
    )
    options = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    results = example.main(["--out", str(tmp_path), *options])
    assert "reinforce" in capsys.readouterr().out
    model, losses, picks = results["model"], results["losses"], results["picks"]
    for domain in ("prose", "counting"):
        assert losses[domain][domain].mean() < losses[domain]["base"].mean() - 0.01
    for domain, rows in losses.items():
        by_expert = torch.stack([rows[name] for name in example.EXPERTS])
        picked = by_expert.gather(0, picks[domain][None])[0]
        torch.testing.assert_close(rows["picked"], picked, rtol=0, atol=1e-4)
    assert (picks["prose"] == 0).double().mean() > 0.9
    assert (picks["counting"] == 1).double().mean() > 0.9

    assert results["kls"][0] == 0
    assert all(kl > 0 for kl in results["kls"][1:])

    shots, alphas = results["held_out"]["prose"][0][:3], torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    batches = []
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: batches.append(len(inputs["input_ids"])), with_kwargs=True
    )
    together = example.population_losses(model, shots, alphas)
    hook.remove()
    assert batches == [15]
    alone = torch.stack([example.mixed_losses(model, shots, alpha).mean() for alpha in alphas])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    assert together.std() > 1e-2

    for name in example.EXPERTS:
        again = lowrank.load_adapter(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / name, name)
        test = results["held_out"]["prose"][1]
        assert torch.equal(example.evaluate(again, test, len(test)), losses["prose"][name])


def test_cpi_ft(one_thread, capsys):
    from lowrank import bits

    example = load("cpi_ft")
    original, frozen_runs = example.train, []

    def watched(model, blocks, steps, args, frozen=None):
        before = example.weights(model)
        original(model, blocks, steps, args, frozen)
        if frozen:
            frozen_runs.append((before, example.weights(model), frozen))

    example.train = watched
    sizes = dict(hidden=32, pretrain_steps=20, steps=12, threshold=0.3)
    results = example.main([f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()])
    assert "forgotten" in capsys.readouterr().out
    rows = results["rows"]
    for n, name in enumerate(("prose", "up", "down")):
        assert rows[f"{name} alone"][n] < rows["base"][n] - 0.01
    numel = sum(t.numel() for t in results["merged"].values())
    ones = [sum(int(bits.unpack(w, (32 * len(w),)).sum()) for w in core.values()) for core in results["cores"]]
    assert ones == [round(0.01 * numel)] * 3
    assert len(results["order"]) > 1
    assert len(frozen_runs) == len(results["order"]) - 1
    for before, after, frozen in frozen_runs:
        held = {name: bits.unpack(words, before[name].shape) for name, words in frozen.items()}
        moved = {name: after[name] != start for name, start in before.items()}
        assert not any((moved[name] & held[name]).any() for name in held)
        assert sum(int(m.sum()) for m in moved.values()) > 0.8 * numel


def test_cpi_ft_parts():
    """Groups, the sphere, and cores that are transplanted whatever the rest does."""
    import torch

    from lowrank import bits

    example = load("cpi_ft")
    jaccard = torch.tensor([[1, 0.05, 0.2], [0.05, 1, 0.05], [0.2, 0.05, 1]])
    assert example.groups_of(jaccard, 0.1) == [[0, 2], [1]]
    assert example.groups_of(jaccard, 0.3) == [[0], [1], [2]]
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(example.slerp(x, y, 0.5), torch.tensor([0.5**0.5, 0.5**0.5]))
    torch.testing.assert_close(example.slerp(x, x + 1e-5 * y, 0.5), torch.tensor([1.0, 5e-6]))
    base, tuned = {"w": torch.zeros(4)}, [{"w": torch.tensor([3.0, 1, 1, 0])}, {"w": torch.tensor([1.0, 5, 1, 0])}]
    cores = [
        {"w": bits.pack(torch.tensor([True, True, False, False]))},
        {"w": bits.pack(torch.tensor([True, True, False, False]))},
    ]
    for on in ("vectors", "weights"):
        merged = example.merge(base, tuned, cores, on)["w"]
        assert merged[:2].tolist() == [3, 5]
        assert merged[3] == 0
        assert 0.9 < float(merged[2]) < 1.2


def test_proxy_tuning(one_thread, capsys):
    sizes = dict(hidden=48, layers=2, small_hidden=32, small_layers=1, pretrain_steps=80, steps=40, rate=4e-3)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    results = load("proxy_tuning").main([*options, "--alphas", "0", "1"])
    assert "proxy 1" in capsys.readouterr().out
    for domain in ("prose", "counting"):
        base, none, proxy, tuned = (results[domain, name] for name in ("base", "proxy 0", "proxy 1", "tuned"))
        assert none == base
        assert base["gap"] == base["changed"] == 0
        assert tuned["gap"] == 1
        assert proxy["loss"] < base["loss"] - 0.01
        assert proxy["changed"] > 0
    assert results["counting", "proxy 1"]["lines"] >= results["counting", "base"]["lines"]


def test_rl(one_thread, capsys):
    import torch

    from lowrank import bits

    example = load("rl")
    sizes = dict(hidden=32, limit=3, pretrain_steps=200, steps=3, prompts=8, group=8, asked=3, every=2)
    results = example.main([f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()])
    rows, base = results["rows"], results["base"]
    assert "In this run training every weight bought" in capsys.readouterr().out
    assert list(rows) == ["base", *example.METHODS]
    assert all(len(history) == 3 and history[0]["kl"] < 1e-6 for history in results["histories"].values())
    assert all(row["kl"] > 1e-6 for name, row in rows.items() if name != "base")
    for name, masks in results["changed"].items():
        ones = sum(int(bits.unpack(w, base.get_parameter(n).shape).sum()) for n, w in masks.items())
        assert abs(rows[name]["bf16"] - ones / base.num_parameters()) < 1e-3
        assert bool(masks["model.embed_tokens.weight"].any()) == name.startswith("full")  # adapters leave it alone
    assert results["overlap"].jaccard[0, 1] < 1

    adapted = example.lowrank.adapt(example.copy.deepcopy(base), example.METHODS["LoRA 1"][0])
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            p.add_(0.1 if "lora_" in name else 0)
    ids = example.answer(base, [[1, 2]] * 8)[0]
    ids[0, example.PROMPT :] = torch.tensor(list(b"=03\nxxxx"))
    logp, entropy, kl = example.scored(adapted, base, ids)
    logp_model, logp_base = (
        m(input_ids=ids).logits[:, example.PROMPT - 1 : -1].double().log_softmax(-1) for m in (adapted, base)
    )
    counted = torch.ones(8, example.ANSWER, dtype=torch.bool)
    for row, text in zip(counted, ids[:, example.PROMPT :].tolist(), strict=True):
        row[text.index(10) + 1 if 10 in text else example.ANSWER :] = False
    assert counted[0].tolist() == [True] * 4 + [False] * 4
    chosen = logp_model.gather(2, ids[:, example.PROMPT :, None])[..., 0]
    torch.testing.assert_close(logp.double(), chosen * counted, rtol=1e-4, atol=1e-5)
    p = logp_model.exp()
    torch.testing.assert_close(entropy.double(), -(p * logp_model).sum(-1)[counted].mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        kl.double(), (p * (logp_model - logp_base)).sum(-1)[counted].mean(), rtol=1e-4, atol=1e-5
    )


def test_rl_rewards():
    """Right and wrong sums in both formats, and what is neither."""
    import torch

    example = load("rl")
    answers = [b"=03\nxxxx", b":3,0=03\n", b"=04\nxxxx", b":9,9=03\n", b"=3\n=03\nx", b"03\nxxxxx"]

    def model(input_ids):
        at = input_ids.shape[1] - example.PROMPT
        nexts = torch.tensor([text[at] for text in answers])
        return type("Out", (), {"logits": torch.nn.functional.one_hot(nexts, 259).log()[:, None]})

    ids, rewards, formats = example.answer(model, [[1, 2]] * len(answers))
    assert bytes(ids[1].tolist()) == b"\n01+02:3,0=03\n"
    assert rewards.tolist() == [1, 1, 0, 1, 0, 0]
    assert formats["plain"].tolist() == [True, False, True, False, False, False]
    assert formats["worked"].tolist() == [False, True, False, True, False, False]
    text = example.sums(100, 20, 0.3, 0).decode()
    lines = text.split("\n")[1:]
    assert len(lines) == 100
    assert {len(line) > 10 for line in lines} == {True, False}
    for line in lines:
        left, right = line.split("=")
        a, b = left.split(":")[0].split("+")
        assert int(a) + int(b) == int(right)
        assert ":" not in left or left.split(":")[1] == f"{right[1]},{right[0]}"
