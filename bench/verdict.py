"""What each experiment decides, said in one line from its rows."""

from lowrank.ops.svf import cheapest

ADDMM_LIMIT = 1.02  # above it, writing the thin term first and adding the big GEMM to it costs more than it saves
HEAD_LIMIT = 1.15  # of the GEMMs of a frozen head
HEAD_PEERS = ("plain", "plain-chunked", "trl")  # a cross entropy gives a sum
COPY_TARGET = 0.85  # of a copy's bytes per second


def verdict(name: str, rows: list[dict]) -> str:
    """One line.  Figures from a CPU decide nothing about a GPU, and it says so."""
    if not rows:
        return "nothing was timed"
    said = {"addmm": _addmm, "small": _small, "svf_linear": _svf, "linear_logprob": _head}.get(
        name, _thin if any(row["provider"] == "copy" for row in rows) else _ratio
    )(rows)
    return said if rows[0]["device"].startswith("cuda") else f"{said} [{rows[0]['device']}: says nothing about a GPU]"


def cases(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """{everything but the provider: {provider: row}}."""
    by_case: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        keys = ("mode", "M", "K", "N", "r", "dropout", "dtype", "thin_dtype")
        by_case.setdefault(tuple(row[key] for key in keys), {})[row["provider"]] = row
    return by_case


def _addmm(rows):
    ratios = {case: of["addmm_"]["us"] / of["mm"]["us"] for case, of in cases(rows).items() if len(of) == 2}
    if not ratios:
        return "nothing was timed"
    worst = max(ratios, key=ratios.get)
    word = "accepted" if ratios[worst] <= ADDMM_LIMIT else "NOT accepted"
    mode, M, K, N = worst[:4]
    return f"addmm_(beta=1) over mm: {word}; worst {ratios[worst]:.3f} ({mode}, {M}x{K}x{N}), limit {ADDMM_LIMIT}"


def _thin(rows):
    shares: dict[str, list[float]] = {}
    for of in cases(rows).values():
        for name in of.keys() - {"copy"}:
            if "copy" in of:
                shares.setdefault(name, []).append(of["copy"]["us"] / of[name]["us"])
    said = []
    for name, values in sorted(shares.items(), reverse=True):
        word = "reached" if min(values) >= COPY_TARGET else "missed"
        said.append(f"{name} {_range(values, '.0%')} of a copy's bytes/s, target {COPY_TARGET:.0%} {word}")
    return "; ".join(said) or "nothing to compare"


def _ratio(rows):
    """Over the frozen computation, and against the fastest peer of the same case."""
    lowrank_ratios: dict[str, list[float]] = {}
    peer_ratios: dict[str, list[float]] = {}
    slower = compared = 0
    for case, of in cases(rows).items():
        lowrank_rows = [row for name, row in of.items() if name.startswith("lowrank")]
        peers = [row for name, row in of.items() if not name.startswith(("lowrank", "frozen", "lora-"))]
        if not lowrank_rows or "frozen" not in of:
            continue
        frozen, fastest = of["frozen"]["us"], min(lowrank_rows, key=lambda row: row["us"])
        lowrank_ratios.setdefault(case[0], []).append(fastest["us"] / frozen)
        if peers:
            peer = min(peers, key=lambda row: row["us"])
            peer_ratios.setdefault(case[0], []).append(peer["us"] / frozen)
            slower += fastest["us"] > peer["us"]
            compared += 1
    said = [
        f"{mode} {_range(ratios)}×" + (f" (fastest peer {_range(peer_ratios[mode])}×)" if mode in peer_ratios else "")
        for mode, ratios in lowrank_ratios.items()
    ]
    said = f"lowrank over frozen: {', '.join(said)}" if said else "nothing to compare"
    return said + (f"; slower than the fastest peer in {slower} of {compared} cases" if compared else "")


def _small(rows):
    """From which M on the kernels are at least as fast as eager, for every larger M that was timed."""
    said = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        of = {
            case[1:4]: providers
            for case, providers in cases(rows).items()
            if case[0] == mode and "lowrank-triton" in providers
        }
        for K, N in dict.fromkeys(size[1:] for size in of):
            wins = [(size[0], providers) for size, providers in sorted(of.items()) if size[1:] == (K, N)]
            start = None
            for M, providers in reversed(wins):
                if providers["lowrank-triton"]["us"] > providers["lowrank-eager"]["us"]:
                    break
                start = M
            said.append(f"{mode} {K}x{N}: {'eager throughout' if start is None else f'triton from M = {start}'}")
    return "; ".join(said) or "only eager runs here: no crossover"


def _svf(rows):
    """Time and peak memory of each form, and for all singular values the form that ``cheapest`` picks against the fastest."""
    said = [_against(rows, "lowrank-delta", "frozen"), _against(rows, "lowrank-activation", "reference")]
    for case, of in cases(rows).items():
        mode, M, K, N = case[:4]
        merged = "lowrank-merged-layer" if mode == "both" else "lowrank-merged"  # forward alone, a layer's W' is cached
        us = {n: of[n]["us"] for n in ("lowrank-activation", "lowrank-delta-full", merged) if n in of}
        if mode == "backward" or len(us) < 2:
            continue
        rule = cheapest(N, K, min(N, K), M, training=mode == "both", cached=mode == "both")
        picked, fastest = merged if rule == "merged" else f"lowrank-{rule}", min(us, key=us.get)
        over = "" if picked == fastest else f", {us[picked] / us[fastest]:.2f}× of {fastest[8:]}"
        said.append(f"{mode} {M}x{K}x{N}: the cost rule says {picked[8:]}{over or ', the fastest'}")
    return "; ".join(filter(None, said)) or "nothing to compare"


def _head(rows):
    """Over the GEMMs it cannot avoid, and against the fastest peer that also gives log-probabilities of every row."""
    said = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        for of in (of for case, of in cases(rows).items() if case[0] == mode and {"gemms", "lowrank"} <= of.keys()):
            over = {name: row["us"] / of["gemms"]["us"] for name, row in of.items()}
            peer = min((name for name in over if name in HEAD_PEERS), key=over.get, default=None)
            word = "reached" if over["lowrank"] <= HEAD_LIMIT else "missed"
            beside = f", fastest peer {peer} {over[peer]:.2f}×" if peer else ""
            said.append(f"{mode} {over['lowrank']:.2f}× of its GEMMs, limit {HEAD_LIMIT} {word}{beside}")
    return "; ".join(said) or "nothing to compare"


def _against(rows, name, baseline):
    """Forward and backward together: time, and bytes if both have a figure."""
    both = [of for case, of in cases(rows).items() if case[0] == "both"]
    pairs = [(of[name], of[baseline]) for of in both if {name, baseline} <= of.keys()]
    if not pairs:
        return ""
    said = f"{name} {_range([a['us'] / b['us'] for a, b in pairs])}× of {baseline}'s time"
    peaks = [a["peak"] / b["peak"] for a, b in pairs if a.get("peak") and b.get("peak")]
    return said + (f", {_range(peaks)}× of its peak memory" if peaks else "")


def _range(values: list[float], form: str = ".2f") -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low}-{high}"
