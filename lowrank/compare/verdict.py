"""Plain sentences drawn from the numbers.  No winner inside the spread, and nothing beyond what this run measured."""


def verdict(result: dict) -> list[str]:
    """result: summarize()'s data."""
    sentences = [
        _scope(result),
        *_invented(result),
        *_not_done(result),
        _judged_by(result),
        _lowest(result),
        _target(result),
        _forgetting(result),
        _memory(result),
    ]
    if result["agreement"]:
        sentences.append(_agreement(result["agreement"]))
    edges = [name for name, m in result["methods"].items() if m["edge_of_grid"]]
    if edges:
        sentences.append(f"The rate picked for {listed(edges)} is the edge of the grid: a better one may lie outside.")
    return sentences


def invented(model: str, names) -> str:
    """What to know of a model whose checkpoint lacks parameters."""
    shown = listed([*names[:3], f"{len(names) - 3} more"] if len(names) > 4 else list(names))
    return f"{model}'s checkpoint has no {shown}: transformers made up random values, and every loss is of that."


def _invented(result: dict) -> list[str]:
    names = result["model"].get("invented")
    return [invented(result["model"]["name"], names)] if names else []


def _not_done(result: dict) -> list[str]:
    sentences = [
        f"{name} was not done: {why.removeprefix(f'{name}: ').rstrip('.')}."
        for name, why in result.get("not_done", {}).items()
    ]
    if not result.get("complete", True):
        sentences.append("Unfinished: what follows is of the runs that were done when this was written.")
    return sentences


def listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def megabytes(count: int) -> str:
    if count < 1e5:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def _scope(result: dict) -> str:
    model, settings = result["model"], result["settings"]
    if not model["embedded"]:
        return (
            f"One model ({model['name']}), one new domain ({result['data']['new']['source']}), "
            f"{settings['steps']} steps: another model, text or budget can order the methods differently."
        )
    pretraining = model["pretraining"]
    return (
        f"This is a model of {model['parameters'] / 1e6:.2f} million parameters, pretrained here for "
        f"{pretraining['steps']} steps ({pretraining['seconds']:.0f} s) on "
        f"{result['data']['general']['source']}: a toy. "
        "What follows describes this run; it says nothing about larger models."
    )


def _judged_by(result: dict) -> str:
    count, seeds = result["data"]["new"]["sequences"]["test"], result["settings"]["seeds"]
    noise = f"more than two standard errors of their difference over the same {count} test sequences"
    apart = "Two methods are called apart"
    if seeds == 1:
        return f"One seed ran: the spread between runs is not known. {apart} if they differ by {noise}."
    return f"{seeds} seeds ran. {apart} if their ranges do not overlap and they differ by {noise}."


def _best(names: list[str], total: int, value: str) -> str:
    """names: the leader and what is not separated from it."""
    if len(names) == 1:
        return f"{names[0]} ({value})" + (", apart from all the others" if total > 1 else "")
    rest = (
        "none of the others separated from it" if len(names) == total else f"{listed(names[1:])} not separated from it"
    )
    return f"no single method: {names[0]} is lowest ({value}), {rest}"


def _lowest(result: dict) -> str:
    methods, names = result["methods"], result["leaders"]["new"]
    value = f"{methods[names[0]]['new_loss']['after']['mean']:.3f}, from {methods[names[0]]['new_loss']['before']:.3f}"
    return (
        f"Lowest loss on the new domain after {result['settings']['steps']} steps: {_best(names, len(methods), value)}."
    )


def _target(result: dict) -> str:
    parts = []
    for name, method in result["methods"].items():
        at, rise = method["at_target"], method["at_target"]["old_loss"]["mean"] - method["old_loss"]["before"]
        parts.append(
            f"{name} at step {at['step']['mean']:.0f}, after {at['seconds']['mean']:.1f} s and with "
            f"{megabytes(method['memory']['total'])}, old-domain loss {rise:+.3f}"
        )
    target = f"a new-domain loss of {result['target_loss']:.3f} (the worst of the methods' best losses)"
    return f"Every method reached {target}: {'; '.join(parts)}."


def _forgetting(result: dict) -> str:
    methods = result["methods"]
    phrases = []
    for key, when in (("old_at_target", "at that equal loss"), ("old", "after equal steps")):
        names = result["leaders"][key]
        method = methods[names[0]]
        after = method["at_target"]["old_loss"] if key == "old_at_target" else method["old_loss"]["after"]
        change = f"{after['mean'] - method['old_loss']['before']:+.3f}"
        phrases.append(f"{when} {_best(names, len(methods), change)}")
    return (
        f"Least forgetting of the old domain: {'; '.join(phrases)}. Who crosses early does so before the learning rate has "
        "decayed, which by itself makes forgetting larger: read the two figures together."
    )


def _memory(result: dict) -> str:
    """Memory is counted, hence without spread; time is not, so no fastest method is named."""
    memory = {name: m["memory"] for name, m in result["methods"].items()}
    low, high = (pick(memory, key=lambda name: memory[name]["total"]) for pick in (min, max))
    if memory[low]["total"] == memory[high]["total"]:
        return f"Training memory ({result['memory_measure']}): {megabytes(memory[low]['total'])} with every method."
    activations = [m["activations"] for m in memory.values()]
    return (
        f"Training memory ({result['memory_measure']}): from {megabytes(memory[low]['total'])} ({low}) to "
        f"{megabytes(memory[high]['total'])} ({high}); "
        f"{megabytes(min(activations))} to {megabytes(max(activations))} of that are saved activations."
    )


def _agreement(agreement: dict) -> str:
    same = (
        "gave the same loss curve within rounding" if agreement["within_rounding"] else "differ by more than rounding"
    )
    text = (
        f"lowrank's and PEFT's LoRA {same}: at most {agreement['largest_difference']:.1e} apart over the first "
        f"{agreement['steps']} steps at rate {agreement['learning_rate']:g}, where up to {agreement['allowed']:.1e} counts "
        "as rounding: "
        f"PEFT with every weight one rounding off differs from itself by {agreement['rounding_alone']:.1e}."
    )
    if agreement["steps"] < agreement["all_steps"]:
        text += (
            f" Training amplifies rounding: over all {agreement['all_steps']} steps the two are "
            f"{agreement['largest_difference_of_all']:.1e} apart, "
            f"and PEFT is {agreement['rounding_alone_of_all']:.1e} from itself."
        )
    return text
