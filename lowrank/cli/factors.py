"""``lowrank tools factors``: a checkpoint's SVD factors in one file, computed layer by layer.

The checkpoint's safetensors are read one weight at a time.  Where its tensors are not the model's weights as they are
(.bin files, quantised weights, renamed or fused ones), the model is loaded whole instead.
"""

import argparse
import copy
import re
import sys
from itertools import groupby
from pathlib import Path

import torch

from .._linears import Weight, is_conv1d, module_weights, target_layers, weight_shape
from .._screen import console
from ..adapters.factor_files import WrittenLayer, write_factors
from ..checkpoints import open_tensors, tensor_files
from ..measure.models import BUILT_IN, load_config
from ..svd import METHODS

SUMMARY = "write the SVD factors of a checkpoint's linear layers to one safetensors file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a transformers checkpoint, or a hub id")
    parser.add_argument("--out", required=True, metavar="FILE", help="written when all is done; run again to continue")
    parser.add_argument("--k", type=int, help="singular directions of each layer (all)")
    parser.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        default=["all-linear"],
        help="names of layers or their endings, or one regular expression for whole names (all-linear)",
    )
    parser.add_argument("--method", choices=METHODS, default="auto", help="(%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="(%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (%(default)s)")


def main(args: argparse.Namespace) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: this torch finds no CUDA device")
    if args.k is not None and args.k < 1:
        raise ValueError(f"--k: expected a positive integer, got {args.k}")
    weights = checkpoint_weights(args.model, _targets(args.target_modules))
    written = write_factors(
        args.out, weights, k=args.k, method=args.method, dtype=getattr(torch, args.dtype), device=args.device
    )
    _print_table(args.out, written)
    return 0


def checkpoint_weights(model: str, target_modules="all-linear") -> dict[str, Weight]:
    """The weights of a checkpoint's linear layers by layer name, bit for bit what ``from_pretrained`` would load.

    Args:
        model: a folder, or a hub id whose safetensors are downloaded.
        target_modules: :func:`lowrank.adapters.factor_files.target_layers`'s.

    Raises: ValueError if there is no such checkpoint or no such layer; OSError from the download.
    """
    from transformers import AutoModelForCausalLM

    if not model:
        raise ValueError("MODEL: expected a checkpoint's folder or a hub id, got an empty string")
    folder = Path(model)
    if not folder.is_dir():
        if folder.exists() or model in BUILT_IN:
            what = "a file" if folder.exists() else "a built-in shape without weights"
            raise ValueError(f"MODEL: expected a checkpoint's folder or a hub id; {model} is {what}")
        load_config(model)  # its error says what was tried
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, allow_patterns=["*.json", "model*.safetensors"]))
    config = load_config(str(folder.resolve()))
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # it writes a dtype into its config
    except ValueError as error:  # transformers lists every class it knows, over many lines
        raise ValueError(f"transformers builds no causal language model: {str(error).splitlines()[0]}") from error
    layers = target_layers(skeleton, target_modules)
    files = tensor_files(folder)
    reason = _why_not_as_stored(config, skeleton, layers, files)
    if reason is None:
        return {name: _stored(layer, *_locate(name, skeleton, files), config.dtype) for name, layer in layers.items()}
    print(f"loading the whole model: {reason}", file=sys.stderr)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        folder if files else model, dtype="auto", ignore_mismatched_sizes=True, output_loading_info=True
    )
    layers = target_layers(loaded, target_modules)
    random = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    if lost := [name for name in layers if f"{name}.weight" in random]:
        raise ValueError(
            f"MODEL: {model} lacks the weights of {len(lost)} layers, or has others in their place, such as {lost[0]}"
        )
    return module_weights(layers)


def _locate(layer: str, skeleton, files: dict[str, Path]) -> tuple[str, Path] | None:
    """(key, file) of a layer's weight; base models are saved without their prefix."""
    for key in (f"{layer}.weight", f"{layer}.weight".removeprefix(f"{skeleton.base_model_prefix}.")):
        if key in files:
            return key, files[key]
    return None


def _why_not_as_stored(config, skeleton, layers, files: dict[str, Path]) -> str | None:
    """What from_pretrained does to this checkpoint beyond a cast to config.dtype; None for nothing."""
    if not files:
        return "no safetensors"
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantised"
    if not isinstance(config.dtype, torch.dtype):
        return "its configuration has no dtype"
    kept = getattr(skeleton, "_keep_in_fp32_modules", None), getattr(skeleton, "_keep_in_fp32_modules_strict", None)
    if config.dtype is not torch.float32 and any(kept):
        return "some of its modules stay in float32"
    for name, layer in layers.items():
        place = _locate(name, skeleton, files)
        if place is None:
            return f"the files have no {name}.weight"
        key, path = place
        with open_tensors(path) as file:
            stored = file.get_slice(key)
            shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
        if shape != tuple(layer.weight.shape) or dtype not in ("F16", "BF16", "F32", "F64"):
            return f"{key} is stored as {list(shape)} {dtype}"
    return None


def _stored(layer, key: str, path: Path, dtype: torch.dtype) -> Weight:
    def read() -> torch.Tensor:
        with open_tensors(path) as file:
            weight = file.get_tensor(key).to(dtype)
        return weight.mT if is_conv1d(layer) else weight

    return Weight(weight_shape(layer), read)


def _targets(names: list[str]) -> str | list[str]:
    """One word with a regular expression's characters is one; other words are names, which hold only dots of those."""
    if len(names) == 1 and (names[0].lower() == "all-linear" or re.search(r"[*+?|()\[\]{}^$\\]", names[0])):
        return names[0]
    return names


def _print_table(out: str, written: list[WrittenLayer]) -> None:
    """One row for the layers of a kind: the same last name, shape, k and method."""
    from rich import box
    from rich.table import Table

    def kind(layer: WrittenLayer):
        N, K = layer.shape
        return layer.name.rpartition(".")[2], f"{N} x {K}", layer.k, layer.method

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in ("layers", "shape", "k", "method", "number", "MiB", "orthogonality", "reconstruction", "residual", "s"):
        table.add_column(head, justify="left" if head in ("layers", "shape", "method") else "right", no_wrap=True)
    groups = {key: list(group) for key, group in groupby(sorted(written, key=kind), kind)}
    for (name, shape, k, method), group in groups.items():
        table.add_row(name, shape, str(k), method, *_totals(group))
    if len(groups) > 1:
        table.add_section()
        table.add_row("all", "", "", "", *_totals(written))
    screen = console()
    screen.print(table)
    screen.print(f"{out}: {Path(out).stat().st_size:,} bytes.  Errors are the largest of each row.")
    if reused := sum(layer.seconds is None for layer in written):
        screen.print(f"{reused} of {len(written)} layers were there from an interrupted run.")


def _totals(layers: list[WrittenLayer]) -> list[str]:
    worst = [f"{max(values):.1e}" for values in zip(*(layer.errors for layer in layers), strict=True)]
    seconds = sum(layer.seconds or 0 for layer in layers)
    return [str(len(layers)), f"{sum(layer.nbytes for layer in layers) / 2**20:,.1f}", *worst, f"{seconds:.1f}"]
