"""The page that `support.py` writes: its words and its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import support_checks as checks

Entry = tuple[str, str]
_STAR = "\\*"
_HEAD = """# What is supported

This page is generated: `python benchmarks/support.py --out docs/support.md` checks every row again, in float64 against backpropagation.
Do not edit it by hand.

Made on {date} with {versions} ({machine}), at commit {commits}.
A plus marks a source that had changed since.

A failure is shown as a failure, with its sentence. {counts}

## Models

Each model is tiny, has random weights, and is in training mode with its own dropout. The loss is the model's own, or the cross-entropy of
its outputs for timm.

| column | what is checked, and the limit |
|---|---|
| `ForwardGradient()`, `LowRank` | g·ĝ = d² for three directions, which says that d = g·v, \
with g from backpropagation. The number is the largest error relative to ‖g‖·‖d‖ (limit {exact:g}). |
| `ZerothOrder` | the same, with ε = {epsilon:g}; d is a difference of the whole loss (limit {zeroth:g}). \
A larger error is that of the difference: the loss bends within a step. |
| `Activity`, `PerExample`, and `LowRank` where a weight is used twice | \
the mean of g·ĝ/‖g‖² over {repeats} estimates of 4 directions is 1. \
The number is that mean ± its standard error (limit: z below {z:g}). \
Where that is wide, this saw little. |
| `LearnedFeedback`, `LocalLosses` | both are biased. \
Three steps are taken; every gradient is finite, and some are not zero. \
The numbers: how many parameter tensors move, and how many have backpropagation's gradient to {exact:g}. |

A star marks a model that computes in float32 somewhere, whatever its weights are, as many of transformers do in their norms and losses. Its
limits are {single_exact:g}, and {single_zeroth:g} with ε = {single_epsilon:g}.

`LocalLosses` has `feedback=True`. Its classifiers have a class for every word where a model predicts words.

"""


def page(rows: Mapping[Entry, Mapping[str, Any]], versions: Mapping[str, str], machine: str, date: str, notes: Mapping[str, str]) -> str:
    commits = ", ".join(dict.fromkeys(f"`{commit}`" for row in rows.values() for commit in row["commits"]))
    parts = [
        _HEAD.format(
            date=date,
            machine=machine,
            versions=", ".join(f"{name} {version}" for name, version in versions.items()),
            commits=commits or "none",
            counts=_counts(rows),
            exact=checks.FULL.exact,
            zeroth=checks.FULL.zeroth,
            epsilon=checks.FULL.epsilon,
            single_exact=checks.SINGLE.exact,
            single_zeroth=checks.SINGLE.zeroth,
            single_epsilon=checks.SINGLE.epsilon,
            repeats=checks.REPEATS,
            z=checks.Z,
        )
    ]
    refused: dict[str, dict[str, list[str]]] = {}  # sentences, and of each the models and their estimators
    for kind in ("transformers", "timm"):
        parts.append(f"### {kind} {versions[kind]}\n\n" + _models(rows, kind, refused))
    if refused:
        parts.append("### Why not\n\n" + "\n".join(f"- {_who(of)}: {said}" for said, of in refused.items()) + "\n")
    parts.append(
        "## torch.nn\n\n"
        "Inputs that are real numbers are trained beside the weights. The error is the largest |d − g·v|/‖g‖ along one direction and\n"
        "along three at once, by the library's choice of way and by torch's own forward mode.\n\n"
        "| way | what it is | limit |\n|---|---|---|\n"
        f"| explicit | this library's rules; single calls may go through torch's dual numbers | {checks.EXACT:g} |\n"
        f"| dual numbers | torch's own forward mode for the whole model | {checks.EXACT:g} |\n"
        f"| differences | central differences of the operator, [on request](rules.md#differences-of-one-operator) | {checks.NEAR:g} |\n"
    )
    parts.append("### Layers\n\n" + _derived(rows, "layer", notes))
    parts.append("### Functions\n\n" + _derived(rows, "function", notes))
    return "\n".join(parts)


def _counts(rows: Mapping[Entry, Mapping[str, Any]]) -> str:
    cells = [cell for row in rows.values() for cell in row.get("cells", {}).values()]
    single = [row for (kind, _), row in rows.items() if kind in ("layer", "function")]
    models = sum(kind in ("transformers", "timm") for kind, _ in rows)
    return (
        f"Of {len(cells)} cells of {models} models {sum(cell['ok'] for cell in cells)} pass; "
        f"of {len(single)} rows of torch.nn {sum(bool(row.get('ok')) for row in single)}."
    )


def _models(rows: Mapping[Entry, Mapping[str, Any]], kind: str, refused: dict[str, dict[str, list[str]]]) -> str:
    lines = [
        f"| model | weights | {' | '.join(f'`{name}`' for name in checks.ESTIMATORS)} |",
        f"|---|---|{'---|' * len(checks.ESTIMATORS)}",
    ]
    for (of, name), row in rows.items():
        if of != kind:
            continue
        if "cells" not in row:
            refused.setdefault(_plain(row["said"]), {})[name] = []
            lines.append(f"| {name} | – |{' failed |' * len(checks.ESTIMATORS)}")
            continue
        cells = []
        for estimator in checks.ESTIMATORS:
            cell = row["cells"][estimator]
            if cell["said"]:
                refused.setdefault(_plain(cell["said"]), {}).setdefault(name, []).append(estimator)
            cells.append(("" if cell["ok"] else "failed ") + (cell["way"] or (f"{cell['error']:.0e}" if cell["error"] is not None else "")))
        named = f"{name}{_STAR if row['single'] else ''} (`{row['class']}`)"
        lines.append(f"| {named} | {row['weights']:,} | {' | '.join(text.strip() for text in cells)} |")
    return "\n".join(lines) + "\n"


def _who(of: Mapping[str, Sequence[str]]) -> str:
    """The models, and the estimators of each, where these are not all the same."""
    kinds = {tuple(estimators) for estimators in of.values()}
    if len(kinds) == 1:
        return ", ".join(f"**{name}**" for name in of) + "".join(f", `{estimator}`" for estimator in kinds.pop())
    return "; ".join(", ".join([f"**{name}**", *(f"`{estimator}`" for estimator in estimators)]) for name, estimators in of.items())


def _derived(rows: Mapping[Entry, Mapping[str, Any]], kind: str, notes: Mapping[str, str]) -> str:
    lines = ["| name | checked | error | way | |", "|---|---|---|---|---|"]
    for (of, name), row in rows.items():
        if of == kind:
            error = "–" if row.get("error") is None else f"{row['error']:.0e}"
            said = " ".join(filter(None, (_plain(row.get("said", "")), notes.get(name, ""))))
            lines.append(f"| {name} | {'yes' if row.get('ok') else 'failed'} | {error} | {row.get('way') or '–'} | {said} |")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """A sentence as a cell of a table can hold it."""
    return text.replace("|", "/").replace("<", "‹").replace(">", "›").replace("*", "∗").replace("_", "\\_")
