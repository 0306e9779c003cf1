"""What examples in the context give, by a model that can only copy, and what may be concluded of it."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lowrank.cli import probe as command
from lowrank.compare import probe
from lowrank.compare.probe import Trained, distinct, elicit, finding, held, longest_context
from lowrank.tasks.rows import Row
from lowrank.tasks.task import Example

VOCABULARY = 100
RIGHT = 0.9


class Copier(nn.Module):
    """What followed this token the last time comes again with a probability of RIGHT; else everything is alike."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask=None):
        batch, length = input_ids.shape
        probabilities = torch.full((batch, length, VOCABULARY), 1 / VOCABULARY)
        for row, ids in enumerate(input_ids.tolist()):
            last = {}
            for at, token in enumerate(ids):
                if token in last:
                    probabilities[row, at] = (1 - RIGHT) / VOCABULARY
                    probabilities[row, at, last[token]] += RIGHT
                if at + 1 < length:
                    last[token] = ids[at + 1]
        return SimpleNamespace(logits=probabilities.log())


def examples(count=25, prefix=()):
    """The same form around content of each one's own: 1 2 c d 3 4."""
    made = []
    for i in range(count):
        ids = (*prefix, 1, 2, 10 + 3 * i, 11 + 3 * i, 3, 4)
        content = (*[False] * (len(prefix) + 2), True, True, False, False)
        made.append(Example(Row(ids, ids), len(prefix), content=content))
    return made


KNOWN, UNKNOWN = -torch.tensor(RIGHT + (1 - RIGHT) / VOCABULARY).log(), torch.tensor(float(VOCABULARY)).log()
NEW = -torch.tensor((1 - RIGHT) / VOCABULARY).log()  # where another token was copied


def test_losses_by_condition_are_those_of_a_model_that_copies():
    measured = elicit("copies", Copier(), examples(), 0, 1000, draws=1)
    assert list(measured.nats) == [0, 1, 3, 7, "self"]
    assert measured.tokens.tolist() == [5.0] * 25  # 2 c d 3 4: the first token has nothing before it
    assert float(measured.loss(0)) == pytest.approx(float(UNKNOWN), rel=1e-5)
    shown = (KNOWN + NEW + UNKNOWN + UNKNOWN + KNOWN) / 5  # after 2 comes c; after 1, 2 and after 3, 4
    for k in (1, 3, 7):
        assert float(measured.loss(k)) == pytest.approx(float(shown), rel=1e-5)
    itself = (4 * KNOWN + NEW) / 5, KNOWN  # what followed 2 the last time is its own content, or that of the last one
    assert float(itself[1]) < float(measured.loss("self")) < float(itself[0])
    content = measured.content
    assert content.tokens.tolist() == [2.0] * 25
    assert float(content.loss(7)) == pytest.approx(float((NEW + UNKNOWN) / 2), rel=1e-5)


def test_the_same_tokens_count_whatever_a_text_begins_with():
    for prefix, tokens in (((), 5.0), ((99,), 6.0), ((99, 98), 6.0)):
        measured = elicit("copies", Copier(), examples(prefix=prefix), 0, 1000, draws=1)
        assert set(measured.tokens.tolist()) == {tokens}


def test_shares_and_their_intervals():
    summary = elicit("copies", Copier(), examples(), 0, 1000, draws=1).summary()
    assert summary["elicited"] + summary["specific"] == pytest.approx(summary["loss"]["0"] - summary["loss"]["self"])
    assert summary["share"] == pytest.approx(summary["elicited"] / (summary["elicited"] + summary["specific"]))
    for name, (low, high) in summary["intervals"].items():
        assert low <= summary[name] <= high, name
    again = elicit("copies", Copier(), examples(), 0, 1000, draws=1).summary()
    assert json.dumps(summary) == json.dumps(again)
    json.dumps(summary)


def test_k_is_lowered_for_all_and_nothing_is_cut():
    assert [longest_context(examples(), room) for room in (48, 47, 24, 23, 12, 11)] == [7, 3, 3, 1, 1, 0]
    assert list(elicit("few", Copier(), examples(), 0, 47).nats) == [0, 1, 3, "self"]
    assert longest_context(examples(3), 1000) == 1
    with pytest.raises(ValueError, match="few: two examples of up to 6 tokens do not fit into the 11 positions"):
        elicit("few", Copier(), examples(), 0, 11)


def test_all_sets_have_the_contexts_of_the_one_that_fits_least():
    model = Copier()
    model.config = SimpleNamespace(max_position_embeddings=30)
    long = [Example(Row(example.row.ids * 2, example.row.labels * 2)) for example in examples(8)]
    none = [Example(Row(example.row.ids * 4, example.row.labels * 4)) for example in examples(8)]
    tokenizer = SimpleNamespace(pad=0)
    done, why_not = probe.probe(model, tokenizer, {"short": examples(8), "long": long, "none": none})
    assert {name: made["most"] for name, made in done.items()} == {"short": 1, "long": 1}
    assert "two examples of up to 24 tokens do not fit" in why_not["none"]


def summary(share, width=0.05, examples=40, most=7):
    return {
        "share": share, "elicited": 2 * share, "specific": 2 - 2 * share, "examples": examples, "most": most,
        "intervals": {"share": [share - width, share + width], "gain": [1.0 - 1.1 * (share > 1), 3.0]},
    }  # fmt: skip


