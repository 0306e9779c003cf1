"""lowrank's LoRA and PEFT's agree on every kind of model, and no planted fault of lowrank's passes."""

import copy
import json

import pytest
import torch

from lowrank.compare.agreement import PREPARE, agreement
from lowrank.compare.methods import lora_config
from lowrank.compare.settings import Adapter
from lowrank.tasks.rows import Row, pad

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.numeric

DTYPES = [torch.float32, torch.bfloat16]
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 32}
MODELS = {
    "Llama": lambda: transformers.LlamaConfig(**LLAMA, attention_bias=True),
    "tied": lambda: transformers.LlamaConfig(**{**LLAMA, "num_hidden_layers": 2}, tie_word_embeddings=True),
    "GPT2": lambda: transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    ),
    "Falcon": lambda: transformers.FalconConfig(**SIZES, max_position_embeddings=32, bias=True),
    "Mixtral": lambda: transformers.MixtralConfig(**LLAMA, num_local_experts=3),
    "Mamba": lambda: transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4),
}
ALONE = {
    "Llama": 7,
    "tied": 14,
    "GPT2": 4,
    "Falcon": 4,
    "Mixtral": 4,
    "Mamba": 2,
}  # Mixtral: without its experts' stacks


def build(name: str, dtype: torch.dtype):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_()
    return model.to(dtype)


def batch(padded: bool = False):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (3, 16), generator=generator).tolist()
    return pad([Row.of(row[:4], row[4 : 16 - 3 * i * padded]) for i, row in enumerate(ids)], 0)


def mamba(adapt):
    """PEFT refuses the layers whose weights Mamba reads by itself."""
    return lambda model, adapter: adapt(model, lora_config(adapter, ["in_proj", "x_proj"]))


def prepare(name: str):
    import lowrank

    return (mamba(lowrank.adapt), mamba(peft.get_peft_model)) if name == "Mamba" else PREPARE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_lowrank_and_peft_agree(name, dtype):
    base = build(name, dtype)
    for rank in (1, 64):
        result = agreement(base, batch(padded=rank == 64), Adapter(rank), "cpu", prepare=prepare(name))
        assert result["agrees"], result["reasons"]
        assert not result["reasons"]
        assert result["alone"] == ALONE[name]
        assert result["layers"] == result["alone"] + (3 if name == "Mixtral" else 0)
        assert len(result["distances"]) == 6
        json.dumps(result, allow_nan=False)


def fault(plant, make=PREPARE[0]):
    """lowrank's preparation, with a fault in the model that comes of it."""

    def prepare(model, adapter):
        model = make(model, adapter)
        plant(model)
        return model

    return prepare


def layers(model):
    return {name.rpartition(".")[2]: m for name, m in model.named_modules() if hasattr(m, "lora_A")}


def scaled(factor, *names):
    def plant(model):
        for name, layer in layers(model).items():
            if not names or name in names:
                layer.scaling["default"] *= factor

    return fault(plant)


def around(module, before, after):
    """Replace the module's forward by one between two calls."""
    forward = module.forward

    def faulty(*args, **kwargs):
        before()
        try:
            return forward(*args, **kwargs)
        finally:
            after()

    module.forward = faulty


def untargeted(model, adapter):
    import lowrank

    return lowrank.adapt(model, lora_config(adapter, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]))


def dropping(model, adapter):
    import lowrank

    config = lora_config(adapter)
    config.lora_dropout = 0.1
    return lowrank.adapt(model, config)


def without_bias(model):
    layers(model)["v_proj"].base_layer.bias = None


def factors_swapped(model):
    k, v = layers(model)["k_proj"], layers(model)["v_proj"]

    def swap():
        k._modules["lora_A"], v._modules["lora_A"] = v._modules["lora_A"], k._modules["lora_A"]
        k._modules["lora_B"], v._modules["lora_B"] = v._modules["lora_B"], k._modules["lora_B"]

    around(k, swap, swap)


def siblings_swapped(model):
    """k and v take each other's result, out of the call that computes both."""
    k, v = layers(model)["k_proj"], layers(model)["v_proj"]
    k.forward, v.forward = v.forward, k.forward


def gradient_lost(model):
    layers(model)["up_proj"].register_forward_hook(lambda layer, args, y: y.detach() + 0 * args[0].sum())


def off_in_the_model(model):
    """The layer is right where it is called alone."""
    (decoder,) = (m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer")
    scaling = layers(model)["o_proj"].scaling
    right = scaling["default"]
    around(decoder, lambda: scaling.update(default=0.0), lambda: scaling.update(default=right))


def not_a_number(model):
    layers(model)["down_proj"].register_forward_hook(lambda layer, args, y: y * float("nan"))


FAULTS = {
    "scale of all": (scaled(1.02), "output"),
    "scale of one": (scaled(1.02, "o_proj"), "output"),
    "scale of one sibling": (scaled(1.02, "k_proj"), "output"),
    "no scale": (scaled(0.0, "down_proj"), "output"),
    "one layer without adapter": (untargeted, "down_proj is not adapted in lowrank's model, a LoRA layer in PEFT's"),
    "dropout": (dropping, "output"),
    "bias": (fault(without_bias), "output"),
    "factors swapped": (fault(factors_swapped), "output"),
    "siblings swapped": (fault(siblings_swapped), "output"),
    "gradient lost": (fault(gradient_lost), "gradient of A"),
    "off in the model": (fault(off_in_the_model), "gradients of the model"),
    "not a number": (fault(not_a_number), "output"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAULTS)
def test_no_planted_fault_passes(name, dtype):
    faulty, said = FAULTS[name]
    result = agreement(build("Llama", dtype), batch(), Adapter(8), "cpu", prepare=(faulty, PREPARE[1]))
    assert not result["agrees"]
    assert any(said in reason for reason in result["reasons"]), result["reasons"]
    if name == "off in the model":
        assert all("the model" in reason for reason in result["reasons"]), result["reasons"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fault_of_pefts_is_told(dtype):
    def dropping(model):
        layers(model)["o_proj"].lora_dropout["default"] = torch.nn.Dropout(0.1)

    result = agreement(
        build("Llama", dtype), batch(), Adapter(8), "cpu", prepare=(PREPARE[0], fault(dropping, PREPARE[1]))
    )
    assert not result["agrees"]
    output = result["distances"]["output"]
    assert output["lowrank"] < 1 < output["peft"]


def test_the_base_and_the_generator_are_left_as_they_are():
    base = build("Llama", torch.float32)
    before, state = copy.deepcopy(base.state_dict()), torch.get_rng_state()
    first = agreement(base, batch(), Adapter(2), "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad for p in base.parameters())
    assert base.training
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name])
    torch.manual_seed(5)
    assert agreement(base, batch(), Adapter(2), "cpu") == first
