"""The plugin against Axolotl 0.19.0's interface: Axolotl's own classes where it is installed, else what they look like."""

import importlib
import importlib.util
import inspect
import sys
import types

import pytest

pytest.importorskip("peft")
pytest.importorskip("pydantic")
from test_peft import agree, llama, peft_llama, step

import lowrank
from lowrank import _stats

REAL = importlib.util.find_spec("axolotl") is not None
# axolotl.integrations.base.BasePlugin, 0.19.0: the hooks that the plugin has, with their parameters
HOOKS = {
    "get_input_args": ["self"],
    "register": ["self", "cfg"],
    "post_model_load": ["self", "cfg", "model"],
    "post_trainer_create": ["self", "cfg", "trainer"],
    "add_callbacks_post_trainer": ["self", "cfg", "trainer"],
}


def parameters(function):
    return list(inspect.signature(function).parameters)


@pytest.fixture
def axolotl(monkeypatch):
    """lowrank.integrations.axolotl."""
    if not REAL:
        hooks = {name: eval(f"lambda {', '.join(names)}: None") for name, names in HOOKS.items()}
        base = types.ModuleType("axolotl.integrations.base")
        base.BasePlugin = type("BasePlugin", (), hooks)
        for name, module in (("axolotl", None), ("axolotl.integrations", None), (base.__name__, base)):
            monkeypatch.setitem(sys.modules, name, module or types.ModuleType(name))
    monkeypatch.delitem(sys.modules, "lowrank.integrations.axolotl", raising=False)
    yield importlib.import_module("lowrank.integrations.axolotl")
    lowrank.strict(False)
    sys.modules.pop("lowrank.integrations.axolotl", None)


NAME = "lowrank.integrations.axolotl.LowrankPlugin"


def test_its_hooks_are_axolotls(axolotl):
    base = axolotl.BasePlugin
    assert issubclass(axolotl.LowrankPlugin, base)
    own = {name for name, value in vars(axolotl.LowrankPlugin).items() if inspect.isfunction(value)}
    assert own == set(HOOKS)
    for name, expected in HOOKS.items():
        assert parameters(getattr(base, name)) == parameters(getattr(axolotl.LowrankPlugin, name)) == expected


def test_its_arguments_are_found_by_name_and_hold_the_defaults(axolotl):
    module, _, name = axolotl.LowrankPlugin().get_input_args().rpartition(".")
    args = getattr(importlib.import_module(module), name)
    assert args().model_dump() == {"lowrank_siblings": True, "lowrank_shared_mask": False, "lowrank_strict": False}
    with pytest.raises(ValueError, match="lowrank_siblings"):
        args(lowrank_siblings="perhaps")


@pytest.mark.parametrize("key", ["lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"])
def test_axolotls_own_kernels_are_refused_or_turned_off(axolotl, key):
    plugin = axolotl.LowrankPlugin()
    with pytest.raises(ValueError, match=f"{key}: expected false or nothing beside lowrank, got True"):
        plugin.register({"plugins": [NAME], "adapter": "lora", key: True})
    cfg = {"plugins": [NAME], "adapter": "lora"}
    plugin.register(cfg)
    assert cfg[key] is False  # None would be turned on by Axolotl's validation
    other = {"plugins": ["axolotl.integrations.liger.LigerPlugin"], key: True}
    plugin.register(other)
    assert other[key] is True


@pytest.mark.parametrize("options", [{}, {"lowrank_siblings": False}, {"lowrank_shared_mask": True}], ids=str)
@pytest.mark.parametrize("where", ["loader", "trainer"])
def test_the_model_is_patched_wherever_its_adapter_is_made(axolotl, options, where):
    model = peft_llama(lora_alpha=3)
    unpatched = step(model)
    cfg, plugin = {"plugins": [NAME], **options}, axolotl.LowrankPlugin()
    if where == "loader":
        plugin.post_model_load(cfg, model)
    else:  # DPO and the like: Axolotl hands TRL a model and a LoraConfig
        plugin.post_model_load(cfg, model.get_base_model())
        assert not any("lowrank" in type(m).__module__ for m in model.modules())
    trainer = types.SimpleNamespace(model=model)
    plugin.post_trainer_create(cfg, trainer)
    assert lowrank.stats(model)["untouched"] == {}
    (callback,) = plugin.add_callbacks_post_trainer(cfg, trainer)
    callback.on_train_begin(None, None, None, model=model)
    agree(step(model), unpatched)
    siblings = options.get("lowrank_siblings", True)
    assert lowrank.stats(model) == {"fused": 14, "shared": 6 * siblings, "fallback": {}, "untouched": {}}
    assert callback.options == {"siblings": siblings, "shared_mask": bool(options.get("lowrank_shared_mask"))}


def test_strict_and_other_configurations(axolotl):
    plugin, model = axolotl.LowrankPlugin(), peft_llama(init_lora_weights="mica", target_modules=["q_proj"])
    other = {"plugins": [], "lowrank_strict": True}
    plugin.post_model_load(other, model)
    assert plugin.add_callbacks_post_trainer(other, None) == []
    assert not any("lowrank" in type(m).__module__ for m in model.modules())
    plugin.post_model_load({"plugins": [NAME], "lowrank_strict": True}, llama())  # no adapter: no business of ours
    assert not _stats.is_strict()
    plugin.post_model_load({"plugins": [NAME], "lowrank_strict": True}, model)
    with pytest.raises(lowrank.FallbackError, match="MiCA"):
        step(model)


@pytest.mark.skipif(REAL, reason="Axolotl is installed")
def test_without_axolotl_it_says_what_is_missing():
    with pytest.raises(ImportError, match="this needs Axolotl: pip install axolotl"):
        importlib.import_module("lowrank.integrations.axolotl")


@pytest.mark.skipif(not REAL, reason="Axolotl is not installed")
def test_in_axolotls_plugin_manager_and_validation(axolotl, tmp_path):
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    cfg = DictDefault(
        base_model="someone/model", adapter="lora", lora_r=8, lora_alpha=16, lora_target_linear=True, learning_rate=1e-4,
        micro_batch_size=1, gradient_accumulation_steps=1, datasets=[{"path": "some/data", "type": "alpaca"}],
        output_dir=str(tmp_path), plugins=[NAME], lowrank_shared_mask=True,
    )  # fmt: skip
    manager = PluginManager.get_instance()
    manager.plugins.clear()
    prepare_plugins(cfg)
    assert type(manager.plugins[NAME]).__name__ == "LowrankPlugin"
    capabilities = {"bf16": True, "fp8": False, "tf32": False, "n_gpu": 1, "n_node": 1, "compute_capability": "sm_90"}
    found = validate_config(cfg, capabilities, {"torch_version": "2.11.0"})
    assert (found.lowrank_siblings, found.lowrank_shared_mask, found.lowrank_strict) == (True, True, False)
    assert (found.lora_mlp_kernel, found.lora_qkv_kernel, found.lora_o_kernel) == (False, False, False)
    model = peft_llama()
    manager.post_model_load(found, model)
    manager.post_trainer_create(found, types.SimpleNamespace(model=model))
    step(model)
    assert lowrank.stats(model)["fused"] == 14
    assert len(manager.add_callbacks_post_trainer(found, None)) == 1
