"""Model configs by name: the built-in shapes, a local path, or the hub."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072}
BUILT_IN = {
    "llama-3.2-1b": {
        "model_type": "llama",
        **_LLAMA3,
        "tie_word_embeddings": True,
        "num_attention_heads": 32,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        **_LLAMA3,
        "num_attention_heads": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
    },
    "llama-3.1-70b": {
        "model_type": "llama",
        **_LLAMA3,
        "num_attention_heads": 64,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "max_position_embeddings": 131072,
    },
    "mistral-7b": {  # v0.3
        "model_type": "mistral",
        "vocab_size": 32768,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "sliding_window": None,
    },
}


def load_config(model: str) -> "PretrainedConfig":
    """The transformers config of a built-in name, a local path, or a hub id, tried in this order."""
    from transformers import AutoConfig

    if model in BUILT_IN:
        return AutoConfig.for_model(**BUILT_IN[model])
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        where = "that path" if Path(model).exists() else "no such path here; the hub"
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"no config for {model!r}: not built in ({', '.join(BUILT_IN)}), and {where} gave none: {reason}"
        ) from error
