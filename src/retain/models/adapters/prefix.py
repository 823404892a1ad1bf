"""Prefix tuning (Li and Liang, arXiv 2101.00190): learned keys and values, through PEFT."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from peft import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForSequenceClassification,
    PrefixTuningConfig,
)
from peft.utils import load_peft_weights, set_peft_model_state_dict
from pydantic import Field
from torch import Tensor, nn
from transformers import DynamicCache

from retain.errors import ModelError
from retain.models.adapters.base import Adapter, Options, check_plain, size_of
from retain.models.forward import evaluating
from retain.models.heads import is_causal
from retain.models.names import drawn_layers
from retain.models.saved import check_adapter, misfit, refused

__all__ = ["Prefix", "PrefixOptions"]

_TYPE = "PREFIX_TUNING"


class PrefixOptions(Options):
    """Options of prefix tuning.

    Attributes:
        num_virtual_tokens: how many keys and values are put before a text, in each layer.
        projection: learn them through a two-layer network, which is dropped when they are saved.
        projection_size: inner width of that network; the model's hidden width by default.
        init: ``tokens``: the keys and values of random tokens, much the gentlest (the paper
            advises it too); ``normal``: a draw, as PEFT does. Of no account with a projection.
        std: of a normal draw of the prefix, or of what a projection reads.
    """

    num_virtual_tokens: int = Field(20, ge=1)
    projection: bool = False
    projection_size: int | None = Field(None, ge=1)
    init: Literal["tokens", "normal"] = "tokens"
    std: float = Field(1.0, ge=0)


class Prefix(Adapter):
    """Keys and values of virtual tokens that every layer's attention also sees.

    Unlike the other kinds it does not begin as the base model: the virtual tokens take part of
    the attention, and a text's own tokens are moved by their number (learned positions too, so
    a text may be that much shorter). On SmolLM2 with 12 virtual tokens KL(base || fresh) is about
    0.4 nats a token with ``init="tokens"``, and 5 with ``normal``. The prefix is kept in float32
    at least: in bfloat16 a value near 1 would not feel a step below 0.004. Each layer gets it as
    a cache of past tokens, so gradient checkpointing, which drops such caches, is refused, and so
    are models that take none (of encoders all but BERT, RoBERTa, ELECTRA and their kin).
    """

    kind: ClassVar[str] = "prefix"
    schema: ClassVar[type[Options]] = PrefixOptions
    begins_as_base: ClassVar[bool] = False

    @classmethod
    def put_on(cls, base: nn.Module, options: PrefixOptions, seed: int) -> nn.Module:
        """See `Adapter.put_on`; ModelError for a model that takes no cache of past tokens."""
        _check_cache(base)
        shape: Any = base.config
        config = PrefixTuningConfig(
            task_type="CAUSAL_LM" if is_causal(base) else "SEQ_CLS",
            num_virtual_tokens=options.num_virtual_tokens,
            prefix_projection=options.projection,
            encoder_hidden_size=options.projection_size or shape.hidden_size,
            modules_to_save=sorted(drawn_layers(base)) or None,
        )
        random, start = torch.Generator().manual_seed(seed), None
        if options.init == "tokens" and not options.projection:
            start = _read_tokens(base, options.num_virtual_tokens, random)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model: Any = _wrap(base, config)
        table = model.prompt_encoder["default"].embedding.weight
        if start is None:
            start = options.std * torch.randn(table.shape, generator=random)
        with torch.no_grad():
            table.copy_(start)
        return model  # type: ignore[no-any-return]

    def __init__(
        self, model: nn.Module, options: dict[str, Any], size: int = 0, base: str = ""
    ) -> None:
        super().__init__(model, options, size, base)
        model.register_forward_pre_hook(_refuse_checkpointing)

    @classmethod
    def load(cls, base: nn.Module, folder: Path) -> Self:
        """See `Adapter.load`. A prefix that was learned through a projection goes on without."""
        check_plain(base)
        size, task = size_of(base), check_adapter(folder, _TYPE).get("task_type")
        if task != ("CAUSAL_LM" if is_causal(base) else "SEQ_CLS"):
            raise misfit(f"{folder} ({task})", _TYPE)
        try:
            tensors = load_peft_weights(str(folder.expanduser()), device="cpu")
            table = tensors["prompt_embeddings"]
            config = PrefixTuningConfig.from_pretrained(str(folder.expanduser()))
        except Exception as error:
            why = f"{folder} ({type(error).__name__}: {error})"
            raise refused("the adapter is damaged", why, _TYPE) from error
        _check_fit(base, config, tensors, folder)
        config.prefix_projection, config.inference_mode = False, False
        with torch.random.fork_rng():
            model = _wrap(base, config)
        set_peft_model_state_dict(model, tensors)
        return cls(model, {"num_virtual_tokens": len(table), "projection": False}, size)


class _CausalLM(PeftModelForCausalLM):
    """PEFT's puts a fresh prefix in the place of any cache; this one goes on from its own."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        run: Any = super().forward
        cache = kwargs.get("past_key_values")
        if cache is None or not cache.get_seq_length():
            return run(input_ids, attention_mask, *args, **kwargs)
        tokens = self.active_peft_config.num_virtual_tokens
        if attention_mask is not None:
            seen = attention_mask.new_ones(len(attention_mask), tokens)
            attention_mask = torch.cat([seen, attention_mask], dim=1)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + tokens
        return self.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def _wrap(base: nn.Module, config: PrefixTuningConfig) -> PeftModel:
    _refuse_checkpointing(base, any_mode=True)
    kind = _CausalLM if config.task_type == "CAUSAL_LM" else PeftModelForSequenceClassification
    mode, dtype = base.training, next(base.parameters()).dtype
    base.requires_grad_(False)
    model: PeftModel = kind(base, config, autocast_adapter_dtype=False)
    model.prompt_encoder.to(torch.promote_types(dtype, torch.float32))
    return model.train(mode)


