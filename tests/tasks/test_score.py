import pytest
import torch
from transformers import GenerationConfig

from lowrank.tasks import material, score


def test_what_is_drawn_follows_the_distribution():
    scores = torch.tensor([[0.0, 2.0, -1.0, float("-inf"), 1.0]]).expand(20000, -1)
    torch.manual_seed(0)
    for temperature in (1.0, 0.5):
        drawn = score._drawn(temperature)(None, scores).argmax(-1)
        share = torch.bincount(drawn, minlength=5) / len(scores)
        expected = (scores[0] / temperature).softmax(-1)
        assert (share - expected).abs().max() < 0.015  # four standard errors
        assert share[3] == 0


def test_the_head_reads_contiguous_memory(llama):
    strided = []
    head = llama.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, out: strided.append(args[0].is_contiguous()))
    score.generate(llama, [[1, 2, 3], [4, 5]], 3, eos=None, pad_id=0)
    assert strided
    assert all(strided)
    hook.remove()
    assert not head._forward_pre_hooks


def test_a_checkpoints_habits_are_left_out(llama):
    prompts = [[1, 2, 3], [7, 5]]
    plain = score.generate(llama, prompts, 8, eos=None, pad_id=0)
    llama.generation_config = habits = GenerationConfig(
        repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, temperature=9.0, min_new_tokens=3
    )
    assert score.generate(llama, prompts, 8, eos=None, pad_id=0) == plain
    assert llama.generation_config is habits
    with pytest.raises(IndexError):
        score.generate(llama, [[10**6]], 8, eos=None, pad_id=0)
    assert llama.generation_config is habits


def test_nothing_that_format_trains_is_among_the_known_items():
    asked = [item[0].lower() + " " + item[1].lower() for item in material.ITEMS]
    for question, right in (*material.JSON_TRAINED, *material.JSON_VALIDATED):
        thing = question.rstrip("?").split()[-1].lower()
        both = [text for text in asked if f" {thing} " in f" {text} " and right.lower() in text]
        assert not both, question
    assert len(set(material.JSON_TRAINED)) == 60