GENERATED = {"format": summary(0.98), "facts": summary(0.44), "style": summary(0.36)}


def test_behaviour_is_said_only_above_facts_and_style():
    assert finding(summary(0.9), GENERATED, recall=False).startswith(
        "Behaviour: a prompt or a small adapter is enough (share 0.90"
    )
    for share in (0.5, 0.2):
        text = finding(summary(share), GENERATED, recall=False)
        assert text.startswith(f"{2 - 2 * share:.2f} of 2.00 nats per token are specific to single examples")
        assert text.endswith(
            "knowledge if the model must give them back later, content that need not be learnt if not."
        )
        recalled = finding(summary(share), GENERATED, recall=True)
        assert "knowledge, since the model is to give them back later" in recalled
    assert "Behaviour" in finding(summary(0.9), GENERATED, recall=True)


@pytest.mark.parametrize(
    ("own", "generated", "why"),
    [
        (summary(0.9, examples=23), GENERATED, "23 examples are too few; expected at least 24"),
        (summary(0.9, most=3), GENERATED, "only 3 of 7 examples fit into the model's context"),
        (summary(0.9), {**GENERATED, "format": summary(0.4)}, "does not follow examples"),
        (summary(0.9), {"format": summary(0.98)}, "a generated set could not be measured"),
        (summary(1.01), GENERATED, "this model gains nothing even from the example itself"),
        (summary(0.9), {**GENERATED, "format": summary(1.01)}, "of the generated format, this model gains nothing"),
    ],
)
def test_no_verdict(own, generated, why):
    text = finding(own, generated, recall=False)
    assert text.startswith("No verdict: ")
    assert why in text


def test_what_training_made_of_it():
    after = Trained(alone=4.0, held_out=1.0, trained=0.5)
    assert (after.general, after.specific, after.share) == pytest.approx((3.0, 0.5, 3 / 3.5))
    assert held(summary(0.9), after).endswith("the forecast of 0.90 held")
    assert held(summary(0.3), after).endswith("the forecast of 0.30 did NOT hold")
    assert "forecast" not in held(None, after)


@pytest.fixture
def model(tmp_path, save_tokenizer):
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tmp_path / "model")
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    lines = [{"prompt": f"What is {i}?", "completion": f" It is {i}."} for i in range(30)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "model"


def run(*argv):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.main(parser.parse_args([str(a) for a in argv]))


def test_the_command_prints_a_table_and_what_may_be_said(model, capsys):
    options = ("--dtype", "float32", "--device", "cpu", "--draws", 1, "--examples", 6)
    data = model.parent / "data.jsonl"
    assert run("--model", model, "--data", data, *options, "--check", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["sets"]) == ["yours", "format", "facts", "style"]
    assert result["sets"]["yours"]["examples"] == 6
    assert "6 examples are too few" in result["finding"]
    assert result["trained"]["alone"] > result["trained"]["trained"]
    assert "the forecast of" in result["check"]
    command.show(result)
    shown = capsys.readouterr().out
    assert "generated: invented people" in shown
    assert "L_self" in shown
    assert max(map(len, shown.splitlines())) <= 112


def test_a_text_is_probed_by_its_passages(model, capsys):
    (model.parent / "text.txt").write_text(
        " ".join(f"Sphinx {i} of black quartz, judge my {i * i} vows." for i in range(200))
    )
    options = ("--dtype", "float32", "--device", "cpu", "--draws", 1, "--examples", 6, "--seq", 16)
    assert run("--model", model, "--data", model.parent / "text.txt", *options) == 0
    assert "6 examples are too few" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--examples", 1), "--examples 1: expected at least 2"),
        (("--seq", 2), "--seq 2: expected at least 8"),
        (("--loss", "some"), "--loss 'some': expected one of"),
        (("--recall",), "--check, --test and --recall are about your examples: expected --data FILE"),
        (("--data", "/no/such.jsonl"), "--data /no/such.jsonl: no such file"),
    ],
)
def test_bad_option(options, message):
    with pytest.raises((ValueError, OSError)) as caught:
        run("--model", "./nowhere", *options)
    assert message in str(caught.value)


def test_a_copy_of_an_example_is_not_another_one():
    row = Row((1, 2), (1, 2))
    examples = [Example(row, 0, "a", "x"), Example(Row((3, 4), (3, 4)), 0, "a", "y"), Example(row), Example(row)]
    assert distinct(examples) == [examples[0], examples[2]]


def test_a_model_that_sees_ahead_is_refused(model, monkeypatch, capsys):
    monkeypatch.setattr("lowrank.compare.checks._looks_ahead", lambda *_: True)
    with pytest.raises(ValueError, match="expected a causal language model, no encoder"):
        run("--model", model, "--dtype", "float32", "--device", "cpu", "--examples", 3)


@pytest.mark.parametrize(
    ("count", "message"), [(1, "two different examples, got 1"), (6, "at least 10 different examples")]
)
def test_too_few_examples(model, count, message):
    lines = [{"prompt": f"What is {i % count}?", "completion": " It."} for i in range(30)]
    (model.parent / "few.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=message):
        run("--model", model, "--data", model.parent / "few.jsonl", "--dtype", "float32", "--device", "cpu", "--check")
