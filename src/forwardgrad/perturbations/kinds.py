"""What is perturbed: whole weights or a part, weights of low rank or of every example, activities, or a choice or split by layer."""

from forwardgrad.perturbations.activity import Activity
from forwardgrad.perturbations.base import Perturbation
from forwardgrad.perturbations.cheapest import Cheapest
from forwardgrad.perturbations.dense import Dense
from forwardgrad.perturbations.informed import Informed
from forwardgrad.perturbations.low_rank import LowRank
from forwardgrad.perturbations.per_example import PerExample
from forwardgrad.perturbations.sparse import Sparse
from forwardgrad.perturbations.split import SplitWeights

PERTURBATIONS: tuple[type[Perturbation], ...] = (Dense, LowRank, PerExample, Activity, Cheapest, SplitWeights, Informed, Sparse)

__all__ = ["PERTURBATIONS", "Activity", "Cheapest", "Dense", "Informed", "LowRank", "PerExample", "Perturbation", "Sparse", "SplitWeights"]
