"""Answers as JSON: which are valid, which are right, and that nobody is trained on what is asked."""

import json

import pytest
import torch

from lowrank.tasks.format import Format, answer_of
from lowrank.tasks.material import JSON_ASKED, JSON_TRAINED, JSON_VALIDATED, OPEN, SENTENCES
from lowrank.tasks.rows import IGNORED
from lowrank.tasks.style import Style

LENGTH = 128


@pytest.fixture(scope="module")
def task(tokenizer):
    return Format(tokenizer, LENGTH, seed=0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('{"answer": "Paris", "words": 1}', "Paris"),
        ('\n {"words": 7, "answer": ""} ', ""),
        ('{"answer": "Paris", "words": 1', None),
        ('{"answer": "Paris", "words": 1} Indeed.', None),
        ('Sure: {"answer": "Paris", "words": 1}', None),
        ('{"answer": "Paris", "words": 1}\n{"answer": "Paris", "words": 1}', None),
        ('{"answer": "Paris"}', None),
        ('{"answer": "Paris", "words": 1, "why": 2}', None),
        ('{"answer": "Paris", "answer": "Rome", "words": 1}', None),
        ('{"answer": "Paris", "words": 1.0}', None),
        ('{"answer": "Paris", "words": true}', None),
        ('{"answer": "Paris", "words": "1"}', None),
        ('{"answer": 2, "words": 1}', None),
        ('{"answer": {"answer": "Paris", "words": 1}, "words": 1}', None),
        ('[["answer", "Paris"], ["words", 1]]', None),
        ('"answer"', None),
        ("{'answer': 'Paris', 'words': 1}", None),
        ("{}", None),
        ("1", None),
        ("null", None),
        ("", None),
    ],
)
def test_valid_is_one_object_and_nothing_more(text, answer):
    assert answer_of(text) == answer


def test_trained_validated_asked_and_open_questions_are_all_different():
    every = [*(asked for asked, _ in (*JSON_TRAINED, *JSON_VALIDATED)), *JSON_ASKED, *SENTENCES, *OPEN]
    assert len({text.casefold() for text in every}) == len(every)
    assert (len(JSON_TRAINED), len(JSON_VALIDATED), len(JSON_ASKED)) == (60, 16, 32)
    assert sum(bool(known) for known in JSON_ASKED.values()) == 24
    kinds = {" ".join(asked.split()[:4]) for asked, _ in JSON_TRAINED}
    assert not any(asked.startswith(tuple(kinds)) for asked in JSON_ASKED)  # other kinds of question


def test_rows_are_a_question_without_loss_and_json_with_eos(task):
    tokenizer = task.tokenizer
    pairs = dict(JSON_TRAINED)
    rows = [row for batch in task.batches(8, 15) for row in batch]
    assert len(set(rows)) == 60  # two epochs, each of all
    for row in rows:
        assert len(row.ids) <= LENGTH
        labelled = [label for label in row.labels if label != IGNORED]
        assert row.labels == (*[IGNORED] * (len(row.ids) - len(labelled)), *row.ids[-len(labelled) :])
        assert labelled.count(tokenizer.eos) == 1
        assert labelled[-1] == tokenizer.eos
        prompt, given = tokenizer.decode(row.ids[: -len(labelled)]), json.loads(tokenizer.decode(labelled))
        (asked,) = (asked for asked in pairs if asked in prompt)
        assert given == {"answer": pairs[asked], "words": 1}
        if tokenizer.template:
            assert row.ids.count(tokenizer.prefix[0]) == 1  # the template brings its own
            assert row.ids[:1] == tokenizer.prefix


def test_content_is_the_answer_alone(task):
    for example, completion in [(e, e.completion) for e in (*task.examples(), *task.unseen())]:
        content = [i for i, own in zip(example.row.ids, example.content, strict=True) if own]
        assert task.tokenizer.decode(content) == json.loads(completion)["answer"]


def answered(task, texts: list[str]) -> list[tuple[int, ...]]:
    """Rows of a model that answers so."""
    tokenizer = task.tokenizer
    return [(*prompt, *tokenizer.encode(text), tokenizer.eos) for prompt, text in zip(task.prompts, texts, strict=True)]


def test_greedy_answers_are_parsed_and_the_valid_ones_are_right_or_wrong(task, planted):
    texts = [json.dumps({"answer": (known or ["what?"])[0], "words": 1}) for known in JSON_ASKED.values()]
    texts[0] = "Green."
    texts[1] = '{"answer": "Red", "words": 1}'
    texts[2] = '{"answer": "I say EIGHT!", "words": 3}'
    texts[3] = '{"answer": "27", "words": 1}'  # 7 is no word of it
    measured = task.measure(planted(answered(task, texts)))
    assert measured["valid"].tolist() == [0.0] + [1.0] * 31
    right = measured["right"]
    assert right.dtype == torch.float64
    assert right[0].isnan()
    assert right[1:4].tolist() == [0.0, 1.0, 0.0]
    assert right[4:].tolist() == [1.0] * 20
    assert float(right.nanmean()) == pytest.approx(21 / 23)
    assert measured["loss"].shape == (24,)
    assert measured["loss"][4:].max() < 1e-3
    assert measured["loss"][:2].min() > 0.1


def test_without_a_valid_answer_none_is_right_or_wrong(task, planted):
    measured = task.measure(planted([]))
    assert measured["valid"].tolist() == [0.0] * 32
    assert measured["right"].isnan().all()


def test_what_is_trained_can_be_written_in_the_tokens_allowed(task):
    assert all(
        sum(label != IGNORED for label in row.labels) <= task.new_tokens for row in (*task.trained(), *task.known)
    )


def test_a_seed_redraws_what_is_trained_and_its_order(tokenizer):
    first, same, other = (Format(tokenizer, LENGTH, seed, count=20) for seed in (0, 0, 1))
    assert list(first.batches(8, 5)) == list(same.batches(8, 5)) != list(other.batches(8, 5))
    assert first.digest == same.digest != other.digest
    assert set(first.trained()) != set(other.trained())
    assert first.known == other.known
    assert first.unseen() == other.unseen()


def test_validation_is_of_its_own_questions(task, planted):
    assert task.validate(planted([example.row.ids for example in task.unseen()])) < 1e-3
    assert task.validate(planted([row.ids for row in task.trained()])) > 0.1


def test_a_row_that_does_not_fit_is_refused(tokenizer):
    with pytest.raises(ValueError, match="more than the length of 8"):
        Format(tokenizer, 8, seed=0)


def test_style_is_in_capitals_over_open_content(tokenizer):
    examples = Style(tokenizer, seed=0).examples()
    assert len({example.row for example in examples}) == 40
    for example in examples:
        assert example.completion == SENTENCES[example.prompt].upper() != SENTENCES[example.prompt]
        assert example.content == tuple(label not in (IGNORED, tokenizer.eos) for label in example.row.labels)
    assert [e.prompt for e in Style(tokenizer, seed=1).examples()] != [e.prompt for e in examples]


def test_a_model_of_transformers_is_measured(task, llama, monkeypatch):
    monkeypatch.setattr(task, "new_tokens", 4)
    measured = task.measure(llama)
    assert {name: value.shape for name, value in measured.items()} == {"valid": (32,), "right": (24,), "loss": (24,)}
    assert task.learnt in measured
    assert task.apart in measured
    assert llama.training
