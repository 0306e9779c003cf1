"""Plain sentences drawn from the numbers.  No winner inside the spread, and nothing beyond what this run measured."""

from .budget import words as duration
from .probe import Trained, held
from .statistics import SHARES
from .train import WARM_UP, WARM_UP_STEPS

TAUGHT = {"knowledge": "Knowledge", "format": "Format", "text": "Text"}
LEARNT = {
    "trained_exact": "of the facts recalled in the trained wording",
    "asked_exact": "of the held-out questions answered exactly",
    "valid": "of the answers valid",
}


def answer(result: dict) -> list[str]:
    """The answer in five lines: what was taught, who learnt it and at what forgetting, at what cost, and what that says."""
    return [
        _taught(result),
        *(_task(name, task) for name, task in result["tasks"].items()),
        _cost(result),
        _says(result),
    ]


def details(result: dict) -> list[str]:
    """How far to trust the answer."""
    sentences = [*_invented(result), *_unfinished(result), _judged_by(result)]
    sentences += [_apart(name, task) for name, task in result["tasks"].items()]
    sentences += [line for name, task in result["tasks"].items() for line in _over_rates(name, task)]
    sentences += [line for name, task in result["tasks"].items() for line in _forecast(name, task, result)]
    sentences += _kept(result)
    sentences += [line for name, task in result["tasks"].items() for line in _edges(name, task)]
    if result["agreement"]:
        sentences.append(_agreement(result["agreement"]))
    return sentences


def listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def megabytes(count: int) -> str:
    if count < 1e5:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def goal(task: dict, target: float) -> str:
    """ "95 % of the facts recalled", or a loss and the share of the largest gain that it stands for."""
    if task["learnt"] != "loss":
        return f"{target:.0%} {LEARNT[task['learnt']]}"
    share = SHARES[task["targets"].index(target)]
    return f"a loss of {target:.3f} ({share:.0%} of the largest gain)"


def value(task: dict, number: float) -> str:
    return f"{number:.3f}" if task["learnt"] == "loss" else f"{number:.0%}"


def _taught(result: dict) -> str:
    model = result["model"]
    things = [f"{name} ({task['source']})" for name, task in result["tasks"].items()]
    return f"Taught to {model['name']}, {model['parameters'] / 1e6:.4g} million parameters: {listed(things)}."


def _task(name: str, task: dict) -> str:
    """Who reached the last target, after how many steps and at what forgetting, and who did not."""
    title = TAUGHT[name]
    if not task["targets"]:
        return f"{title}: no method learnt anything ({value(task, task['base'][task['learnt']])} before training)."
    target = task["targets"][-1]
    met, missed = [], []
    for method, m in task["methods"].items():
        at = m["at_targets"][-1]
        if at["forgot"] is None:
            missed.append((method, m, at))
            continue
        when = f" in {at['step']['mean']:.0f} steps" if at["step"] else ""
        met.append(
            (
                at["step"]["mean"] if at["step"] else at["forgot"]["mean"],
                f"{method}{when} ({at['forgot']['mean']:+.2f})",
            )
        )
    text = f"{title}: "
    if met:
        text += f"{goal(task, target)} reached by {listed([words for _, words in sorted(met)])}"
    else:
        text += f"no method reached {goal(task, target)}"
    if missed:
        reached = [f"{method} ({_end(task, m, at)})" for method, m, at in missed]
        text += (
            f"; {'not reached' if met else 'at the end'} in {task['steps']} steps: {listed(reached)}"
            if met
            else (f" in {task['steps']} steps: {listed(reached)}")
        )
    return text + ". In brackets: rise of the loss on general text." if met else text + "."


def _end(task: dict, m: dict, at: dict) -> str:
    some = f", {at['reached']} of {at['of']} seeds" if at["reached"] else ""
    return f"{value(task, m['after'][task['learnt']]['mean'])}{some}"