def _check_cache(base: Any) -> None:
    """Refuses a model whose layers take no keys and values of past tokens."""
    if "past_key_values" not in inspect.signature(base.base_model.forward).parameters:
        raise ModelError(
            "prefix tuning needs a model that takes keys and values of past tokens",
            got=type(base).__name__,
            allowed="a decoder, or an encoder such as BERT, RoBERTa and ELECTRA",
            fix="take another kind of adapter, such as lora",
        )


def _read_tokens(base: Any, tokens: int, random: torch.Generator) -> Tensor:
    """Keys and values of random tokens, as PEFT lays out a prefix: [tokens, 2 layers * width]."""
    ids = torch.randint(base.config.vocab_size, (1, tokens), generator=random).to(base.device)
    cache = DynamicCache()
    with evaluating(base), torch.no_grad():
        base.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    both = [x[0].transpose(0, 1) for layer in layers for x in (layer.keys, layer.values)]
    return torch.stack(both, dim=1).flatten(1)


def _check_fit(base: nn.Module, config: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    """Refuses a prefix or a head of another shape than the model's."""
    from peft.utils.other import _prepare_prompt_learning_config as prepare

    given = (config.num_layers, config.token_dim, config.num_attention_heads)
    fresh = PrefixTuningConfig(task_type=config.task_type, num_virtual_tokens=1)
    own: Any = prepare(fresh, base.config)  # type: ignore[no-untyped-call]
    want = (own.num_layers, own.token_dim, own.num_attention_heads)
    if given != want:
        raise misfit(f"{folder} (layers, width and heads {given} instead of {want})", _TYPE)
    shapes = {f"base_model.{n}": p.shape for n, p in base.named_parameters()}
    table = (config.num_virtual_tokens, 2 * own.num_layers * own.token_dim)
    for name, tensor in tensors.items():
        if tensor.shape != (table if name == "prompt_embeddings" else shapes.get(name)):
            raise misfit(f"{folder} ({name} of the shape {tuple(tensor.shape)})", _TYPE)


def _refuse_checkpointing(model: nn.Module, *_: Any, any_mode: bool = False) -> None:
    on = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    if on and (model.training or any_mode):  # it works in training mode alone
        raise ModelError(
            "prefix tuning does not work with gradient checkpointing",
            got="a model with gradient checkpointing on",
            allowed="plain training: checkpointing drops the cache that the prefix comes as",
            fix="switch gradient checkpointing off",
        )
