"""Run a model as it is by itself, and get its outputs only where something is predicted.

A trainer runs a model's forward pass under autocast (bf16 is TRL's default), and whatever a hook
multiplies there comes out in bfloat16; accelerate even puts autocast into ``model.forward`` for
good. A notebook may stand in ``torch.autocast`` or ``torch.inference_mode``. In a compiled graph
hooks are compiled too, anew for each, or refused (``fullgraph=True``). What is measured is of the
model as it is written, in its weights' own precision, and what is computed from it is in float32 at
least: every measurement runs inside `evaluating`, every hook and product inside `no_autocast`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from accelerate.utils.operations import ConvertOutputsToFp32  # type: ignore[import-untyped]
from torch import Tensor, nn

from retain.data.batches import Batch
from retain.errors import CurvatureError, ModelError
from retain.models.names import unwrap

__all__ = [
    "compact_head",
    "divergence",
    "evaluating",
    "first_readers",
    "forward_body",
    "forward_logits",
    "head_reads",
    "inputs_of",
    "log_probabilities",
    "logit_divergence",
    "no_autocast",
    "overwrites",
    "own_forwards",
]

_DEVICES = [
    kind
    for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla", "ipu", "privateuseone")
    if torch.amp.is_autocast_available(kind)
]
"""Kinds of device that autocast may be on for, each by itself."""

_OF_DTYPES = ("same dtype", "expected scalar type", "should be the same", "must match the dtype")
"""Parts of what torch says where two precisions meet."""

_AT_ONCE = 32
"""Predictions whose divergence is taken at once: what lies between stays in a cache."""


@contextmanager
def no_autocast() -> Iterator[None]:
    """Products in the tensors' own precision, whatever the host has switched on.

    Also leaves ``torch.inference_mode``, whose tensors nothing could be trained with later;
    gradients stay off then. It may be nested, and used as a decorator.
    """
    on = [kind for kind in _DEVICES if torch.is_autocast_enabled(kind)]
    for kind in on:
        torch.set_autocast_enabled(kind, False)
    try:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                yield
        else:
            yield
    finally:
        for kind in on:
            torch.set_autocast_enabled(kind, True)


@contextmanager
def own_forwards(model: nn.Module) -> Iterator[None]:
    """Takes autocast, and what turns its outputs into float32, out of the modules' ``forward``."""
    changed: list[tuple[nn.Module, Any]] = []
    try:
        for module in model.modules():
            plain = _without_autocast(module.forward)
            if plain is not None:
                changed.append((module, vars(module).get("forward")))
                module.forward = plain
        yield
    finally:
        for module, before in changed:
            if before is None:
                del module.forward
            else:
                module.forward = before


def _not_compiled() -> AbstractContextManager[object]:
    """Inside it what `torch.compile` has made runs as it was written, and calls all hooks.

    Of a process that has compiled nothing it does nothing: to ask loads the compiler, for seconds.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


def _without_autocast(forward: Any) -> Callable[..., Any] | None:
    """What is under the wrappers of accelerate and ``torch.autocast``; None where none is."""
    found = function = getattr(forward, "__func__", forward)
    while (wrapped := getattr(function, "__wrapped__", None)) is not None and (
        isinstance(function, ConvertOutputsToFp32)
        or isinstance(wrapped, ConvertOutputsToFp32)
        or getattr(getattr(function, "__code__", None), "co_name", "") == "decorate_autocast"
    ):
        function = wrapped
    if function is found:
        return None
    return MethodType(function, forward.__self__) if hasattr(forward, "__self__") else function


@contextmanager
def evaluating(model: nn.Module, *, checkpoint: bool = False) -> Iterator[None]:
    """Evaluation mode (no dropout, no autocast, nothing compiled); afterwards all is as it was.

    4-bit layers of bitsandbytes stay in training mode, which is nothing to them but this: on a CPU
    their first evaluation repacks them for inference, and no gradient passes them any more.

    With `checkpoint`, gradient checkpointing works: see `_recomputing`.

    Raises:
        ModelError: the model runs under autocast alone, as its layers differ in precision.
    """
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for module in model.modules():
            if type(module).__name__ == "Linear4bit":
                module.training = True
        recomputing = _recomputing(model) if checkpoint else nullcontext()
        with no_autocast(), own_forwards(model), _not_compiled(), recomputing:
            yield
    except RuntimeError as error:
        found = {p.dtype for p in model.parameters() if p.is_floating_point()}
        if len(found) > 1 and any(part in str(error) for part in _OF_DTYPES):
            raise ModelError(
                "the model's layers differ in precision, and do not run without autocast",
                got=f"weights in {', '.join(sorted(str(d).removeprefix('torch.') for d in found))}",
                allowed="layers that take each other's outputs",
                fix="model.to(torch.bfloat16), or model.float()",
            ) from error
        raise
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _recomputing(model: nn.Module) -> Iterator[None]:
    """Inside it gradient checkpointing works in evaluation mode.

    transformers checkpoints only layers that are in training mode, so those alone, without the
    modules inside them and the body around them (which may skip layers at random), are put into
    it. Some of them drop values by themselves: what is checkpointed runs in evaluation mode.
    """
    marked = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    known = set(marked)
    layers = [m for m in marked if known.isdisjoint(list(m.modules())[1:])]
    own = [(m, f) for m in layers if (f := vars(m).get("_gradient_checkpointing_func"))]
    try:
        for layer in layers:
            layer.training = True
        for layer, recompute in own:
            layer._gradient_checkpointing_func = _in_evaluation(layer, recompute)
        yield
    finally:
        for layer, recompute in own:
            layer._gradient_checkpointing_func = recompute


def _in_evaluation(layer: nn.Module, recompute: Callable[..., Any]) -> Any:
    """The checkpoint function of a layer, with the layer in evaluation mode in what it runs."""

    def checkpointed(run: Callable[..., Any], *args: Any, **options: Any) -> Any:
        def quietly(*inputs: Any, **more: Any) -> Any:
            layer.training = False
            try:
                return run(*inputs, **more)
            finally:
                layer.training = True

        return recompute(quietly, *args, **options)

    return checkpointed


def overwrites(model: nn.Module) -> bool:
    """Whether a graph of the model takes one backward pass alone, as with kernels of Liger.

    Its patches of a model that is there sit in the modules' ``forward``, others in their classes.
    """
    forwards = (getattr(m.forward, "__func__", m.forward) for m in model.modules())
    return any(str(getattr(f, "__module__", "")).startswith("liger_kernel") for f in forwards)


def log_probabilities(logits: Tensor, regression: bool = False) -> Tensor:
    """Log-probabilities of logits [rows, classes], or a `regression`'s outputs as they are.

    At least in float32.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if regression else wide.log_softmax(-1)


