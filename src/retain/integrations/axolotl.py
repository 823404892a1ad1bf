"""axolotl: a plug-in. In the YAML of a LoRA training that works already::

plugins:
  - retain.integrations.axolotl.RetentionPlugin
retention:
  source: self        # or a file of text to be kept
  budget: 0.05        # nats per token; or strength: 100
"""

from __future__ import annotations

from typing import Any, Literal

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, ConfigDict

from retain.errors import ConfigError
from retain.integrations.fitting import FittingCallback
from retain.types import STRENGTH

__all__ = ["RetentionArgs", "RetentionOptions", "RetentionPlugin"]

KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
"""Options whose fused kernels go past the layers, so that nobody can see what a layer reads."""


class RetentionOptions(BaseModel):
    """The part ``retention`` of the YAML; see `retain.integrations.FittingCallback`."""

    model_config = ConfigDict(extra="forbid")

    source: str = "self"
    curvature: str | None = None
    fit: dict[str, Any] = {}
    strength: float = STRENGTH
    update: Literal["gradient", "proximal"] = "gradient"
    budget: float | None = None
    confidence: float | None = None
    parts: list[str] | None = None
    kl: float = 0.0


class RetentionArgs(BaseModel):
    """What the plug-in adds to axolotl's configuration."""

    retention: RetentionOptions | None = None


class RetentionPlugin(BasePlugin):  # type: ignore[misc]
    """Puts a `FittingCallback` into axolotl's trainer."""

    def get_input_args(self) -> str:
        return "retain.integrations.axolotl.RetentionArgs"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[FittingCallback]:
        """The callback.

        Raises:
            ConfigError: kernels under which layers cannot be seen.
        """
        fused = [name for name in KERNELS if cfg.get(name)]
        if fused:
            raise ConfigError(
                "fused LoRA kernels go past the layers whose inputs retention reads",
                got=", ".join(f"{name}: true" for name in fused),
                allowed="LoRA layers that are called",
                fix="set " + ", ".join(f"{name}: false" for name in fused),
            )
        asked = cfg.get("retention") or {}
        plain = asked.model_dump() if isinstance(asked, BaseModel) else dict(asked)
        return [FittingCallback(**RetentionOptions.model_validate(plain).model_dump())]
