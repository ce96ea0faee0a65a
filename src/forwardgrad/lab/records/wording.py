"""The words of the rule that every record keeps, and of the test that a claim has to pass. Loads without torch."""

STEPS = 3  # that are watched: the second is on a path that an estimator has learned from the first
RULE = (
    f"forward-only: the estimator's `reverse` is False, and the first {STEPS} steps of a run save no tensor for a backward pass. "
    "What no program can see, that no transposed forward weight is used, is read in the code of an estimator of the claimant's own."
)
TEST = (
    "A claim does not hold where its mean is better than that of n fresh runs by more than t·s·√(1/n + 1/m) and the grain of the figure, "
    "with m the runs that were claimed, s the standard deviation of the fresh runs and t Student's 95 % quantile: one true claim in 20 at "
    "most is refused so."
)
