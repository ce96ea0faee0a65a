"""`Ensemble`: many replicas of one model, their parameters stacked, trained as one program by `vmap`.

What is random is drawn for each replica from its own generator, in the order of a run alone, so each sees the directions of its own
single run, bit for bit; what differs is the rounding of a batched matrix product. No replica's numbers enter another's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from forwardgrad.calls import ATTEMPTS, UNSTEADY, ModelWatch, OtherPath, Pass, Surveyed, UsedAgain, check_uses, gathered
from forwardgrad.directions import Directions, Law, fork
from forwardgrad.estimators import Backprop, Estimate, Estimator, ForwardGradient, add, add_exact, add_parts, check_count, needed
from forwardgrad.forward_mode import derivatives_under, directional_derivatives, plainly
from forwardgrad.objective import Objective, as_written
from forwardgrad.perturbations import Dense, DenseUse, SplitWeights

Loss = Callable[..., Tensor]
Named = dict[str, Tensor]
_RANDOM = (
    "the model draws random numbers as it runs (dropout?): replicas would share them and no longer repeat their single runs, "
    "so train them one after another"
)


class ReplicasEstimate(NamedTuple):
    """What one evaluation found out of some replicas, each tensor with their dimension in front."""

    replicas: slice
    estimate: Estimate
    gradients: Named


class Ensemble:
    """Replicas of one model, each with parameters and buffers of its own, stacked so that all are evaluated as one program.

    The models stay whole: their parameters become views of the stacks. Each can be evaluated, saved and loaded by itself, and any
    `torch.optim` optimizer trains them, with one parameter group for each set of hyperparameters:

        optimizer = torch.optim.SGD([{"params": m.parameters(), "lr": lr} for m, lr in zip(models, rates)], lr=0.1)
        estimate_grads_(loss, ensemble, (x, y), estimator, generators=generators)
        optimizer.step()

    Args:
        models: built alike, each initialised in its own way, all in training or all in evaluation mode.
        chunk_size: replicas evaluated at once, as in `torch.func.vmap`; None for all. Where whole weights move, the directions of so
            many replicas are held.

    Raises ValueError for models that differ in more than their numbers.
    """

    def __init__(self, models: Sequence[nn.Module], *, chunk_size: int | None = None) -> None:
        self.models = tuple(models)
        if chunk_size is not None:
            check_count("chunk_size", chunk_size)
        if not self.models or len({str(model) for model in self.models}) > 1 or len({id(model) for model in self.models}) < len(models):
            raise ValueError("an ensemble needs models that are built alike, at least one, and each of them once")
        self.chunk_size = chunk_size or len(self.models)
        try:
            parameters, buffers = stack_module_state(list(self.models))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"these models cannot be stacked: {error}") from error
        self.parameters = {name: stack.detach() for name, stack in parameters.items()}
        self.buffers = dict(buffers)
        self._live = [dict(model.named_parameters()) for model in self.models]
        for index, (model, live) in enumerate(zip(self.models, self._live, strict=True)):
            own = dict(model.named_buffers())
            for tensors, stacks in ((live, self.parameters), (own, self.buffers)):
                for name, stack in stacks.items():
                    tensors[name].data = stack[index]
        self._places = [[tensor.data_ptr() for tensor in live.values()] for live in self._live]
        self._drawn: dict[Hashable, tuple[_Drawn, ...]] = {}  # what a model asks for when it is perturbed

    def __len__(self) -> int:
        return len(self.models)

    def live(self, replicas: slice) -> list[dict[str, nn.Parameter]]:
        """The models' own parameters by name."""
        if any([p.data_ptr() for p in live.values()] != places for live, places in zip(self._live, self._places, strict=True)):
            raise RuntimeError("a model's parameters were moved since its ensemble was made: move models first, then stack them")
        return self._live[replicas]

    def estimates(
        self, loss: Loss, batch: Sequence[Tensor], estimator: Estimator, generators: Sequence[Generator] | None = None
    ) -> Iterator[ReplicasEstimate]:
        """An estimate of every replica's gradient, `chunk_size` replicas at a time; their buffers move on. See `estimate_grads_`."""
        if (why := unbatched(estimator)) is not None:
            raise ValueError(f"{estimator!r} has no batched form: {why}; train its replicas one after another")
        if not batch or any(not isinstance(t, Tensor) or t.dim() == 0 or len(t) != len(self) for t in batch):
            raise ValueError(f"a batch is one or more tensors whose first dimension is the {len(self)} replicas")
        own = list(generators or ())
        if isinstance(estimator, ForwardGradient):
            own = [needed(generator) for generator in own]
            if len({id(generator) for generator in own}) != len(self):
                raise ValueError(f"directions need an explicit generator for each of the {len(self)} replicas, not {len(own)}")
        before = self._random_states()
        for start in range(0, len(self), self.chunk_size):
            replicas = slice(start, min(start + self.chunk_size, len(self)))
            program = _Program(self, replicas, loss, [t[replicas] for t in batch])
            program.look(estimator)
            if isinstance(estimator, ForwardGradient):
                yield ReplicasEstimate(replicas, *program.forward(estimator, own[replicas]))
            else:
                yield ReplicasEstimate(replicas, *program.backprop())
        if not all(map(torch.equal, before, self._random_states())):
            raise RuntimeError(_RANDOM)

    def _random_states(self) -> list[Tensor]:
        """The global generators as they are; asking for them waits for no device."""
        devices = sorted({stack.get_device() for stack in self.parameters.values() if stack.is_cuda})
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def unbatched(estimator: Estimator) -> str | None:
    """Why an estimator has no batched form, None where it has one."""
    if isinstance(estimator, Backprop):
        return "activations are recomputed for a model alone" if estimator.checkpoint else None
    if not isinstance(estimator, ForwardGradient):
        return f"Backprop and ForwardGradient have one, {type(estimator).__name__} has none"
    if estimator.stateful:
        return "it learns from step to step"
    if isinstance(estimator.perturb, SplitWeights):
        return "its directions take turns, and each of them is evaluated alike there"
    if estimator.combine == "projection" and not isinstance(estimator.perturb, Dense):
        return "combine='projection' goes with perturb=Dense() there"
    return None