def logit_divergence(base: Tensor, tuned: Tensor, regression: bool = False) -> Tensor:
    """`divergence` of what a model puts out, at least in float32."""
    wide = log_probabilities(base, regression), log_probabilities(tuned, regression)
    return divergence(*wide, regression)


def divergence(base: Tensor, tuned: Tensor, regression: bool) -> Tensor:
    """``KL(base || tuned)`` of each prediction in nats, [predictions].

    Both are log-probabilities, or the outputs of a `regression`, [predictions, outputs]. A class
    that the base rules out (a masked token) adds nothing. Where no gradient is asked for, ``q - p``
    is summed with ``p log(p / q)``: together they are 0 but for rounding, yet each class then adds
    what is of second order alone, and a small divergence keeps its digits.
    """
    if regression:
        return 0.5 * (base - tuned).square().sum(-1)
    if torch.is_grad_enabled() and (base.requires_grad or tuned.requires_grad):
        ratio = (base - tuned).masked_fill_(base == -torch.inf, 0.0)
        return (base.exp() * ratio).sum(-1)
    pairs = zip(base.split(_AT_ONCE), tuned.split(_AT_ONCE), strict=True)
    return torch.cat([_small_divergence(b, t) for b, t in pairs])


def _small_divergence(base: Tensor, tuned: Tensor) -> Tensor:
    ratio, p = base - tuned, base.exp()
    more = torch.where(ratio.abs() < 1, p * torch.expm1(-ratio), tuned.exp() - p)
    return (p * ratio.masked_fill_(base == -torch.inf, 0.0)).add_(more).sum(-1)


def forward_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a batch's predictions, [predictions, classes], row after row.

    A causal model's head is the widest layer by far, so it is run at the predicted positions
    alone: they are picked out of the hidden states as these enter the head, as one matrix.
    """
    predict = batch.predict
    if predict is None:
        logits: Tensor = model(**batch.inputs).logits
        return logits
    with head_reads(model, lambda hidden: hidden[predict.to(hidden.device)][None]):
        logits = model(**batch.inputs, use_cache=False).logits
    return logits.squeeze(0)  # an index would be a copy of all of them in the backward pass


def forward_body(model: nn.Module, batch: Batch) -> None:
    """Runs a model for its hooks' sake: a causal head sees one position alone."""
    if batch.predict is None:
        model(**batch.inputs)
        return
    with head_reads(model, lambda hidden: hidden[:1, :1]):
        model(**batch.inputs, use_cache=False)


def compact_head(model: nn.Module) -> AbstractContextManager[object]:
    """Inside it the head sees contiguous input, as generation wants it.

    transformers hands the head a strided view of the last position of each row. A CPU product
    with such a view copies the head's weights once for each row.
    """
    return head_reads(model, Tensor.contiguous)


def head_reads(
    model: nn.Module, change: Callable[[Tensor], Tensor]
) -> AbstractContextManager[object]:
    """Inside it a causal model's head reads what `change` makes of the hidden states."""
    inner: Any = unwrap(model)
    handle: AbstractContextManager[object] = (
        inner.get_output_embeddings().register_forward_pre_hook(
            lambda _m, args: (change(args[0]), *args[1:])
        )
    )
    return handle


def inputs_of(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, Tensor]:
    """Each layer's input in the forward pass that `run` makes.

    All inputs are held until its end, so that no memory is used twice.

    Raises:
        CurvatureError: a layer that runs not at all, or more than once.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def hook(name: str) -> Callable[..., None]:
        return lambda _m, args: seen[name].append(args[0])

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_pre_hook(hook(name)))
        run()
    for name, inputs in seen.items():
        if len(inputs) != 1:
            raise CurvatureError(
                "a layer does not run exactly once in a forward pass",
                got=f"{len(inputs)} runs of {name}",
                allowed="1",
                fix="leave that layer out of the adapter's target_modules",
            )
    return {name: inputs[0] for name, inputs in seen.items()}


def first_readers(seen: Mapping[str, Tensor]) -> dict[str, str]:
    """Layer -> the first layer that reads the same tensor.

    Tensors are the same when they are the same view of the same storage, which on the meta device
    has no memory.
    """
    shared: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, x in seen.items():
        place = (x.untyped_storage()._cdata, x.storage_offset(), x._version)
        shared[name] = first.setdefault((*place, tuple(x.shape), x.stride()), name)
    return shared
