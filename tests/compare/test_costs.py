"""What is measured, against values computed by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lowrank.compare.costs import memory, stable_rank, weight_changes
from lowrank.compare.data import split
from lowrank.compare.train import Plan, optimizer_and_schedule, stream_of
from lowrank.measure.saved import SavedActivations, storage_bytes
from lowrank.tasks.rows import Row, orders, pad

peft = pytest.importorskip("peft")


def test_stable_rank():
    assert stable_rank(torch.diag(torch.tensor([3.0, 2.0, 1.0]))) == pytest.approx(14 / 9, rel=1e-5)
    assert stable_rank(torch.outer(torch.randn(40), torch.randn(30))) == pytest.approx(1, rel=1e-5)
    matrix = torch.randn(100, 60)
    exact = matrix.square().sum() / torch.linalg.matrix_norm(matrix, 2) ** 2
    assert stable_rank(matrix) == pytest.approx(float(exact), rel=0.02)


def test_storages_count_once():
    x = torch.zeros(4, 8)
    assert storage_bytes([x, x.T, x[1:], torch.zeros(2)]) == 4 * 8 * 4 + 2 * 4


def test_memory_of_one_linear_layer():
    """relu(x Wᵀ): saved are x for dW and the output for relu's mask; W itself is no activation."""
    layer = nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        x = torch.randn(16, 8, requires_grad=True)
        with SavedActivations(layer.parameters()) as saved:
            y = layer(x).relu()
        y.sum().backward()
        measured = memory(layer, optimizer, saved.bytes, torch.device("cpu"))
        optimizer.step()
    assert measured.weights == measured.gradients == 8 * 4 * 4
    assert measured.optimizer == 2 * 8 * 4 * 4 + 4  # two moments and a step count
    assert measured.activations == 16 * 8 * 4 + 16 * 4 * 4
    assert measured.total == measured.weights + measured.gradients + measured.optimizer + measured.activations


@pytest.mark.parametrize("in_place", [False, True])
def test_masters_keep_the_updates_that_a_16_bit_weight_loses(in_place):
    layer = nn.Linear(8, 4, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(layer.weight)
    optimizer, schedule = optimizer_and_schedule(layer, 1e-3, 40, in_place=in_place)  # half a spacing below 1 is 2e-3
    for _ in range(20):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
        schedule.step()
    assert (
        memory(layer, optimizer, 0, torch.device("cpu")).optimizer == (8 if in_place else 12) * 32 + 4
    )  # and a step count
    assert bool((layer.weight == 1).all()) == in_place
    assert in_place or bool((layer.weight < 0.99).all())


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 24, bias=False)


def test_share_of_weights_changed():
    base, model = Two(), Two()
    model.load_state_dict(base.state_dict())
    assert weight_changes(base, model)["share_changed"] == 0
    with torch.no_grad():
        model.a.weight[0, :4] += 1
    changes = weight_changes(base, model)
    assert changes["share_changed"] == 4 / (8 * 8 + 8 * 24)
    assert changes["stable_rank"]["median"] == pytest.approx(1, rel=1e-5)


def test_share_changed_of_an_adapter_counts_what_the_stored_dtype_keeps():
    """W = 1 in bfloat16 swallows an update of 1e-4 and keeps one of 0.5."""
    base = Two().to(torch.bfloat16)
    for parameter in base.parameters():
        parameter.data.fill_(1)
    for update, share in ((1e-4, 0.0), (0.5, 64 / (64 + 192))):
        model = Two().to(torch.bfloat16)
        model.load_state_dict(base.state_dict())
        model = peft.get_peft_model(model, peft.LoraConfig(r=1, lora_alpha=1, target_modules=["a"]))
        layer = model.base_model.model.a
        with torch.no_grad():
            layer.lora_A["default"].weight.fill_(1)
            layer.lora_B["default"].weight.fill_(update)
        assert weight_changes(base, model)["share_changed"] == share


def test_splits_are_disjoint_and_whole():
    corpus = split(torch.arange(100 * 16), 16, "numbers")
    parts = [set(part.flatten().tolist()) for part in (corpus.train, corpus.validation, corpus.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1600
    assert len(corpus.test) == len(corpus.validation) == 10


def test_every_block_begins_as_the_tokenizer_begins_a_text():
    corpus = split(torch.arange(100 * 15), 16, "numbers", prefix=(7,))
    assert set(corpus.train[:, 0].tolist()) == {7}
    rest = torch.cat([part[:, 1:].flatten() for part in (corpus.train, corpus.validation, corpus.test)])
    assert sorted(rest.tolist()) == list(range(1500))


def test_orders_repeat_for_a_seed_and_visit_everything_once():
    first, again, other = (list(orders(12, 4, 6, seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert (
        sorted(i for step in first[:3] for i in step)
        == sorted(i for step in first[3:] for i in step)
        == list(range(12))
    )
    assert list(orders(12, 4, 3, 0)) == first[:3]  # a shorter run is the beginning of a longer one


@pytest.mark.parametrize(("share", "old"), [(0.0, 0), (0.01, 1), (0.5, 4), (0.99, 7)])
def test_replay_mixes_old_text_into_every_batch(share, old):
    new = [Row((1,) * 5, (1,) * 5)]
    subject = SimpleNamespace(general=SimpleNamespace(train=torch.full((9, 16), 2)), tokenizer=SimpleNamespace(pad=0))
    task = SimpleNamespace(batches=lambda size, steps: iter([new * size] * steps))
    batches = list(stream_of(task, subject, Plan(3, 8, 1, share), 0))
    assert len(batches) == 3
    for batch in batches:
        assert batch.ids.shape == (8, 5)
        assert int((batch.ids[:, 0] == 2).sum()) == old


def test_padding_has_no_loss_and_no_attention():
    batch = pad([Row.of((1, 2), (3,)), Row((4,), (4,))], 9)
    assert batch.ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch.labels.tolist() == [[-100, -100, 3], [4, -100, -100]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert pad([Row((1,), (1,))] * 2, 9).mask is None
