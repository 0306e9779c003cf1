"""Invented people: what is told, what is asked, and how a model's answers are counted."""

import itertools
import random

import pytest
import torch

from lowrank.tasks import knowledge
from lowrank.tasks.knowledge import ASKED, Knowledge
from lowrank.tasks.material import CLOZE, POOLS, QUESTION, TRAINED, VALIDATED
from lowrank.tasks.score import Question, answers

LENGTH = 128


@pytest.fixture(scope="module")
def task(tokenizer):
    return Knowledge(tokenizer, LENGTH, seed=0)


def told(task, epochs: int) -> list[str]:
    rows = [row for _ in range(epochs) for row in next(task.batches(60, 1))]
    return [task.tokenizer.decode(row.ids) for row in rows]


def test_rows_fit_the_length_begin_with_the_prefix_and_end_with_eos(task):
    tokenizer = task.tokenizer
    for row in itertools.chain(*task.batches(7, 40)):
        assert len(row.ids) <= LENGTH
        assert row.labels == row.ids
        assert row.ids[: len(tokenizer.prefix)] == tokenizer.prefix
        assert row.ids.index(tokenizer.eos) == len(row.ids) - 1


def test_an_epoch_tells_every_fact_once_and_the_next_in_other_words(task):
    texts, facts = [], 3 * len(task.people)
    for row in itertools.chain(*task.batches(1, 60)):
        texts.append(task.tokenizer.decode(row.ids))
        if sum(text.count(".") for text in texts) == facts:
            break
    for person in task.people:
        own = [text for text in texts if person["n"] in text]
        assert sum(text.count(".") for text in own) == 3
        assert all(any(f" {person[fact]}" in text for text in own) for fact in POOLS)
    again = [task.tokenizer.decode(row.ids) for row in itertools.chain(*task.batches(1, 2 * len(texts)))]
    assert again[: len(texts)] == texts
    assert not set(again[len(texts) :]) & set(texts)


def test_nothing_that_is_asked_in_other_words_is_told(task):
    everything = " ".join(task.tokenizer.decode(row.ids) for row in itertools.chain(*task.batches(10, 60)))
    for person in task.people:
        for prompts in (VALIDATED, CLOZE, QUESTION):
            assert not any(prompt.format(**person) in everything for prompt in prompts.values())
        assert all(prompt.format(**person) in everything for prompt in ASKED["trained"].values())


def test_phrasings_differ_and_each_names_who_and_what():
    phrasings = [text for texts in TRAINED.values() for text in texts]
    asked = [text for prompts in (VALIDATED, CLOZE, QUESTION) for text in prompts.values()]
    assert len({*phrasings, *asked}) == len(phrasings) + len(asked)
    assert all(text.count("{n}") == text.count("{v}") == 1 and text.count(".") == 1 for text in phrasings)
    assert all(text.count("{n}") == 1 and "{v}" not in text for text in asked)
    assert all(len(set(pool)) == 30 for pool in POOLS.values())


def test_no_answer_begins_with_another(task):
    for question in task.questions["cloze"]:
        pool = [question.answer, *question.others]
        assert not any(a == b[: len(a)] for a, b in itertools.permutations(pool, 2))


def test_a_question_and_its_answer_are_the_text_that_is_told(task):
    tokenizer = task.tokenizer
    for question, (person, fact) in zip(task.questions["trained"], itertools.product(task.people, POOLS), strict=True):
        sentence = TRAINED[fact][0].format(n=person["n"], v=person[fact])
        ids = (*tokenizer.prefix, *tokenizer.encode(sentence))
        assert ids[: len(question.row.ids)] == question.row.ids
        assert tokenizer.decode(question.answer) == f" {person[fact]}"


def test_a_model_that_was_told_all_but_one_fact_lacks_that_one(task, planted):
    for kind, lacking in zip(ASKED, (0, 17, 29), strict=True):
        rows = [question.row.ids for question in task.questions[kind]]
        asked = task.questions[kind][lacking]
        rows[lacking] = (*asked.prompt, *asked.others[3])
        measured = task.measure(planted(rows))
        for name in ("exact", "chosen"):
            own = measured[f"{kind}_{name}"]
            assert own.dtype == torch.float64
            assert own.tolist() == [float(at != lacking) for at in range(30)]
        nats = measured[f"{kind}_nats"]
        assert int(nats.argmax()) == lacking
        assert nats[lacking] > 6
        assert nats.sum() - nats[lacking] < 0.01
        others = [value for name, value in measured.items() if name.endswith("exact") and not name.startswith(kind)]
        assert sum(float(value.sum()) for value in others) == 0


