"""LLaMA-Factory: its command, with retention. In place of ``llamafactory-cli train may.yaml``::

    python -m retain.integrations.llamafactory may.yaml --source self --budget 0.05

From Python, ``run_exp(settings, callbacks=[FittingCallback("self", budget=0.05)])``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from retain.integrations.fitting import FittingCallback
from retain.types import STRENGTH, UPDATES

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs LLaMA-Factory's ``run_exp``. What is no option of ours is handed on to it."""
    parser = argparse.ArgumentParser(prog="python -m retain.integrations.llamafactory")
    parser.add_argument("--source", default="self", help="text that is to be kept")
    parser.add_argument("--curvature", help="in place of a source, a curvature's file")
    parser.add_argument("--strength", type=float, default=STRENGTH)
    parser.add_argument("--budget", type=float, help="nats per token that may be spent")
    parser.add_argument("--confidence", type=float, help="with which the budget is to hold")
    parser.add_argument("--kl", type=float, default=0.0, help="what a nat of divergence weighs")
    parser.add_argument("--update", choices=UPDATES, default="gradient", help="how the force acts")
    parser.add_argument("--parts", action="append", help="a part of the recipe; may be repeated")
    options, rest = parser.parse_known_args(arguments)
    from llamafactory.train.tuner import run_exp

    callback = FittingCallback(
        options.source, curvature=options.curvature, strength=options.strength,
        budget=options.budget, confidence=options.confidence, kl=options.kl,
        update=options.update, parts=options.parts,
    )  # fmt: skip
    sys.argv = [sys.argv[0], *rest]  # where it reads its own
    run_exp(callbacks=[callback])


if __name__ == "__main__":
    main()
