"""Load a base model by a built-in name, a hub id, a folder or a ``.gguf`` file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError

from retain.compat import config_class
from retain.errors import ModelError, unknown
from retain.models.builtin import BUILTIN, locate, offline, quiet, unknown_model
from retain.models.names import layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DTYPES",
    "LoadedModel",
    "has_causal_head",
    "is_decoder",
    "is_encoder",
    "load_model",
    "own_labels",
]

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


class LoadedModel(NamedTuple):
    """A base model in evaluation mode, its tokenizer, and the name it was asked for by."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_model(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    num_labels: int | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> LoadedModel:
    """Loads a model with its tokenizer.

    Args:
        name: a built-in name (``smollm2-135m``, ``minilm-22m``), a hub id, a local folder, or a
            ``.gguf`` file (converted once, see `retain.models.builtin`).
        dtype: of the weights; a name in `DTYPES` or a `torch.dtype`.
        device: where the model is put; by default a CUDA device where there is one, each process
            of ``torchrun`` on its own.
        num_labels: gives an encoder (or decoder) a classification head of so many classes.
            Without it a decoder gets its language-model head, and an encoder none.
        trust_remote_code: run code that comes with the model. Off unless asked for.
        **kwargs: passed on to ``from_pretrained``.

    Raises:
        ModelError: the model cannot be found or read.
        ConfigError: an unknown dtype.
    """
    import transformers as tf

    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        dtype = DTYPES[dtype]
    where, _ = locate(str(name))
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": offline()}
    try:
        with quiet():
            config = tf.AutoConfig.from_pretrained(where, **common)
            auto: Any = tf.AutoModel
            if num_labels is not None:
                auto = tf.AutoModelForSequenceClassification
                kwargs = {"num_labels": num_labels, **kwargs}
            elif has_causal_head(config.architectures or []):
                auto = tf.AutoModelForCausalLM
            kwargs |= {"dtype": dtype, "use_safetensors": True, **common}
            if num_labels is None:
                model = auto.from_pretrained(where, **kwargs)
            else:
                model, told = auto.from_pretrained(where, **kwargs | {"output_loading_info": True})
                lacking = {*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])}
                model.retain_drawn = layers_of(model, lacking)
            try:
                tokenizer = tf.AutoTokenizer.from_pretrained(where, **common)
            except (OSError, ValueError, ImportError) as error:
                raise _no_tokenizer(str(name), error) from error
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise unknown_model(str(name), error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if device is None:
        device = "cpu"
        if torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', torch.cuda.current_device())}"
    model.to(device).eval()
    model.retain_tokenizer = tokenizer  # so that text needs no tokenizer=...
    return LoadedModel(model, tokenizer, str(name))


def _no_tokenizer(name: str, why: BaseException) -> ModelError:
    return ModelError(
        "the model has no tokenizer that can be loaded",
        got=f"{name!r}: {' '.join(str(why).split())[:160]}",
        allowed="its tokenizer's files beside the weights, such as tokenizer.json",
        fix="save it there, as AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER) does",
    )


def has_causal_head(architectures: Sequence[str]) -> bool:
    """Whether the classes that a configuration names are of a decoder with its head."""
    return any("CausalLM" in a or "LMHead" in a for a in architectures)


def is_decoder(name: str) -> bool | None:
    """Whether a model has a language-model head; None where its configuration does not say.

    Of a model that is not on this disk the configuration alone is fetched, if it can be had.
    """
    if _is_gguf(name):
        return True
    named = _settings_of(name).get("architectures")
    return has_causal_head(named) if named else None


def is_encoder(name: str) -> bool:
    """Whether a model reads text and does not write it, by its configuration; see `is_decoder`."""
    found = {} if is_decoder(name) else _settings_of(name)
    named = found.get("architectures") or []
    other = ("Conditional", "EncoderModel", "Image", "Vision", "CTC", "Audio")
    return (
        bool(named)
        and not found.get("is_encoder_decoder")
        and not any(part in name for name in named for part in other)
        and not found.keys() & {"vision_config", "audio_config", "num_decoder_layers"}
    )


def own_labels(name: str) -> list[str] | None:
    """The classes of the classification head that a model comes with; None without one."""
    found = _settings_of(name)
    if not any("ForSequenceClassification" in a for a in found.get("architectures") or []):
        return None
    names = found.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}
    return [str(names[key]) for key in sorted(names, key=int)]


def _is_gguf(name: str) -> bool:
    return (BUILTIN[name].path if name in BUILTIN else name).endswith(".gguf")


def _settings_of(name: str) -> dict[str, Any]:
    """A model's configuration as it is written; {} where none can be had."""
    for here in () if _is_gguf(name) else (True, False):
        try:
            where, _ = locate(name)
            config, _ = config_class().get_config_dict(where, local_files_only=here)
        except (ModelError, OSError, ValueError):
            continue
        return dict(config)
    return {}