def _cost(result: dict) -> str:
    memory = {name: m["memory"]["total"] for name, m in result["methods"].items()}
    low, high = min(memory, key=memory.get), max(memory, key=memory.get)
    seconds = {
        name: task["seconds_per_step"]["mean"]
        for each in result["tasks"].values()
        for name, task in each["methods"].items()
        if task["seconds_per_step"]
    }
    span = f"{min(seconds.values()) * 1e3:.0f} to {max(seconds.values()) * 1e3:.0f} ms a step" if seconds else ""
    if memory[low] == memory[high]:
        return (
            f"Cost: {megabytes(memory[low])} of training memory with every method ({result['memory_measure']}); {span}."
        )
    return (
        f"Cost: training memory from {megabytes(memory[low])} ({low}) to {megabytes(memory[high])} ({high}), "
        f"{result['memory_measure']}; {span}."
    )


def _says(result: dict) -> str:
    """What it says and what it cannot say."""
    model = result["model"]
    enough = [_smallest(name, task, result) for name, task in result["tasks"].items()]
    said = "; ".join(part for part in enough if part)
    said = f"So, here: {said}. " if said else "So, here: nothing was learnt well enough to compare. "
    if model["embedded"]:
        seconds = model["pretraining"]["seconds"]
        return f"{said}This is a toy, pretrained for {seconds:.0f} s: it says nothing about larger models."
    return said + "Another model, other data or a larger budget can order the methods differently."


def chosen(task: dict, result: dict) -> str | None:
    """The method with the least memory among those that reached the last target; None where none did."""
    met = [name for name, m in task["methods"].items() if m["at_targets"] and m["at_targets"][-1]["forgot"]]
    return min(met, key=lambda name: result["methods"][name]["memory"]["total"]) if met else None


def _smallest(name: str, task: dict, result: dict) -> str | None:
    method = chosen(task, result)
    if method is None:
        return None
    if method == "full":
        others = [other for other in task["methods"] if other != "full"]
        if near := [other for other in others if task["methods"][other]["short"] is False]:
            return f"for {name} full training was better than {listed(near)} by less than can be told"
        return (
            f"{name} took full training ({listed(others)} did not get there)"
            if others
            else f"{name} was learnt by full"
        )
    kind = {
        "full-masked": "a fifth of the weights was",
        "full→lora": "a few steps of every weight and then an adapter were",
    }
    text = f"for {name} {kind.get(method.partition(':')[0], 'an adapter was')} enough ({method})"
    at = {n: task["methods"][n]["at_targets"][-1] for n in (method, "full") if n in task["methods"]}
    if "full" in at and at["full"]["forgot"]:
        a, b = at[method]["forgot"], at["full"]["forgot"]
        low, high = ((method, a), ("full", b)) if a["mean"] < b["mean"] else (("full", b), (method, a))
        if low[1]["most"] < high[1]["least"] and task["methods"][method]["kept_unlike"]:
            text += f", though {low[0]} forgot less" if low[0] == "full" else ", and it forgot less than full"
    return text


def invented(model: str, names) -> str:
    """What to know of a model whose checkpoint lacks parameters."""
    shown = listed([*names[:3], f"{len(names) - 3} more"] if len(names) > 4 else list(names))
    return f"{model}'s checkpoint has no {shown}: transformers made up random values, and every loss is of that."


def _invented(result: dict) -> list[str]:
    names = result["model"].get("invented")
    return [invented(result["model"]["name"], names)] if names else []


def _unfinished(result: dict) -> list[str]:
    sentences = [
        f"{name} was not done: {why.removeprefix(f'{name}: ').rstrip('.')}."
        for name, why in result.get("not_done", {}).items()
    ]
    for name, task in result["tasks"].items():
        for method, m in task["methods"].items():
            if lost := [f"{rate['learning_rate']:g}" for rate in m["rates"] if rate["diverged"]]:
                sentences.append(f"{name}: {method} diverged at {listed(lost)}.")
            if lost := m["seeds_diverged"]:
                sentences.append(
                    f"{name}: {method} diverged at the picked rate with seed {listed([str(s) for s in lost])}."
                )
    if not result.get("complete", True):
        sentences.append("Unfinished: what follows is of the runs that were done when this was written.")
    return sentences


