"""Axolotl on lowrank by a plugin, in its YAML; docs/frameworks.md has the keys.

    plugins:
      - lowrank.integrations.axolotl.LowrankPlugin

Axolotl's own LoRA kernels replace forwards too, and are turned on where a configuration says nothing of them: the plugin
turns them off, and refuses a configuration that asks for both.
"""

from typing import TYPE_CHECKING, Any

from torch import nn

from .. import _stats
from .peft import patch

try:
    from axolotl.integrations.base import BasePlugin
    from peft import PeftModel
    from pydantic import BaseModel
except ImportError as error:
    raise ImportError("this needs Axolotl: pip install axolotl") from error

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

TESTED = "0.19.0"
_THEIRS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")


class LowrankArgs(BaseModel):
    """The keys that the plugin adds to Axolotl's configuration: options of ``patch(model)``, and ``lowrank.strict()``."""

    lowrank_siblings: bool = True
    lowrank_shared_mask: bool = False
    lowrank_strict: bool = False


class LowrankPlugin(BasePlugin):
    """Patches the model once its adapter is there, before DDP, FSDP and torch.compile wrap it, and reports the first step.

    Raises: ValueError if the configuration turns one of Axolotl's LoRA kernels on, or, when training begins, if the model
        has no LoRA layer that lowrank covers.
    """

    def get_input_args(self) -> str:
        return f"{__name__}.LowrankArgs"

    def register(self, cfg: dict[str, Any]) -> None:
        """Before Axolotl validates the configuration, which is where it turns on what nobody turned off."""
        if not _wanted(cfg):
            return
        for key in _THEIRS:
            if cfg.get(key):
                raise ValueError(
                    f"{key}: expected false or nothing beside lowrank, got {cfg[key]}: both replace forwards"
                )
            cfg[key] = False

    def post_model_load(self, cfg: dict[str, Any], model: nn.Module) -> None:
        if _wanted(cfg) and isinstance(model, PeftModel):  # a reference model has no adapter
            patch(model, **_options(cfg))
            if cfg.get("lowrank_strict"):
                _stats.strict()

    def post_trainer_create(self, cfg: dict[str, Any], trainer: "Trainer") -> None:
        self.post_model_load(cfg, trainer.model)  # TRL's trainers make the adapter themselves

    def add_callbacks_post_trainer(self, cfg: dict[str, Any], trainer: "Trainer") -> list["TrainerCallback"]:
        from .transformers import PatchCallback

        return [PatchCallback(**_options(cfg))] if _wanted(cfg) else []


def _wanted(cfg: dict[str, Any]) -> bool:
    """Axolotl keeps a plugin for the whole process, and asks it for configurations that do not name it."""
    return f"{__name__}.LowrankPlugin" in (cfg.get("plugins") or ())


def _options(cfg: dict[str, Any]) -> dict[str, Any]:
    return {"siblings": cfg.get("lowrank_siblings") is not False, "shared_mask": bool(cfg.get("lowrank_shared_mask"))}
