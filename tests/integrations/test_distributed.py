"""Patched PEFT models over two processes (gloo, CPU): the gradients of one process on the whole batch, and the op taken.

The processes are started once; what they run is in distributed_worker.py.
"""

import importlib.util

import pytest
import torch

pytest.importorskip("peft")
torch_mp = pytest.importorskip("torch.multiprocessing")

import distributed_worker as worker

import lowrank
from lowrank.integrations.peft import patch
from lowrank.integrations.peft_layer import SHARDED

bf16, fp32 = torch.bfloat16, torch.float32


class Pair:
    """Two processes that run one check at a time.  After a failure, of which there may be only one, both are replaced."""

    def __init__(self, folder):
        self.folder, self.started, self.processes, self.pipes = folder, 0, [], []

    def __call__(self, check, *args, **options):
        self.send(check, *args, **options)
        found = [pipe.recv() if pipe.poll(120) else "no answer" for pipe in self.pipes]
        if any(found):
            self.stop()
            pytest.fail("\n".join(f"process {rank}: {text}" for rank, text in enumerate(found) if text), pytrace=False)

    def send(self, check, *args, **options):
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((check.__name__, args, options))

    def start(self):
        context = torch_mp.get_context("spawn")
        self.started += 1
        for rank in range(2):
            mine, its = context.Pipe()
            store = str(self.folder / f"store{self.started}")
            process = context.Process(target=worker.serve, args=(rank, store, its), daemon=True)
            process.start()
            self.processes.append(process)
            self.pipes.append(mine)

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    both = Pair(tmp_path_factory.mktemp("processes"))
    yield both
    both.stop()


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("layout", ["whole", "decoders", "layers", "factors", "pairs"])
def test_fully_shard(pair, layout, checkpointed):
    pair(worker.fsdp2, layout, checkpointed)


@pytest.mark.parametrize("layout", ["layers", "factors"])
def test_fully_shard_kept_whole_after_forward(pair, layout):
    """A sibling's weights are there in the recomputation that were not in the forward."""
    pair(worker.fsdp2, layout, True, reshard_after_forward=False)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_fsdp2_of_experts(pair, checkpointed):
    pair(worker.fsdp2_experts, checkpointed)


@pytest.mark.parametrize("layout", ["decoders", "factors"])
def test_fully_shard_accumulates(pair, layout):
    pair(worker.fsdp2_accumulation, layout)


WIDE_REDUCE = dict(param_dtype=bf16, reduce_dtype=fp32)
DTYPES = {
    "fp32 adapters over bf16": ("decoders", bf16, {}),
    "fp32 adapters over bf16, factors": ("factors", bf16, {}),
    "bf16 policy": ("decoders", fp32, WIDE_REDUCE),
    "bf16 policy, factors": ("factors", fp32, WIDE_REDUCE | dict(output_dtype=bf16)),  # as accelerate sets it
    "fp32 units over bf16": ("decoders", bf16, {}, dict(param_dtype=fp32)),
}


@pytest.mark.parametrize("case", DTYPES)
def test_fully_shard_dtypes(pair, case):
    pair(worker.fsdp2_dtypes, *DTYPES[case])


def test_units_that_cast_are_pefts(pair):
    pair(worker.fsdp2_cast_away, "lora_A", param_dtype=bf16, output_dtype=fp32)
    pair(worker.fsdp2_cast_away, "lora_B", output_dtype=bf16)


@pytest.mark.parametrize("layout", ["decoders", "factors"])
def test_dropout_is_the_same_in_the_recomputation(pair, layout):
    pair(worker.dropout, layout)


@pytest.mark.parametrize("layout", ["layers", "factors"])
def test_results_may_be_changed_in_place(pair, layout):
    pair(worker.in_place_on_a_result, layout)


@pytest.mark.parametrize("layout", ["decoders", "factors", "pairs"])
def test_several_adapters_and_biases(pair, layout):
    pair(worker.several_adapters, layout)


@pytest.mark.parametrize("layout", ["decoders", "layers"])
def test_dora(pair, layout):
    pair(worker.dora, layout)


def test_dora_of_sharded_factors_is_pefts(pair):
    pair(worker.dora, "factors", SHARDED)