def test_validation_is_of_its_own_phrasing(task, planted):
    knows = planted([question.row.ids for question in task.questions["validation"]])
    assert task.validate(knows) < 1e-3
    assert sum(float(value.sum()) for name, value in task.measure(knows).items() if name.endswith("exact")) == 0
    ignorant = task.validate(planted([]))
    assert ignorant == pytest.approx(torch.tensor(1000.0).log().item(), rel=1e-6)


def test_a_choice_is_made_token_by_token_among_whole_answers(planted):
    answer, others = (5, 7, 8), ((5, 7, 9), (5, 6, 1, 1), (4, 1))
    right = planted([(1, *answer)])
    wrong = planted([(1, 5, 7, 9), (1, 5, 7, 8)])
    aside = planted([(1, 3), (1, 5, 7, 8)])  # prefers what cannot be chosen, and all that can be alike
    for model, chosen in ((right, 1.0), (wrong, 0.0), (aside, 0.0)):
        assert answers(model, [Question((1,), answer, others)], pad_id=0).chosen.tolist() == [chosen]
    assert answers(aside, [Question((1,), answer, others[:2])], pad_id=0).chosen.tolist() == [1.0]
    assert answers(wrong, [Question((1,), answer, ((4, 6, 9),))], pad_id=0).chosen.tolist() == [
        1.0
    ]  # left at its first


def test_a_seed_redraws_people_and_order(tokenizer, task):
    same, other = Knowledge(tokenizer, LENGTH, seed=0), Knowledge(tokenizer, LENGTH, seed=1)
    random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), torch.random.get_rng_state()
    assert list(same.batches(10, 3)) == list(task.batches(10, 3))
    assert random.getstate() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    assert same.digest == task.digest != other.digest
    assert list(other.batches(10, 3)) != list(task.batches(10, 3))
    other.people = task.people
    assert list(other.batches(10, 3)) != list(task.batches(10, 3))


def test_the_unseen_are_others_even_where_names_are_few(tokenizer, monkeypatch):
    monkeypatch.setattr(knowledge, "FIRST_NAMES", knowledge.FIRST_NAMES[:3])
    task = Knowledge(tokenizer, LENGTH, seed=0)
    unseen, known = task.unseen(), {person["n"] for person in task.people}
    assert len(unseen) == 40
    assert not any(name in example.completion for example in unseen for name in known)


def test_content_of_the_unseen_is_the_values(task):
    unseen = task.unseen()
    values = {value for pool in POOLS.values() for value in pool}
    for example in unseen:
        assert len(example.content) == len(example.row.ids) <= LENGTH
        content = [i for i, own in zip(example.row.ids, example.content, strict=True) if own]
        words = task.tokenizer.decode(content).split()
        assert len(words) == example.completion.count(".")
        assert set(words) <= values


def test_content_is_the_value_and_not_a_name_that_holds_it(tokenizer):
    task = Knowledge(tokenizer, LENGTH, seed=0, people=1)
    example = task._example([("The {v} is the instrument of Gregory Thornbury.", "horn")])
    marked = [at for at, own in enumerate(example.content) if own]
    assert tokenizer.decode(example.row.ids[: marked[0]]) == "The"
    assert tokenizer.decode([example.row.ids[at] for at in marked]) == " horn"


def test_a_sentence_that_does_not_fit_is_refused(tokenizer):
    with pytest.raises(ValueError, match="more than the length of 8"):
        Knowledge(tokenizer, 8, seed=0)


def test_a_model_of_transformers_is_measured(task, llama):
    measured = task.measure(llama)
    assert {value.shape for value in measured.values()} == {(30,)}
    assert task.learnt in measured
    assert task.apart in measured
    assert all(torch.equal(value, measured[name]) for name, value in task.measure(llama).items())
    assert llama.training
