"""``retain fit``: measure a curvature and write it to a file."""

from __future__ import annotations

import math
from shlex import quote

from retain.cli.options import Screen, check_choices, check_file, command, name_list
from retain.curvature.blocks.registry import names
from retain.runs.fit import FitConfig, fit_run
from retain.types import FISHERS, SPACES

__all__ = ["EXAMPLE", "fit"]

EXAMPLE = "Example: retain fit smollm2-135m self -o curvature.safetensors"


@command(FitConfig, "model", "source")
def fit(config: FitConfig, screen: Screen) -> None:
    """Measure what a model relies on, so that training can leave it alone."""
    check_choices(
        ("structure", config.structure, names()),
        ("space", config.space, SPACES),
        ("fisher", config.fisher, FISHERS),
    )
    config = config.model_copy(update={"output": check_file(config.output)})
    done = fit_run(config, name_list(config.targets), screen)
    info, size = done.curvature.info, done.path.stat().st_size
    error = "not known" if math.isnan(info.error) else f"{info.error:.1%}"
    screen.say(
        f"{info.structure} curvature of {len(info.sites)} layers from {info.tokens:,} tokens in "
        f"{done.seconds:.1f} s, relative error {error}\n"
        f"{done.path}: {size / 2**20:.1f} MiB"
    )
    from retain.models.load import is_decoder

    if config.adapter is None and config.num_labels is None and is_decoder(config.model):
        screen.say(
            f"next: retain train --model {quote(config.model)} --data word-problems "
            f"--out runs/held --curvature {quote(str(done.path))}{_given(config)}"
        )
    found = {"path": done.path, "seconds": done.seconds, "bytes": size, "info": info.to_dict()}
    screen.emit(found | {"notes": screen.notes})


def _given(config: FitConfig) -> str:
    """Options that training has to be given too, as they would be typed."""
    said = ""
    for name in ("rank", "alpha", "targets", "adapter_seed", "trust_remote_code"):
        value = getattr(config, name)
        if value != FitConfig.model_fields[name].default:
            said += f" --{name.replace('_', '-')}"
            said += "" if value is True else f" {quote(str(value))}"
    return said
