"""`split_stages` cuts a model into consecutive parts, and only behind the end of a block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

_LAYERS = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
_BEHIND = (nn.ReLU, nn.MaxPool2d, nn.modules.batchnorm._BatchNorm)  # what belongs to the layer in front of it, in modules
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def split_stages(model: nn.Sequential, count: int, *, at: Sequence[int] | None = None) -> list[nn.Sequential]:
    """The model as `count` consecutive stages, for the processes of a `PipelineStep`.

    Stages hold the model's own modules under their own names, so the state dicts of all stages together are that of the model. Keep the
    stage of your rank alone, and the others are freed.

    Args:
        model: an nn.Sequential. What has another shape is cut by hand: any module may be a stage.
        count: how many stages.
        at: for each stage but the first, the number of the module of `model` that it begins with. None: the largest stage has as few
            parameters as can be. Convolutions have more work a parameter than linear layers, so give `at` where both are there.

    Raises ValueError where a cut would lie inside a block, a stage would have no block, or two stages would share a parameter.

    >>> from torch.nn import Linear, ReLU, Sequential
    >>> [len(stage) for stage in split_stages(Sequential(Linear(4, 8), ReLU(), Linear(8, 8), ReLU(), Linear(8, 3)), 2)]
    [2, 3]
    """
    if not isinstance(model, nn.Sequential):
        raise ValueError(
            f"a {type(model).__name__} cannot be cut, since only its own code says in what order its layers follow: pass an nn.Sequential, "
            "or give each rank a module of its own as its stage"
        )
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"the number of stages must be a whole number of at least 1, not {count!r}")
    blocks, why = _survey(model)
    bounds = _given(at, count, blocks, why) if at is not None else _balanced(model, count, blocks, why)
    parts = zip([0, *bounds], [*bounds, len(model)], strict=True)
    stages: list[nn.Sequential] = [model[start:end] for start, end in parts]  # type: ignore[misc]
    _check_ties(stages)
    return stages


def _survey(model: nn.Sequential) -> tuple[list[int], list[str]]:
    """For the place in front of every module, and behind the last: how many blocks have begun, and why no stage may begin there."""
    walk, blocks, why = _Walk(), [], []
    for module in model:
        first = next(_leaves(module), None)
        blocks.append(walk.blocks)
        why.append(walk.crosses(first))
        for leaf in _leaves(module):
            walk.go(leaf)
    return [*blocks, walk.blocks + walk.loose], [*why, ""]  # what is loose at the end is trained by the loss of the model


class _Walk:
    """How far the modules of a model have come: the blocks that began, and what would still belong to the last of them."""

    def __init__(self) -> None:
        self.blocks, self.loose = 0, False
        self._last, self._open = "", tuple[type[nn.Module], ...]()

    def crosses(self, module: nn.Module | None) -> str:
        """Why a stage cannot begin with a module that comes next, as the end of a sentence."""
        if isinstance(module, self._open):
            return f"{type(module).__name__} belongs to the block of the {self._last} in front of it"
        if self.loose:
            return f"the {self._last} in front of it belongs to the block of the next layer"
        return "" if self.blocks else "there is no block in front of it"

    def go(self, module: nn.Module) -> None:
        if isinstance(module, self._open):  # batch normalisation comes first, and once
            self._open = (nn.ReLU, nn.MaxPool2d)
        elif not any(p.requires_grad for p in module.parameters()):
            self._open = ()
        else:
            self._last, self.loose = type(module).__name__, isinstance(module, _NORMS)
            self.blocks += not self.loose
            self._open = _BEHIND if isinstance(module, _LAYERS) else ()


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    if type(module) is not nn.Sequential:
        yield module
        return
    for child in module:
        yield from _leaves(child)


def _given(at: Sequence[int], count: int, blocks: list[int], why: list[str]) -> list[int]:
    bounds = list(at)
    if len(bounds) != count - 1:
        raise ValueError(f"{count} stages begin at {count - 1} modules besides the first, and at={tuple(bounds)} names {len(bounds)}")
    for start, bound in zip([0, *bounds], [*bounds, len(why) - 1], strict=True):
        if isinstance(bound, bool) or not isinstance(bound, int) or not start < bound < len(why):
            raise ValueError(f"at must be rising numbers of modules from 1 to {len(why) - 2}, not {tuple(bounds)}")
        if why[bound]:
            raise ValueError(f"no stage can begin with module {bound}, since {why[bound]}: choose from {_choices(why)}")
        if blocks[bound] == blocks[start]:
            raise ValueError(f"the stage of modules {start} to {bound - 1} has no block of its own: choose other cuts, or fewer stages")
    return bounds


def _choices(why: list[str]) -> str:
    return ", ".join(str(place) for place in range(1, len(why) - 1) if not why[place]) or "none"


def _balanced(model: nn.Sequential, count: int, blocks: list[int], why: list[str]) -> list[int]:
    """The cuts for which the largest stage is as small as can be: from the best cuts of the modules in front of each place."""
    sizes = [sum(p.numel() for p in module.parameters()) for module in model]
    places = [place for place in range(1, len(why)) if not why[place]]
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for made in range(count):
        further: dict[int, tuple[int, list[int]]] = {}
        for end in places:
            ways = [
                (max(largest, sum(sizes[start:end])), [*cuts, end])
                for start, (largest, cuts) in best.items()
                if start < end and blocks[end] > blocks[start]
            ]
            if ways:
                further[end] = min(ways)
        if not further or (made == count - 1 and len(model) not in further):
            most = len({blocks[place] for place in places})
            raise ValueError(
                f"the model can be cut into {most} stages at most, and not into {count}: each needs a block of its own. "
                "Start fewer processes"
            )
        best = further
    return best[len(model)][1][:-1]


def _check_ties(stages: Sequence[nn.Module]) -> None:
    held = dict[int, tuple[int, str]]()
    for number, stage in enumerate(stages):
        for name, parameter in stage.named_parameters():
            before, other = held.setdefault(id(parameter), (number, name))
            if before != number:
                raise ValueError(f"{other} and {name} are one parameter, and would be trained apart in stages {before} and {number}")
