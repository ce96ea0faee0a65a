"""Torch's errors for operators without a forward-mode rule, as one sentence: which operator, in which module, and what to do."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.autograd import Function

_KNOWN = {  # operators whose names their users never see
    "_ctc_loss": "ctc_loss",
    "_cudnn_ctc_loss": "ctc_loss",
    "grid_sampler_3d": "grid_sample of volumes",
}
NO_RULE = re.compile(r"forward AD with (\S+) that does not support it")
"""What torch says of an operator that it has no forward mode for."""

_INSTEAD = (
    "replace it, ask for differences of this one operator (with forwardgrad.differences(): ...), "
    "or train this model with ZerothOrder, which needs no derivatives"
)
_WRITE = "write to it with copy_() and keep it as a buffer of the model (register_buffer), or write to it ahead of the step"
_CHECKPOINT = (
    "call it with use_reentrant=False (of a Hugging Face model, "
    "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})), or leave checkpoints away: "
    "forward gradients keep no activations anyway"
)


def refusal(error: Exception, at: Any) -> Said | None:
    """The sentence for an error of torch's own, of a type that catches as it did; None for any other error."""
    if not isinstance(error, (NotImplementedError, RuntimeError)) or isinstance(error, Said):
        return None
    text, where = str(error), place_of(error, at)
    if found := NO_RULE.search(text):
        return Said(f"{_KNOWN.get(found[1], found[1])} has no rule for forward mode in torch{where}", _INSTEAD)
    if (function := custom_function_of(error)) is not None and ("setup_context" in text or "jvp" in text):
        if function.__name__ == "CheckpointFunction":
            return Said(f"a reentrant checkpoint has no forward mode{where}", _CHECKPOINT)
        lacks = "write forward without ctx, with setup_context and jvp" if "setup_context" in text else "give it a jvp"
        return Said(
            f"the autograd function {function.__name__} has no rule for forward mode{where}", f"{lacks} static method, or {_INSTEAD}"
        )
    if found := re.search(r"vmap: we do not yet support (?:aten::)?(\w+)", text):
        return Said(f"{found[1]} cannot take several tangents at once{where}", "use tangents=1 or chunk_size=1, or replace it")
    if found := re.search(r"in-place operation \(aten::(\w+)[^)]*\) that would mutate a captured Tensor", text):
        return Said(f"the loss writes to a tensor that it did not make ({found[1]}), which forward mode does not let it{where}", _WRITE)
    if "mutating directly with `.data`" in text:
        return Said(f"the loss assigns to the data of a tensor, which forward mode does not let it{where}", _WRITE)
    if "inference tensor" in text or "aten::_unpack_dual" in text:
        return Said(f"the loss uses torch.inference_mode(), whose tensors forward mode cannot take{where}", "use torch.no_grad() there")
    if "Cannot access data pointer" in text or "doesn't have storage" in text:
        return Said(f"an operator reads its input's memory, which forward mode does not let it{where}", _INSTEAD)
    return None


class Said(NotImplementedError):
    """An error that is a sentence already: what is wrong, and what to do."""

    def __init__(self, what: str, do: str) -> None:
        super().__init__(f"{what}: {do}")
        self.what, self.do = what, do


def place_of(error: Exception, at: Any) -> str:
    """' in module x' for the innermost module that was being called, read off the traceback; nothing where there is none."""
    names = {id(module): name for name, module in at.named_modules()} if isinstance(at, nn.Module) else {}
    inner = None
    for variables in _frames(error):
        module = variables.get("self")
        if isinstance(module, nn.Module) and id(module) in names:
            inner = module
    if inner is None:
        return ""
    name = names[id(inner)]
    return f" in module {name!r} ({type(inner).__name__})" if name else f" in {type(inner).__name__}"


def custom_function_of(error: Exception) -> type[Function] | None:
    """The custom autograd function that was being applied, the innermost."""
    found = None
    for variables in _frames(error):
        for name in ("cls", "autograd_function"):
            function = variables.get(name)
            if isinstance(function, type) and issubclass(function, Function):
                found = function
    return found


def _frames(error: Exception) -> list[dict[str, Any]]:
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame.f_locals)
        trace = trace.tb_next
    return frames
