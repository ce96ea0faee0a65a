"""A study of your own: `forwardgrad study examples/spirals.py --jobs 2 --out spirals`; with --budget it only says what that would cost."""

import torch
from torch import nn

from forwardgrad.lab import Arm, Length, LogUniform, Optimizer, Run, Study, parse_estimator


def spirals(seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(1500) % 2
    along = torch.rand(1500, generator=generator).sqrt() * 6
    angle = along + labels * torch.pi
    points = torch.stack([along * angle.cos(), along * angle.sin()], 1) / 6 + 0.02 * torch.randn(1500, 2, generator=generator)
    return {"train": (points[:1000], labels[:1000]), "test": (points[1000:], labels[1000:])}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))


def smoothed(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output, labels, label_smoothing=0.05)


def study(trials: int = 8, seeds: int = 5, passes: int = 8000) -> Study:
    """Every arm trains with Adam for as many forward passes, its rate annealed to zero and tuned with as many trials."""
    arms = {"backprop": "backprop", "forward": "forward(tangents=4)", "activity": "forward(perturb=activity)"}
    made = []
    for name, spec in arms.items():
        run = Run(
            "spirals:spirals", "spirals:network", parse_estimator(spec), Optimizer("adam", 0.01, anneal=True), loss="spirals:smoothed"
        )
        made.append(Arm(name, "two spirals", name, spec, run, {"lr": LogUniform(1e-4, 0.1)}))
    short, long = Length(forward_passes=passes // 4), Length(forward_passes=passes)
    return Study("spirals", "Two spirals", tuple(made), seeds, short, long, trials, "halton", widen=1)
