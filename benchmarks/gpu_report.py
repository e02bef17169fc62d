"""Turns the results of gpu.py into tables, plots and checks of the bounds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 2**30
THROUGHPUT = ("8b-lora", "1.7b-full", "1.7b-lora", "8b-full")


@dataclass(frozen=True)
class Check:
    """found: None where it was not measured. met: None then too, and on a CPU, where only gates are judged."""

    what: str
    bound: str
    found: str | None
    met: bool | None


def verdicts(state: dict[str, Any]) -> list[Check]:
    parts, judged = state["parts"], "capability" in state["about"]
    checks = []
    for name in ("gate-kernels", "gate-head", "gate-families", "gate-syncs"):
        result = parts.get(name, {})
        wrong = [row["case"] for row in result.get("rows", []) if not row["ok"]]
        found = result.get("failed") or (", ".join(wrong) or "all right" if "ok" in result else None)
        checks.append(Check(name, "all right", found, result.get("ok", False if found else None)))
    for name in ("8b-lora", "1.7b-full"):
        trainers = parts.get(name, {}).get("trainers", {})
        ours = trainers.get("ours", {})
        for other, factor in (("TRL, default", 2.5), ("TRL, best", 1.6)):
            theirs = trainers.get(other, {})
            ratio = _ratio(ours, theirs, "pairs_per_second")
            checks.append(_bounded(f"{name}: pairs/s over {other}", ratio, factor, at_least=True, judged=judged))
            memory = _ratio(ours, theirs, "above_static")
            checks.append(
                _bounded(f"{name}: memory above static, of {other}", memory, 0.5, at_least=False, judged=judged)
            )
    least = 0.3 if state["about"]["versions"].get("torch", "").startswith("2.11") else 0.4
    mfu = parts.get("8b-lora", {}).get("trainers", {}).get("ours", {}).get("mfu")
    checks.append(_bounded("8b-lora: MFU on shared FLOPs", mfu, least, at_least=True, judged=judged))
    images = parts.get("images", {}).get("trainers", {})
    gain = _ratio(images.get("ours", {}), images.get("ours, padded", {}), "pairs_per_second")
    checks.append(_bounded("images: pairs/s over ours padded", gain, 1.8, at_least=True, judged=judged))
    for trained, factor in ((False, 1.6), (True, 1.5)):
        rows = parts.get("head", {}).get("results", [])
        row = next((r for r in rows if r["trained"] is trained and r.get("default")), {})
        kind = "trained" if trained else "frozen"
        over, peak = row.get("over_bare"), row.get("peak_allocated")
        checks.append(
            _bounded(f"head, {kind}: time over the bare matmuls", over, factor, at_least=False, judged=judged)
        )
        gib = None if peak is None else peak / GIB
        checks.append(_bounded(f"head, {kind}: peak memory, GiB", gib, 8.0, at_least=False, judged=judged))
    return checks


def _ratio(ours: dict[str, Any], theirs: dict[str, Any], key: str) -> float | None:
    a, b = ours.get(key), theirs.get(key)
    return None if a is None or b is None else a / b


def _bounded(what: str, found: float | None, bound: float, *, at_least: bool, judged: bool) -> Check:
    text = f"{'at least' if at_least else 'at most'} {bound:g}"
    if found is None:
        return Check(what, text, None, None)
    return Check(what, text, f"{found:.2f}", (found >= bound if at_least else found <= bound) if judged else None)


# ---------------------------------------------------------------- text


def markdown(state: dict[str, Any]) -> str:
    about = state["about"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [f"# {about['device']}, {about['date']}, commit {about['commit']}", "", versions + "."]
    if about["tiny"]:
        lines += ["", "Tiny shapes: this shows that the program runs. No figure here means anything."]
    lines += ["", "| what must hold | bound | found | |", "|---|---|---|---|"]
    for check in verdicts(state):
        word = {True: "met", False: "NOT MET", None: "not measured" if check.found is None else "not judged"}[check.met]
        lines.append(f"| {check.what} | {check.bound} | {check.found or '-'} | {word} |")
    parts = state["parts"]
    for name, result in parts.items():
        lines += ["", f"## {name}", ""]
        if "failed" in result or "skipped" in result:
            lines.append(result.get("failed") or f"Skipped: {result['skipped']}.")
        elif name.startswith("gate"):
            lines += _gate(result["rows"])
        elif "trainers" in result:
            lines += _trainers(result)
        elif name == "grid":
            lines += _grid(result["rows"])
        elif name == "profile":
            lines += _profile(result)
        else:
            lines += _plain(result)
    return "\n".join(lines) + "\n"


def _gate(rows: list[dict[str, Any]]) -> list[str]:
    columns = [key for key in rows[0] if key not in ("case", "ok")]
    lines = [f"| case | {' | '.join(columns)} | |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        cells = [_cell(row[column]) for column in columns]
        lines.append(f"| {row['case']} | {' | '.join(cells)} | {'right' if row['ok'] else 'WRONG'} |")
    return lines


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:.1e}" for name, number in value.items())
    return f"{value:.1e}" if isinstance(value, float) else str(value if value is not None else "none")


def _trainers(result: dict[str, Any]) -> list[str]:
    lines = []
    if "tokens" in result:
        tokens = result["tokens"]
        lines += [
            f"Micro-batches of {result['micro_batch']} pairs, {result['pairs']} pairs a round.",
            f"Tokens: {tokens['shared']} with shared prompts, {tokens['padded']} padded,",
            f"{tokens['padded, grouped']} padded in batches of similar length.",
            f"Weights, gradients and AdamW's moments: {result['static_bytes'] / GIB:.1f} GiB.",
        ]
    if "TRL, default" in result["trainers"]:
        lines.append(
            "TRL's forward and loss are written again (benchmarks/trl_forward.py); nothing of its Trainer is in them."
        )
    lines += ["", "| | pairs/s | of ours | MFU | peak allocated, GiB | reserved | above static | |", "|---" * 8 + "|"]
    ours = result["trainers"].get("ours", {}).get("pairs_per_second")
    for name, row in result["trainers"].items():
        if "failed" in row:
            lines.append(f"| {name} | {row['failed']} | | | | | | {row['note']} |")
            continue
        memory = [
            f"{row[k] / GIB:.2f}" if row[k] is not None else "-"
            for k in ("peak_allocated", "peak_reserved", "above_static")
        ]
        share = f"{row['pairs_per_second'] / ours:.2f}" if ours else "-"
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        lines.append(
            f"| {name} | {row['pairs_per_second']:.3f} | {share} | {mfu} | {' | '.join(memory)} | {row['note']} |"
        )
    return lines


def _grid(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| P | C = R | pairs | ours, pairs/s | over ours padded | over TRL, default |", "|---" * 6 + "|"]
    for row in rows:
        trainers = row["trainers"]
        speed = trainers["ours"].get("pairs_per_second")
        ratios = [
            _ratio(trainers["ours"], trainers[other], "pairs_per_second") for other in ("ours, padded", "TRL, default")
        ]
        cells = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        found = "-" if speed is None else f"{speed:.2f}"
        lines.append(
            f"| {row['prompt']} | {row['completion']} | {row['micro_batch']} | {found} | {' | '.join(cells)} |"
        )
    return lines


def _profile(result: dict[str, Any]) -> list[str]:
    total = result["seconds_per_step"]
    lines = [f"{total * 1e3:.1f} ms a step, {result['operations_per_step']:.0f} operations with device time.", ""]
    lines += ["| kind | ms | share |", "|---|---|---|"]
    for kind, seconds in {**result["kinds"], "idle": result["idle"]}.items():
        lines.append(f"| {kind} | {seconds * 1e3:.2f} | {seconds / total:.1%} |")
    rate, matmul = result["model_flops_per_second"] / 1e12, result["matmul_flops_per_second"] / 1e12
    mfu = "" if result["mfu"] is None else f" MFU {result['mfu']:.1%} of the datasheet's peak;"
    return [
        *lines,
        "",
        f"{rate:.3g} TFLOP/s of model FLOPs;{mfu} {rate / matmul:.1%} of a large matmul's {matmul:.3g}.",
    ]


def _plain(result: dict[str, Any]) -> list[str]:
    lines = [f"{key}: {value}" for key, value in result.items() if not isinstance(value, list)]
    for rows in (value for value in result.values() if isinstance(value, list) and value):
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for row in rows:
            cells = [f"{v:.4g}" if isinstance(v := row.get(column), float) else str(v) for column in columns]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


# ---------------------------------------------------------------- plots


def plots(state: dict[str, Any], path: Path) -> None:
    """Pairs per second and peak memory of the trainers, and where a step goes. Nothing without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("No plots: matplotlib is not installed.")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = state["parts"]
    cases = [name for name in THROUGHPUT if "trainers" in parts.get(name, {})]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5))
    for axis, key, unit, title in (
        (axes[0], "pairs_per_second", 1.0, "pairs per second"),
        (axes[1], "peak_allocated", GIB, "peak memory, GiB"),
    ):
        names = list(dict.fromkeys(name for case in cases for name in parts[case]["trainers"]))
        for i, name in enumerate(names):
            heights = [(parts[case]["trainers"].get(name, {}).get(key) or 0) / unit for case in cases]
            axis.bar([place + 0.16 * i for place in range(len(cases))], heights, width=0.15, label=name)
        axis.set_xticks([place + 0.32 for place in range(len(cases))], cases, fontsize=8)
        axis.set_title(title)
    if cases:
        axes[0].legend(fontsize=8)
    profile = parts.get("profile", {})
    if "kinds" in profile:
        kinds = {**profile["kinds"], "idle": profile["idle"]}
        axes[2].barh(list(kinds), [seconds * 1e3 for seconds in kinds.values()])
        axes[2].set_title("a step of the 8B-shaped LoRA run, ms")
    about = state["about"]
    figure.suptitle(
        f"{about['device']}, {about['date']}, {about['commit']}{', TINY' if about['tiny'] else ''}", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