class _Replica(Objective):
    """The loss of a replica as a function inside vmap: the tensors it reads are its own, in the places of the first model's."""

    def __init__(self, loss: Callable[[nn.Module], Tensor], model: nn.Module, parameters: Named, buffers: Named) -> None:
        super().__init__(loss, model)
        self._root = model
        self._own, self._buffers = parameters, buffers
        self.parameters = {name: parameters[name.removeprefix("model.")] for name in self.parameters}
        self.left: Named = buffers

    def raw(self, parameters: Mapping[str, Tensor], cloned: Callable[[Tensor], Tensor] = Tensor.clone) -> tuple[object, Named]:
        own = {**self._own, **{name.removeprefix("model."): p for name, p in parameters.items()}}
        instead = {id(p): own[name] for name, p in self._root.named_parameters()}  # tied weights: one tensor in several places
        instead |= {id(b): cloned(self._buffers[name]) for name, b in self._root.named_buffers()}
        state = {
            f"{prefix}.{key}": instead[id(tensor)]
            for prefix, module in self._root.named_modules(prefix="model")
            for key, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        }
        assert self._module is not None
        with as_written():
            result: tuple[object, Named] = functional_call(self._module, state, (), tie_weights=False)
        return result

    def commit(self, buffers: Mapping[str, Tensor]) -> None:
        self.left = {name: buffers[f"model.{name}"] for name in self._buffers}