def test_a_shard_read_outside_its_unit(pair):
    pair(worker.outside_its_unit)


@pytest.mark.parametrize("sharded", [False, True], ids=["", "fully_shard"])
def test_tensor_parallel_factors_are_pefts(pair, sharded):
    pair(worker.tensor_parallel, sharded)


DDP = {
    "plain": (False, False),
    "accumulation": (False, True),
    "checkpointed": (True, False),
    "checkpointed accumulation": (True, True),
    "unused": (False, False, dict(find_unused_parameters=True)),
    "checkpointed unused": (True, False, dict(find_unused_parameters=True)),
    "checkpointed static": (True, False, dict(static_graph=True)),
}


@pytest.mark.parametrize("case", DDP)
def test_ddp(pair, case):
    checkpointed, accumulate, *options = DDP[case]
    pair(worker.ddp, checkpointed, accumulate, **dict(*options))


def test_ddp_with_an_idle_sibling(pair):
    pair(worker.ddp_with_an_idle_sibling)


FSDP1 = {
    "peft": ("peft", False, True),
    "peft, flat": ("peft", False, False),
    "peft, checkpointed": ("peft", True, True),
    "peft, checkpointed, flat": ("peft", True, False),
    "peft, bf16": ("peft", False, True, True),
    "decoders": ("decoders", False, True),
    "decoders, checkpointed, bf16": ("decoders", True, True, True),
    "layers, checkpointed": ("layers", True, True),
    "layers, checkpointed, kept whole": ("layers", True, True, False, "SHARD_GRAD_OP"),
}


@pytest.mark.parametrize("case", FSDP1)
def test_fsdp1(pair, case):
    pair(worker.fsdp1, *FSDP1[case])


@pytest.mark.parametrize("layout", ["decoders", "factors"])
def test_state_dicts(pair, layout, tmp_path):
    pair(worker.state_dicts, layout, tmp_path)


def test_a_process_killed_while_saving(pair, tmp_path):
    """And loaded by two new processes."""
    pair.send(worker.killed_while_saving, tmp_path)
    pair.processes[1].join(60)
    assert pair.processes[1].exitcode == 7
    pair.stop()
    assert (tmp_path / "2").exists()
    assert not (tmp_path / "2" / ".metadata").exists()  # so nobody takes it for a checkpoint
    pair(worker.loads_what_was_saved_before, tmp_path)


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_save_adapter_refuses_shards(pair, kind, tmp_path):
    pair(worker.refuses_to_save_shards, kind, tmp_path)


def test_pipeline_with_a_tied_head(pair):
    pair(worker.pipeline)


@pytest.mark.parametrize("what", ["base_layer", "lora_A", "lora_B"])
def test_weights_on_meta_are_refused_by_name(what):
    """As a stage that was never loaded has them; on a CPU PyTorch's own linear answers with numbers from nowhere."""
    model = patch(worker.peft_model(target_modules=["lm_head"]))
    head = model.base_model.model.lm_head
    part = head.base_layer if what == "base_layer" else getattr(head, what)["default"]
    part.to("meta")
    with pytest.raises(ValueError, match=f"{what}: expected a weight on x's device cpu, got one on meta"):
        model(worker.IDS)


def test_offloaded_weights(tmp_path):
    """accelerate brings every weight by a hook on its module: the base is called, the adapter is PEFT's, counted."""
    accelerate = pytest.importorskip("accelerate")
    unpatched = worker.peft_model()(worker.IDS).logits
    model = accelerate.cpu_offload(patch(worker.peft_model()), execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    torch.testing.assert_close(model(worker.IDS).logits, unpatched)
    assert lowrank.stats(model)["fallback"] == {"hooks on lora_A": worker.FUSED}


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
@pytest.mark.parametrize("case", ["plain", "checkpointed", "bf16"])
def test_zero3(case, tmp_path_factory, request):
    """In processes of its own: DeepSpeed replaces torch's F.linear."""
    own = request.node.parent.__dict__.setdefault("zero3", Pair(tmp_path_factory.mktemp("zero3")))
    request.addfinalizer(own.stop)
    own(worker.zero3, case == "checkpointed", case == "bf16")