def _judged_by(result: dict) -> str:
    seeds = result["settings"]["seeds"]
    noise = "more than two standard errors of their difference over the same items"
    apart = "Two methods are called apart"
    if seeds == 1:
        return f"One seed ran: the spread between runs is not known. {apart} if they differ by {noise}."
    return (
        f"{seeds} seeds ran, the picked rate alone with all of them. {apart} if their ranges do not overlap and they differ "
        f"by {noise}."
    )


def _apart(name: str, task: dict) -> str:
    names, measure = task["leaders"]["learnt"], task["apart"]
    unit = {
        "trained_nats": "nats a fact in the trained wording",
        "asked_nats": "nats an answer",
        "loss": "nats a token",
    }[measure]
    lowest = f"{task['methods'][names[0]]['after'][measure]['mean']:.3f}, from {task['base'][measure]:.3f}"
    count = len(task["methods"])
    text = f"{TAUGHT[name]}, {unit} after {task['steps']} steps: {_best(names, count, lowest)}"
    kept = task["leaders"]["kept"]
    change = f"{task['methods'][kept[0]]['forgot']['mean']:+.3f}"
    return f"{text}. Least forgetting after as many steps: {_best(kept, count, change)}."


def _best(names: list[str], total: int, value: str) -> str:
    """names: the leader and what is not separated from it."""
    if len(names) == 1:
        return f"{names[0]} ({value})" + (", apart from all the others" if total > 1 else "")
    rest = (
        "none of the others separated from it" if len(names) == total else f"{listed(names[1:])} not separated from it"
    )
    return f"no single method: {names[0]} is lowest ({value}), {rest}"


def _over_rates(name: str, task: dict) -> list[str]:
    """Forgetting at equal learning, over every rate tried: rates move it more often than methods do."""
    if not task["constant_rate"] or not task["targets"]:
        return []
    lines = []
    for index, target in enumerate(task["targets"]):
        ranges = []
        for method, m in task["methods"].items():
            met = [rate["at_targets"][index]["forgot"] for rate in m["rates"] if rate["at_targets"][index]]
            if met:
                span = f"{min(met):+.2f}" if len(met) == 1 else f"{min(met):+.2f} to {max(met):+.2f}"
                ranges.append(f"{method} {span} ({len(met)} of {len(m['rates'])} rates)")
        if ranges:
            lines.append(
                f"{TAUGHT[name]}: forgetting at {goal(task, target)}, over every rate tried: {'; '.join(ranges)}."
            )
    return lines


def _forecast(name: str, task: dict, result: dict) -> list[str]:
    """What examples in the context foretold, and what training made of it."""
    lines = (
        [f"{TAUGHT[name]}, foretold by examples in the context (lowrank probe): {task['finding']}"]
        if task["finding"]
        else []
    )
    for method, m in task["methods"].items():
        if m["trained"]:
            after = Trained(*m["trained"])
            forecast = result["probe"]["sets"].get(task["probed"])
            lines.append(f"{TAUGHT[name]}, {method}: {held(forecast, after)}.")
    return lines


def _kept(result: dict) -> list[str]:
    forgetting, lines = result["forgetting"], []
    if forgetting["nothing_to_forget"]:
        lines.append(
            f"Of the known items the model had {forgetting['known_items']} right before training: nothing to forget here, so "
            "no share of them is reported."
        )
    if forgetting["diversity"] is None:
        lines.append(
            "The formats of the model's own answers were not measured: it cannot be asked, or has too few positions."
        )
    elif not forgetting["diverse"]:
        nats, error = forgetting["diversity"]
        lines.append(
            f"The formats of the model's own answers have an entropy of {nats:.2f} ± {error:.2f} nats: nothing to collapse "
            "here."
        )
    return lines


