"""How other libraries compute a curvature of the same LoRA weights on the same tokens.

For `benchmarks/overhead.py`, which times them side by side with `retain`.

    pip install --no-deps "curvlinops-for-pytorch==3.0.1" "kronfluence==1.0.1"
    pip install "posteriors==0.1.3" einconv einops linear-operator opt-einsum scipy

The first line is without dependencies because both would bring torchvision (kronfluence asks for
it, curvlinops asks for backpack, which does), and torchvision another torch. Neither imports it,
nor does curvlinops import backpack.

The same for every peer, so that times compare:

- Only the LoRA weights A and B are measured; nothing else asks for a gradient.
- A sequence of T tokens gives T - 1 predictions. Its last token is only a label, and labels are
  sampled, so the model reads the first T - 1 tokens of it: each position makes one prediction.
- Each prediction has one label, drawn from the model, out of the same forward pass.
- The pass is in the precision of the model, without a key-value cache, in evaluation mode.
- The batches are full: no padding and no attention mask.
- Nothing is written to disk, checked twice or shown on a progress bar.

Labels are drawn by the inverse of the distribution function, except in curvlinops, which draws
its own with ``torch.multinomial``: on a CPU and with 49,152 tokens to choose from that is seven
times slower, about a millisecond a prediction.

The libraries are imported in the first run, which takes seconds: run once before timing.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from retain.models.forward import evaluating
from retain.models.sites import lora_sites

__all__ = ["Peer", "peers"]

SEED = 0


@dataclass(frozen=True)
class Peer:
    """Another way to a curvature.

    Attributes:
        name: of the library or the method.
        structure: ``kfac`` (of A and of B) or ``diagonal``.
        version: of the library (of torch where there is none); None if it cannot be imported.
        run: computes the curvature of a PEFT causal model on batches of tokens, [B, T], and
            leaves the model as it was.
    """

    name: str
    structure: str
    version: str | None
    run: Callable[[nn.Module, list[Tensor]], object]


def peers() -> list[Peer]:
    """All that are known, installed or not."""
    return [
        Peer("ewc", "diagonal", str(torch.__version__), ewc),
        Peer(
            "posteriors",
            "diagonal",
            _version("posteriors", "posteriors", "optree", "tensordict", "torchopt"),
            posteriors,
        ),
        Peer(
            "curvlinops",
            "kfac",
            _version(
                "curvlinops-for-pytorch",
                "curvlinops",
                "einconv",
                "einops",
                "linear_operator",
                "scipy",
            ),
            curvlinops,
        ),
        Peer(
            "kronfluence",
            "kfac",
            _version("kronfluence", "kronfluence", "einconv", "einops", "opt_einsum"),
            kronfluence,
        ),
    ]


def ewc(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """The classical loop of elastic weight consolidation: batches of one, no library.

    Each sequence goes alone through the model and back, and the square of its gradient is added
    up. Taking batches apart is the point: the gradient of a batch mixes its sequences.

    Returns:
        The sum over sequences of each LoRA weight's squared gradient.
    """
    with _lora_alone(model) as weights:
        random = _random(model)
        fisher = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for batch in batches:
            for row in batch.split(1):
                loss = _sampled_nll(_logits(model, row), random).sum()
                gradients = torch.autograd.grad(loss, list(weights.values()))
                for total, gradient in zip(fisher.values(), gradients, strict=True):
                    total.addcmul_(gradient, gradient)
        return fisher


def posteriors(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """``posteriors.laplace.diag_fisher``: squared gradients of sequences through torch.func.

    - ``per_sample=True``: the function gives one log likelihood a sequence by itself, which
      posteriors recommends as the faster way.
    - One sequence an update. posteriors takes the Jacobian of a batch of B by ``jacrev``, which
      sends B vectors back through the whole batch: B * B sequences of work.
    - ``inplace=True``: the diagonal is added to, not made anew.
    - It calls this Fisher empirical, but the labels are the function's: here they are sampled
      in it, which makes it the Monte Carlo Fisher without a second forward pass.
    - The prior is flat, so that nothing but the Fisher is in the precision.

    Returns:
        The diagonal of the precision, as `ewc`.
    """
    diagonal = _load("posteriors.laplace.diag_fisher")
    with _lora_alone(model) as weights:
        random = _random(model)

        def log_posterior(values: dict[str, Tensor], tokens: Tensor) -> tuple[Tensor, Tensor]:
            inputs = {"input_ids": tokens[:, :-1], "use_cache": False}
            logits = functional_call(model, values, (), inputs).logits
            return -_sampled_nll(logits, random), tokens.new_empty(0)

        transform = diagonal.build(log_posterior, per_sample=True)
        state = transform.init({name: weight.detach() for name, weight in weights.items()})
        with warnings.catch_warnings():
            # vmap knows no batching rule for attention and loops instead: here, a loop of one.
            warnings.filterwarnings("ignore", "There is a performance drop")
            for batch in batches:
                for row in batch.split(1):
                    state, _ = transform.update(state, row, inplace=True)
        return dict(state.prec_diag)


def curvlinops(model: nn.Module, batches: list[Tensor]) -> dict[str, dict[str, Tensor]]:
    """``curvlinops.KFACLinearOperator``: Kronecker factors of A and of B.

    - ``fisher_type="mc"``, ``mc_samples=1``: one sampled label a prediction.
    - ``kfac_approx="expand"``: each position counts by itself, as is meant for language models.
    - ``check_deterministic=False``, and ``num_data`` and ``num_per_example_loss_terms`` given:
      each would cost further passes over the data.
    - The loss is a sum, so that the factor of the gradients needs no rescaling.

    Returns:
        ``input_covariances`` and ``gradient_covariances``, by the names of modules.
    """
    library = _load("curvlinops")
    with _lora_alone(model) as weights:
        data = [(batch[:, :-1], batch[:, 1:]) for batch in batches]  # these labels are not used
        operator = library.KFACLinearOperator(
            _ClassesSecond(model),
            nn.CrossEntropyLoss(reduction="sum"),
            list(weights.values()),
            data,
            check_deterministic=False,
            seed=SEED,
            fisher_type="mc",
            mc_samples=1,
            kfac_approx="expand",
            num_data=sum(len(batch) for batch in batches),
            num_per_example_loss_terms=batches[0].shape[1] - 1,
        )
        operator.compute_kronecker_factors()
        state = operator.state_dict()
        return {name: state[name] for name in ("input_covariances", "gradient_covariances")}


def kronfluence(model: nn.Module, batches: list[Tensor]) -> dict[str, dict[str, Tensor]]:
    """Kronfluence's covariance matrices: Kronecker factors of A and of B.

    - ``use_empirical_fisher=False``: one sampled label a prediction.
    - ``fit_covariance_matrices_with_loader`` is called rather than the ``Analyzer`` around it,
      which does the same and then writes all factors to disk (1 GB for SmolLM2-135M).
    - Factors in float32, as by default; no partitions and no offloading.
    - ``has_shared_parameters`` is off: each module runs once.
    - Weights ask for no gradient at all, as its ``prepare_model`` sets it up.

    Returns:
        ``activation_covariance`` and ``gradient_covariance`` (sums) and the counts to divide
        them by, by the names of modules.
    """
    task, analyzer, arguments, covariance, state, tracked = (
        _load(f"kronfluence.{name}")
        for name in (
            "task",
            "analyzer",
            "arguments",
            "factor.covariance",
            "utils.state",
            "module.tracked_module",
        )
    )

    class NextToken(task.Task):  # type: ignore[misc, name-defined]
        def compute_train_loss(self, batch: Tensor, model: nn.Module, sample: bool) -> Tensor:
            return _sampled_nll(_logits(model, batch), random).sum()

        def compute_measurement(self, batch: Tensor, model: nn.Module) -> Tensor:
            raise NotImplementedError  # of influence, which is not asked for

        def get_influence_tracked_modules(self) -> list[str]:
            return modules

    with _lora_alone(model) as weights:
        random = _random(model)
        modules = [name.removesuffix(".weight") for name in weights]
        try:
            analyzer.prepare_model(model, NextToken())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch.cuda.amp.GradScaler
                _, factors = covariance.fit_covariance_matrices_with_loader(
                    model,
                    state.State(cpu=random.device.type == "cpu"),
                    NextToken(),
                    batches,
                    arguments.FactorArguments(strategy="kfac", use_empirical_fisher=False),
                    disable_tqdm=True,
                )
        finally:
            _unwrap(model, tracked.TrackedModule)
        found: dict[str, dict[str, Tensor]] = factors
        return found


class _ClassesSecond(nn.Module):
    """Logits as CrossEntropyLoss wants them: [B, classes, T]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits.transpose(1, 2)


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits of the predictions in a batch, [B, T - 1, classes]."""
    logits: Tensor = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return logits


def _sampled_nll(logits: Tensor, random: torch.Generator) -> Tensor:
    """-log p of labels drawn from the model itself, summed over each sequence: [B]."""
    log_p = logits.log_softmax(-1)
    steps = log_p.detach().exp().cumsum(-1)
    u = torch.rand(*steps.shape[:-1], 1, dtype=steps.dtype, device=steps.device, generator=random)
    labels = torch.searchsorted(steps, u * steps[..., -1:])
    nll = F.nll_loss(log_p.flatten(0, 1), labels.flatten(), reduction="none")
    return nll.view(log_p.shape[:2]).sum(-1)


def _random(model: nn.Module) -> torch.Generator:
    """A seeded generator on the model's device; the global one is left alone."""
    device = next(model.parameters()).device
    return torch.Generator(device).manual_seed(SEED)


@contextmanager
def _lora_alone(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Evaluation mode, and gradients for the LoRA weights alone, which are handed out by name.

    Afterwards each module's mode and each parameter's ``requires_grad`` and ``.grad`` are what
    they were.
    """
    lora = {id(weight) for site in lora_sites(model) for weight in (site.a, site.b)}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(id(parameter) in lora)
            parameter.grad = None
        with evaluating(model):
            yield {name: p for name, p in model.named_parameters() if id(p) in lora}
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _unwrap(model: nn.Module, wrapper: type[nn.Module]) -> None:
    """Puts back the modules that kronfluence has put its own around."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, wrapper):
                setattr(parent, name, child.original_module)


def _load(name: str) -> Any:
    """A module of a library without types; a warning on import says nothing of use here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def _version(distribution: str, *modules: str) -> str | None:
    """The installed version, or None where it or a module that it imports is missing."""
    if any(importlib.util.find_spec(module) is None for module in modules):
        return None
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
