import pytest

from lowrank.tasks.own import OwnKnowledge, Parts
from lowrank.tasks.rows import Row
from lowrank.tasks.score import Question
from lowrank.tasks.task import Example
from lowrank.tasks.tokens import ByteTokenizer

TOKENS = ByteTokenizer()


def example(at, prompt=True):
    asked, said = TOKENS.encode(f"Where is {at}?"), [*TOKENS.encode(f" In {at}."), TOKENS.eos]
    if not prompt:
        return Example(Row((*asked, *said), (*asked, *said)))
    return Example(Row.of(asked, said), 0, f"Where is {at}?", f" In {at}.", answer=(len(asked), len(asked) + len(said)))


def parts(count, prompt=True):
    examples = [example(at, prompt) for at in range(count)]
    return Parts("data", "0", examples[2:], examples[:1], examples[1:2])


def test_every_example_is_trained_and_a_fifth_of_the_questions_validates():
    questions = [
        Question(tuple(TOKENS.encode(f"{at} is in")), (*TOKENS.encode(f" {at}"), TOKENS.eos)) for at in range(20)
    ]
    task = OwnKnowledge(parts(20), TOKENS, 0, questions, 64)
    assert len(task.trained()) == 20
    assert not task.unseen()
    assert len(task._validation) == 4
    assert len(task._questions["asked"]) == 16
    asked = {question.prompt for question in task._questions["asked"]}
    assert not asked & {question.prompt for question in task._validation}
    assert len(task._questions["trained"]) == 20
    seen = {tuple(row.ids) for rows in task.batches(4, 10) for row in rows}
    assert seen == {example(at).row.ids for at in range(20)}


def test_without_questions_its_own_prompts_are_asked():
    task = OwnKnowledge(parts(20), TOKENS, 0, [], 64)
    assert task.learnt == "trained_exact"
    assert len(task._questions["trained"]) == 16
    assert not {q.prompt for q in task._questions["trained"]} & {q.prompt for q in task._validation}


def test_what_ends_an_answer_is_not_asked_for():
    """Running text teaches " Red." and no end behind it."""
    questions = [Question((1, 2), (*TOKENS.encode(" Red"), TOKENS.eos)), Question((1, 2), (TOKENS.eos, 7))]
    task = OwnKnowledge(parts(5, prompt=False), TOKENS, 0, questions * 5, 64)
    every = [*task._questions["asked"], *task._validation]
    assert {question.answer for question in every} == {tuple(TOKENS.encode(" Red")), (TOKENS.eos, 7)}


def test_one_question_and_none_are_too_few():
    with pytest.raises(ValueError, match="cannot be asked"):
        OwnKnowledge(parts(5, prompt=False), TOKENS, 0, [], 64)
    with pytest.raises(ValueError, match="one question is too few"):
        OwnKnowledge(parts(5), TOKENS, 0, [Question((1,), (2,))], 64)