def _edges(name: str, task: dict) -> list[str]:
    edges = [method for method, m in task["methods"].items() if m["edge_of_grid"]]
    if not edges:
        return []
    return [
        f"{TAUGHT[name]}: the rate picked for {listed(edges)} is the edge of what was tried: a better one may lie outside."
    ]


def _agreement(agreement: dict) -> str:
    if not agreement["agrees"]:
        reasons = "; ".join(agreement["reasons"][:3])
        return f"lowrank's and PEFT's LoRA DIFFER on this model: {reasons}. Distrust what lora shows."
    text, rest = "lowrank's and PEFT's LoRA compute the same", agreement["layers"] - agreement["alone"]
    if output := agreement["distances"].get("output"):
        text += (
            f": in {agreement['alone']} linear layers, in {agreement['dtype']}, lowrank's output is at most "
            f"{output['lowrank']:.2f} roundings from the formula in fp64 where PEFT's is {output['peft']:.2f}"
        )
    if gradients := agreement["distances"].get("gradients"):
        text += f"; in the whole model in fp32 no factor's gradient differs by more than {gradients['lowrank']:.1e}"
    more = f" ({rest} more, stacks of experts or layers without a token, as part of the model alone.)" if rest else ""
    return f"{text}.{more}"


def paste(result: dict) -> list[str]:
    """Lines of Python for the methods chosen, a block per task."""
    blocks = []
    for name, task in result["tasks"].items():
        method = chosen(task, result)
        if method is not None:
            blocks += [*([""] if blocks else []), *_block(name, task, method, result)]
    return blocks


def _block(name: str, task: dict, method: str, result: dict) -> list[str]:
    m, costs, settings = task["methods"][method], result["methods"][method], result["settings"]
    base = method.partition(":")[0]
    at = m["at_targets"][-1]
    steps = round(at["step"]["most"]) if at["step"] else task["steps"]
    reached = f"reached {goal(task, task['targets'][-1])}" + (f" in {steps} steps" if at["step"] else "")
    lines = [f"# {name}: {method}, which {reached}"]
    targets = ", ".join(repr(target) for target in settings["target_modules"])
    layers = costs["layers"] or (f"[{targets}]" if targets else '"all-linear"')
    if base == "full→lora":
        lines.append(f"# {costs['summary']}: two runs, docs/full-finetuning.md")
    elif costs["rank"] is not None:
        stacks = f", target_parameters={costs['stacks']!r}" if costs["stacks"] else ""
        lines.append(f"LoraConfig(r={costs['rank']}, lora_alpha={costs['alpha']}, target_modules={layers}{stacks})")
    elif base.startswith("svf"):
        k = "" if base == "svf-full" else f"k={costs['directions']}"
        lines.append(f"lowrank.SVFConfig({k})")
    elif base == "full":
        masters = settings["dtype"] == "bfloat16" and not settings["in_place"]
        lines += ["model.requires_grad_(True)"]
        if masters:  # else Trainer would step the bf16 weights in place
            lines += [
                f"optimizer = lowrank.optim.AdamW(model.parameters(), lr={m['learning_rate']:g}, weight_decay=0.0, "
                "master_weights=True)",
                "# SFTTrainer(..., optimizers=(optimizer, None))",
            ]
    else:
        lines.append(f"# {costs['summary']}: docs/full-finetuning.md")
    schedule, warm_up = "cosine", max(1, round(WARM_UP * task["steps"]))
    if task["constant_rate"]:
        schedule, warm_up = "constant_with_warmup", WARM_UP_STEPS
    arguments = {
        "learning_rate": f"{m['learning_rate']:g}",
        "max_steps": steps,
        "per_device_train_batch_size": task["batch"],
        "lr_scheduler_type": f'"{schedule}"',
        "warmup_steps": warm_up,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "max_length": settings["length"],
    }
    if settings["loss"] == "assistant":
        arguments["assistant_only_loss"] = True
    return [*lines, "SFTConfig(", *(f"    {name}={value}," for name, value in arguments.items()), ")"]


def took(result: dict) -> str:
    return duration(result["seconds"])