class _Drawn(NamedTuple):
    """What a draw was asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Unexpected(Exception):
    """An evaluation asked for other draws than the one before with batches of this shape."""


class _Streams:
    """The directions of all replicas and tangents. What is drawn inside vmap costs ten times as much, so what the last evaluation asked
    for is drawn beforehand: the same places in the same order, hence the same bits."""

    def __init__(self, law: Law, seeds: Sequence[list[int]], device: torch.device, expected: Sequence[_Drawn]) -> None:
        self.all = Directions(law, [seed for row in seeds for seed in row], device)
        self.law, self.tangents, self.asked = law, len(seeds[0]), 0
        self.draws, self._stacks = list(expected), [self._fill(wanted) for wanted in expected]
        self._all_known = bool(expected)

    def _fill(self, wanted: _Drawn) -> Tensor:
        return self.all.draw(wanted.shape, torch.empty(0, dtype=wanted.dtype, device=wanted.device))

    def next(self, wanted: _Drawn) -> Tensor:
        """The next draw of every replica and tangent, [replicas · tangents, *shape]."""
        place, self.asked = self.asked, self.asked + 1
        if self._all_known:
            if place >= len(self.draws) or self.draws[place] != wanted:
                raise _Unexpected
            return self._stacks[place]
        self.draws.append(wanted)
        return self._fill(wanted)


class _ReplicasDirections(Directions):
    """The directions of one replica and one tangent, as they are known inside vmap."""

    def __init__(self, streams: _Streams, replica: Tensor, tangent: Tensor) -> None:
        self.law, self._streams = streams.law, streams
        self._index = (replica * streams.tangents + tangent).reshape(1)

    def __len__(self) -> int:
        return 1

    def plan(self, shape: tuple[int, ...], like: Tensor) -> Callable[[], Tensor]:
        stack = self._streams.next(_Drawn(tuple(shape), like.dtype, like.device))
        return lambda: stack.index_select(0, self._index)


class _Found(NamedTuple):
    """What one evaluation found out of a replica: `left` are its buffers afterwards."""

    loss: Tensor
    derivatives: Tensor
    gradients: Named
    left: Named


_Along = tuple[tuple[Named, ...], Named]
"""What an evaluation along one tangent gives: what all tangents share, and what is its own."""


class _Program:
    """One step of some replicas: the vmapped evaluations and what they add up to."""

    def __init__(self, ensemble: Ensemble, replicas: slice, loss: Loss, batch: list[Tensor]) -> None:
        self.ensemble, self.loss, self.batch = ensemble, loss, batch
        self.model = ensemble.models[0]
        self.parameters = {name: stack[replicas] for name, stack in ensemble.parameters.items()}
        self.buffers = {name: stack[replicas] for name, stack in ensemble.buffers.items()}
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.trained = {f"model.{name}": self.parameters[name] for name in trained}

    def backprop(self) -> tuple[Estimate, Named]:
        def one(objective: _Replica) -> tuple[Named, Tensor, Named]:
            def value(parameters: Named) -> tuple[Tensor, Named]:
                loss, buffers = objective.with_(parameters)
                if not loss.requires_grad:
                    raise RuntimeError("the loss does not depend on any trainable parameter: there is nothing to differentiate")
                objective.commit(buffers)
                return loss, objective.left

            gradients, (loss, left) = grad_and_value(value, has_aux=True)(objective.parameters)
            return gradients, loss, left

        gradients, loss, left = self._each(one, {})
        self._commit(left)
        return Estimate(loss, loss.new_empty(len(loss), 0), 1), gradients

    def forward(self, estimator: ForwardGradient, generators: list[Generator]) -> tuple[Estimate, Named]:
        size = estimator.chunk_size or estimator.tangents
        counts = [min(size, estimator.tangents - start) for start in range(0, estimator.tangents, size)]
        if isinstance(estimator.perturb, Dense):
            passes = self._dense(estimator, size, generators)
        else:
            passes = (self._perturbed(estimator, count, generators, first=index == 0) for index, count in enumerate(counts))
        gradients: dict[str, Tensor | None] = {}
        derivatives = []
        for found in passes:
            add(gradients, found.gradients)
            derivatives.append(found.derivatives)
        self._commit(found.left)
        return Estimate(found.loss, torch.cat(derivatives, 1), estimator.tangents + len(counts)), _given(gradients)

    def _dense(self, estimator: ForwardGradient, size: int, generators: list[Generator]) -> Iterator[_Found]:
        """Whole weights: directions are drawn as each replica would alone, and handed in."""
        like = {name: stack[0] for name, stack in self.trained.items()}
        drawn = [estimator.law.chunks(like, estimator.tangents, size, generator) for generator in generators]

        def one(objective: _Replica, tangents: Named) -> _Found:
            def along(tangent: Named) -> _Along:
                loss, d = directional_derivatives(objective, {name: v.unsqueeze(0) for name, v in tangent.items()})
                return ({"loss": loss}, objective.left), {"derivative": d[0]}

            (scalar, left), own = _sharing_a_pass(along, tangents)
            uses = [DenseUse(name, v) for name, v in tangents.items()]
            whole = Pass(scalar["loss"], own["derivative"], list(uses))
            return _Found(whole.loss, whole.derivatives, _combined(estimator, whole), left)

        for parts in zip(*drawn, strict=True):
            if isinstance(estimator.perturb, Dense) and not estimator.perturb.unbiased:
                for replica, part in enumerate(parts):  # by its own weights
                    for name, v in part.items():
                        estimator.perturb.masked_(v, self.trained[name][replica])
            yield self._each(one, {"tangents": {name: torch.stack([part[name] for part in parts]) for name in like}})

    def _perturbed(self, estimator: ForwardGradient, count: int, generators: list[Generator], *, first: bool) -> _Found:
        """Any other perturbation: directions are drawn where layers are met, and each tangent gives a gradient of its own."""
        seeds, device = [fork(generator, count) for generator in generators], generators[0].device
        drawn, surveyed = self.ensemble._drawn, self._surveyed(estimator)
        shaped = surveyed.key, count, tuple(t.shape for t in self.batch)

        def one(objective: _Replica, replica: Tensor) -> _Found:
            def along(tangent: Named) -> _Along:
                directions = _ReplicasDirections(streams, replica, tangent["index"])
                at_once = surveyed.memory.at_once
                watch = ModelWatch(estimator.perturb, directions, reading=reading, exact_output=estimator.exact_output, at_once=at_once)
                stands, derived = derivatives_under(objective, lambda: watch, 1, surveyed.key)
                found = gathered(derived.values, derived.derivatives, stands)
                exact: dict[str, Tensor | None] = {}
                if first:  # every pass knows the same exact gradient
                    add_exact(exact, found)
                own = {"derivative": found.derivatives[0], **_combined(estimator, found)}
                return ({"loss": found.loss}, objective.left, _given(exact)), own

            (scalar, left, exact), own = _sharing_a_pass(along, {"index": torch.arange(count, device=replica.device)})
            d = own.pop("derivative")
            gradients: dict[str, Tensor | None] = {name: part.sum(0) for name, part in own.items()}
            add(gradients, exact)
            return _Found(scalar["loss"], d, _given(gradients), left)

        replicas = torch.arange(len(generators), device=self.batch[0].device)
        for _ in range(ATTEMPTS):
            try:
                reading = surveyed.reading()
                streams = _Streams(estimator.law, seeds, device, drawn.get(shaped, ()))
                found: _Found = self._each(one, {"replica": replicas})
            except UsedAgain as used:
                surveyed.used_again(used.index)
            except OtherPath as other:
                surveyed.went(other.path)
            except _Unexpected:
                pass
            else:
                drawn[shaped] = tuple(streams.draws)
                return found
            drawn.pop(shaped, None)
        raise RuntimeError(UNSTEADY)

    def look(self, estimator: Estimator) -> None:
        """Refuse, in the first step, what would be taken for a constant: it is found out with the first replica alone."""
        follows = isinstance(estimator, Backprop) or (isinstance(estimator, ForwardGradient) and isinstance(estimator.perturb, Dense))
        check_uses(self._first(), below=not follows)

    def _surveyed(self, estimator: ForwardGradient) -> Surveyed:
        """Where examples lie is found out with the first replica alone, and holds for all."""
        return Surveyed.of(self._first(), estimator.perturb, exact_output=estimator.exact_output, who=f"perturb={estimator.perturb!r}")

    def _first(self) -> Objective:
        first = [t[0] for t in self.batch]

        def loss(model: nn.Module) -> Tensor:
            return self.loss(model, *first)

        loss.of_code = self.loss  # type: ignore[attr-defined]
        return Objective(loss, self.model)

    def _each(self, one: Callable[..., Any], given: dict[str, Any]) -> Any:
        """`one` for every replica, as one program."""

        def call(parameters: Named, buffers: Named, batch: list[Tensor], given: dict[str, Any]) -> Any:
            return one(_Replica(lambda model: self.loss(model, *batch), self.model, parameters, buffers), **given)

        with plainly():  # vmap knows torch's own forward mode
            return vmap(call, randomness="same")(self.parameters, self.buffers, self.batch, given)

    def _commit(self, left: Named) -> None:
        for name, buffer in left.items():
            self.buffers[name].copy_(buffer)


def _sharing_a_pass(along: Callable[[Named], _Along], tangents: Named) -> _Along:
    """`along` for each of a stack of tangents, with one primal pass: what they share once, what is their own stacked."""
    if len(next(iter(tangents.values()))) == 1:
        shared, own = along({name: t[0] for name, t in tangents.items()})
        return shared, {name: t.unsqueeze(0) for name, t in own.items()}
    several, own = vmap(along, randomness="same")(tangents)  # out_dims=None is refused for what the replicas' vmap has batched
    return tuple({name: t[0] for name, t in part.items()} for part in several), own


def _combined(estimator: ForwardGradient, found: Pass) -> Named:
    """The gradient that directional derivatives and their directions add up to."""
    gradients: dict[str, Tensor | None] = {}
    with torch.autocast(found.loss.device.type, enabled=False):
        add_parts(gradients, found, estimator.weights_of(found, {}))
    return _given(gradients)


def _given(gradients: Mapping[str, Tensor | None]) -> Named:
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}
