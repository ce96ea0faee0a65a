"""`PipelineStep`: a step of training in a row of processes. Each learns from the losses of its own blocks, and waits for no error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.overrides import TorchFunctionMode

from forwardgrad.engines import Batch, EagerStep
from forwardgrad.estimators import BlocksAlone, Estimate, Estimator, LastBlocks, LocalLosses
from forwardgrad.forward_mode import READS, RandomState, levels
from forwardgrad.objective import Objective
from forwardgrad.perturbations import BEHIND
from forwardgrad.pipeline.messages import Inbox, Outbox, next_tag
from forwardgrad.processes import check_processes, independent_ranks


class PipelineStep:
    """A step of `LocalLosses(feedback=True)` on a model whose consecutive stages are trained in a process each, with no message backward.

    Rank r takes activations and labels from rank r − 1, takes a step on its stage, and sends what its stage put out in that step, before
    the move, to rank r + 1. So rank r works on batch t while rank r − 1 works on batch t + 1, and no rank waits for an error. The last
    rank has the model's own last layer and loss; the others ask that loss for labels, classes and options alone.

    Formula, bias and variance: those of the estimator. With one layer a block the moves of all stages are those of one `TrainingStep` on
    the whole model; in deeper blocks each rank draws directions of its own.
    Cost: that of the slowest stage a step. A rank holds its stage, the classifiers of its blocks, at most two messages to the next rank,
    and the one that comes in while it works. It waits where the next rank falls further behind.

    Args:
        loss_fn: the loss of outputs and labels, `F.cross_entropy` or a function around it; the same on every rank.
        stage: the layers of this rank, see `split_stages`: a module of one tensor, with examples along the first dimension.
        optimizer: any `torch.optim` optimizer over the parameters of the stage.
        estimator: `LocalLosses(feedback=True)` with any of its options; the same on every rank.
        classes: how many classes the model tells apart.
        generator: where directions are drawn from. State and generator belong to the rank.
        state: what the estimator remembers from step to step; a new one if left out.
        group: the processes of the pipeline, in their order; all of them if left out. It has to carry tensors of the CPU, as "gloo" does.

    `step(x, y)` on the first rank and `step()` on the others takes a step, `step.forward(x)` and `step.forward()` evaluates; modes are
    those of the stage (`stage.eval()` on every rank). The last rank gets the record or the output, the others None. Call `step.wait()`
    after the last step: a process that ended can no longer send.

    Raises ValueError for another estimator, and in the first step for a stage that begins or ends inside a block; RuntimeError where
    torch.distributed is not at work, a neighbour has ended or does not answer within the timeout of the group, or ranks make other calls.

    Source: Belilovsky et al., "Decoupled greedy learning of CNNs" (2020), for stages that wait for no error; the rest as `LocalLosses`.
    """

    def __init__(
        self,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        stage: nn.Module,
        optimizer: torch.optim.Optimizer,
        estimator: Estimator,
        *,
        classes: int,
        generator: Generator,
        state: dict[str, Tensor] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._whole = _local(estimator)
        if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
            raise ValueError(f"classes must be a whole number of at least 2, not {classes!r}")
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("torch.distributed is not at work: start the script by torchrun and call init_process_group('gloo') first")
        group = dist.group.WORLD if group is None else group
        assert group is not None
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise RuntimeError("this process is not in the group of the pipeline")
        self.loss_fn, self.stage, self.classes, self.steps = loss_fn, stage, classes, 0
        with independent_ranks():
            check_processes(stage, reverse=False)
        loss, method = (self._loss, LastBlocks.of(self._whole)) if self.last else (self._labels_alone, BlocksAlone.of(self._whole))
        self._step = EagerStep(loss, stage, optimizer, method, generator, {} if state is None else state)
        device = next((p.device for p in stage.parameters()), torch.device("cpu"))
        tag = next_tag(group)
        self._inbox = Inbox(self.rank, group, tag, device) if self.rank else None
        self._outbox = None if self.last else Outbox(self.rank, group, tag)
        self._out: Tensor | None = None
        self._looked = False

    @property
    def last(self) -> bool:
        """Whether this is the last rank, which has the loss of the model."""
        return self.rank == self.ranks - 1

    def __call__(self, x: Tensor | None = None, y: Tensor | None = None) -> Estimate | None:
        """Take one step: on a batch at the first rank, elsewhere on what the rank before sends."""
        x, y = self._given("step", x, y)
        if not self._looked:
            self._look(x, y)
        with independent_ranks():
            record = self._step.eagerly(Batch((x, y)))
        self.steps += 1
        out, self._out = self._out, None
        if self._outbox is None:
            return record
        assert out is not None
        self._outbox.send("step", self.steps - 1, (out, y))
        return None

    @torch.no_grad()
    def forward(self, x: Tensor | None = None) -> Tensor | None:
        """Evaluate the model: the output at the last rank."""
        (x,) = self._given("forward", x)
        out: Tensor = self.stage(x)
        if self._outbox is None:
            return out
        self._outbox.send("forward", self.steps, (out,))
        return None

    def wait(self) -> None:
        """Wait until the next rank has taken all that was sent."""
        if self._outbox is not None:
            self._outbox.wait()

    def state_dict(self) -> dict[str, Any]:
        """All that this rank goes on from: stage, optimizer, state, generator and the number of steps. Save it on every rank after the
        same step. The global random state, which dropout draws from, is not part of it."""
        return {
            "rank": self.rank,
            "ranks": self.ranks,
            "steps": self.steps,
            "stage": self.stage.state_dict(),
            "optimizer": self._step.optimizer.state_dict(),
            "state": dict(self._step.state),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from there; ValueError where it is of another rank, or of another number of ranks."""
        if (saved["rank"], saved["ranks"]) != (self.rank, self.ranks):
            raise ValueError(f"the checkpoint is of rank {saved['rank']} of {saved['ranks']}, and this is rank {self.rank} of {self.ranks}")
        self.stage.load_state_dict(saved["stage"])
        self._step.optimizer.load_state_dict(saved["optimizer"])
        self._step.state.clear()
        self._step.state.update({name: tensor.clone() for name, tensor in saved["state"].items()})
        self._generator.set_state(saved["generator"])
        self.steps = saved["steps"]

    @property
    def _generator(self) -> Generator:
        assert self._step.generator is not None
        return self._step.generator

    def _given(self, kind: str, *given: Tensor | None) -> list[Tensor]:
        """The caller's tensors at the first rank, elsewhere those of the rank before."""
        if self._inbox is not None:
            if any(tensor is not None for tensor in given):
                raise ValueError(f"rank {self.rank} of the pipeline gets its batches from rank {self.rank - 1}: call it without one")
            return self._inbox.receive(kind, self.steps)
        found = [tensor for tensor in given if isinstance(tensor, Tensor)]
        if len(found) < len(given):
            raise ValueError("the first rank of a pipeline needs a batch: step(x, y), or step.forward(x)")
        if kind == "step" and (found[1].shape != found[0].shape[:1] or found[1].is_floating_point() or not len(found[1])):
            shapes = " and ".join(f"{tuple(tensor.shape)}" for tensor in found)
            raise ValueError(f"a batch is of one or more examples with one class index each, and not of shapes {shapes}")
        return found

    def _look(self, x: Tensor, y: Tensor) -> None:
        """Look at the stage once before the first step: ValueError where it cannot be one. Nothing is left of that pass."""
        objective, uses = Objective(lambda stage: stage(x), self.stage), _Uses(x)
        random = RandomState(objective)
        with torch.no_grad(), uses:
            out, _ = objective.raw({name: p.detach() for name, p in objective.parameters.items()})
        random.restore()
        if self.rank and uses.found and uses.found <= BEHIND:
            name = getattr(next(iter(uses.found)), "__name__", "")
            raise ValueError(
                f"the stage of rank {self.rank} begins with {name}, which belongs to the block of the layer in front of it: "
                "cut the model behind that"
            )
        if not isinstance(out, Tensor) or out.dim() < 2 or len(out) != len(y):
            told = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"a stage puts out one tensor, with the {len(y)} examples of its batch along dimension 0, and not {told}")
        if self.last and out.shape != (len(y), self.classes):
            raise ValueError(f"the last stage puts out shape {tuple(out.shape)} for {len(y)} examples of {self.classes} classes")
        self._looked = True

    def _loss(self, stage: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.loss_fn(stage(x), y)

    def _labels_alone(self, stage: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The model's loss, of outputs that say nothing: the mean of an example's activities for every class.

        What follows from each example shows where examples lie, as it would in the model; and the blocks need no more than the labels.
        """
        out: Tensor = stage(x)
        self._out = levels.unwrapped(out)
        return self.loss_fn(out.flatten(1).mean(1, keepdim=True).expand(-1, self.classes), y)


class _Uses(TorchFunctionMode):
    """The functions that a tensor is given to."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self._tensor, self.found = tensor, set[Any]()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func not in READS and any(value is self._tensor for value in (*args, *(kwargs or {}).values())):
            self.found.add(func)
        return func(*args, **(kwargs or {}))


def _local(estimator: Estimator) -> LocalLosses:
    if type(estimator) is LocalLosses and estimator.feedback:
        return estimator
    if type(estimator) is LocalLosses:
        why = "which trains every layer by moves and derivatives of one pass through the whole model"
    else:
        why = "which needs what the last rank alone finds out, the loss or its error, and that would have to be sent backward"
    raise ValueError(
        f"a pipeline sends nothing back, so stages learn by themselves: use LocalLosses(feedback=True), not {estimator!r}, {why}"
    )
