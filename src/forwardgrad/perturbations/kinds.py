"""What is perturbed: whole weights, weights of low rank, weights for every example, activities, or the cheapest of these by layer."""

from forwardgrad.perturbations.activity import Activity
from forwardgrad.perturbations.base import Perturbation
from forwardgrad.perturbations.cheapest import Cheapest
from forwardgrad.perturbations.dense import Dense
from forwardgrad.perturbations.low_rank import LowRank
from forwardgrad.perturbations.per_example import PerExample

PERTURBATIONS: tuple[type[Perturbation], ...] = (Dense, LowRank, PerExample, Activity, Cheapest)

__all__ = ["PERTURBATIONS", "Activity", "Cheapest", "Dense", "LowRank", "PerExample", "Perturbation"]
