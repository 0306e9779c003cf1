"""Knowledge and format from the command to the report: generated, and of a user's own examples."""

import json

import pytest

from lowrank.cli import compare
from lowrank.compare.settings import Embedded

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

TINY = Embedded(hidden_size=16, intermediate_size=32, layers=1, heads=2, pretrain_steps=4, batch=2)
QUICK = ("--device", "cpu", "--dtype", "float32", "--rank", 2, "--steps", 6, "--methods", "full,lora")
RATES = ("--rates", "full=0.01", "--rates", "lora=0.01", "--eval-sequences", 8)


def test_generated_tasks_of_the_embedded_model(parse, tmp_path):
    options = ("--task", "knowledge,format", "--seeds", 2, "--replay", 0.5, "--out", tmp_path)
    assert compare.main(parse(*QUICK, *RATES, *options), TINY) == 0
    result = json.loads((tmp_path / "compare.json").read_text())
    assert list(result["tasks"]) == ["knowledge", "format"]
    knowledge, taught = result["tasks"]["knowledge"], result["tasks"]["format"]
    assert knowledge["items"]["trained_exact"] == 30
    assert knowledge["targets"] == [0.5, 0.95]
    assert taught["items"]["valid"] >= 32
    for task in (knowledge, taught):
        for method in task["methods"].values():
            assert method["seeds_done"] == 2
            (rate,) = method["rates"]
            assert [point["step"] for point in rate["curve"]][-1] == 6
            assert len(method["trained"]) == 3
    text = (tmp_path / "compare.md").read_text()
    assert "Knowledge: no method reached 95% of the facts recalled in the trained wording in 6 steps" in text
    assert "Format: no method reached 80% of the answers valid in 6 steps" in text
    assert "nothing to forget here" in text
    assert "1 of 2 sequences are old text" in text


@pytest.fixture
def model(tmp_path, save_tokenizer):
    save_tokenizer(tmp_path / "model")
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write(path, lines):
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def data(tmp_path):
    lines = [{"prompt": f"Number {i}?", "completion": json.dumps({"n": i})} for i in range(120)]
    return write(tmp_path / "data.jsonl", [*lines, {"prompt": "Long?", "completion": "x" * 400}])


def test_examples_questions_and_a_validator(parse, model, data, tmp_path):
    test = write(tmp_path / "test.jsonl", [{"prompt": f"Say {i}.", "completion": str(i)} for i in range(12)])
    options = ("--model", model, "--data", data, "--test", test, "--valid", "json", "--out", tmp_path / "out")
    assert compare.main(parse(*QUICK, *RATES, *options)) == 0
    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert {name: task["learnt"] for name, task in result["tasks"].items()} == {
        "knowledge": "asked_exact",
        "format": "valid",
    }
    assert result["tasks"]["knowledge"]["items"]["asked_exact"] == 8  # of 12, every fifth validates; --eval-sequences
    assert result["tasks"]["format"]["items"] | {"loss": 8, "valid": 8} == result["tasks"]["format"]["items"]
    assert "120 examples, 1 more too long, 12 questions" in result["tasks"]["format"]["source"]
    assert set(result["probe"]["sets"]) >= {
        "yours: knowledge",
        "yours: format",
    }  # the generated ones need more positions


def test_examples_alone_are_a_text_and_are_asked_in_their_own_wording(parse, model, data, tmp_path):
    options = ("--model", model, "--data", data, "--out", tmp_path / "out")
    assert compare.main(parse(*QUICK, *RATES, *options)) == 0
    (task,) = json.loads((tmp_path / "out" / "compare.json").read_text())["tasks"].values()
    assert task["learnt"] == "loss"
    assert compare.main(parse(*QUICK, *RATES, *options, "--task", "knowledge")) == 0
    (task,) = json.loads((tmp_path / "out" / "compare.json").read_text())["tasks"].values()
    assert task["learnt"] == "trained_exact"
    assert "recalled in the trained wording" in (tmp_path / "out" / "compare.md").read_text()


def test_a_budget_is_printed_first_and_kept_when_resumed(parse, model, data, tmp_path, capsys, monkeypatch):
    from lowrank.compare import budget, train

    options = ("--model", model, "--data", data, "--out", tmp_path / "out", "--minutes", 500)
    assert compare.main(parse(*QUICK, *RATES, *options)) == 0
    lines = capsys.readouterr().err.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("text: "))
    assert any(line.startswith("about ") and "text: 6 steps" in line for line in lines[:first])
    monkeypatch.setattr(budget, "fitted", None)
    monkeypatch.setattr(train, "train", None)
    assert compare.main(parse(*QUICK, *RATES, *options, "--resume")) == 0


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["{", "{}"], (), "line 1: broken JSON"),
        ([{"prompt": "a", "completion": "b"}] * 30, (), "all prompts of 30 examples are alike"),
        ([{"prompt": f"p{i}", "completion": "b"} for i in range(9)], (), "9 examples; expected at least 24 different prompts"),
        ([{"text": f"text {i}"} for i in range(40)], ("--task", "knowledge"), "cannot be asked for what they taught"),
        ([{"text": f"text {i}"} for i in range(40)], ("--valid", "json"), "accept"),
        (None, ("--valid", "("), "'(' is no regular expression"),
        (None, ("--valid", "never"), "accept"),
        ([{"prompt": f"p{i}", "completion": "b"} for i in range(40)], ("--test", "data.jsonl"), "that are trained on: line 1"),
        (None, ("--seq", 512), "--seq 512: expected at most 256"),
        (None, ("--target-modules", "nobody"), "nobody"),
    ],
)  # fmt: skip
def test_bad_data_is_said_before_anything_trains(parse, model, data, tmp_path, lines, options, message, monkeypatch):
    from lowrank.compare import train

    monkeypatch.setattr(train, "train", None)
    if lines is not None:
        data.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    options = [tmp_path / value if value == "data.jsonl" else value for value in options]
    methods = ("--device", "cpu", "--methods", "lora", "--out", tmp_path / "out")
    with pytest.raises((ValueError, OSError)) as caught:
        compare.main(parse("--model", model, "--data", data, *methods, *options))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_answer_ends_where_the_template_ends_a_turn():
    from types import SimpleNamespace

    from lowrank.tasks.own import _ends

    tokenizer = SimpleNamespace(eos=2, special=frozenset((1, 2, 9)))
    assert _ends([(5, 6, 9, 7), (5, 9, 7)], tokenizer) == [2, 9]  # a line end follows the end of turn
    assert _ends([(5, 2)], tokenizer) == [2]
    assert _ends([(5, 6)], SimpleNamespace(eos=None, special=frozenset())) == []


def test_running_text_is_no_knowledge(parse, tmp_path):
    (tmp_path / "text.txt").write_text("Sphinx of black quartz. " * 1000)
    with pytest.raises(ValueError, match="running text can only be the task text"):
        compare.main(parse("--data", tmp_path / "text.txt", "--task", "knowledge", "--device", "cpu"), TINY)
