"""DeepSpeed's ZeRO-1 and ZeRO-2 in two processes hold a model as one process does (gloo on CPUs).

DeepSpeed changes what accelerate and transformers do where it can be imported, so ``make test``
installs it beside the environment, and only the processes here see it.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import retain
from retain.errors import ConfigError, ModelError, TrainingError
from retain.integrations import FittingCallback
from retain.models import processes
from retain.models.lora import attach_lora
from retain.models.sites import lora_sites
from retain.retention.recipe import Recipe
from retain.training.zero import ZeroStep, zero_of
from tiny import deep, save_tiny

BESIDE = Path(sys.prefix) / "beside"
FOUND = (BESIDE / "deepspeed").is_dir() or importlib.util.find_spec("deepspeed") is not None
STEPS = 4


def ids(seed: int, count: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(1, 32, (count, 8), generator=random).tolist()


SOURCE = [{"input_ids": row} for row in ids(1, 8)]

CASES: dict[str, dict[str, Any]] = {
    "transformers.Trainer": {"stage": 1, "strength": 300.0},
    "clipped micro-batches": {"strength": 300.0, "micro": 2, "clip": 0.05},
    "budget": {"budget": 2e-5, "source": SOURCE},
    "fresh rows": {"strength": 300.0, "grown": True, "clip": 0.05},
    "kl": {"strength": 300.0, "kl": retain.OutputKL(1e4, every=2), "source": SOURCE, "micro": 2},
    "masters elsewhere": {"strength": 300.0, "zero": {
        "offload_optimizer": {"device": "cpu"}}},
    "bfloat16": {"strength": 300.0, "half": True},
    "bfloat16, proximal": {
        "strength": 300.0, "half": True, "update": "proximal", "kl": 1.0, "source": SOURCE,
    },
    "fitted inside": {"strength": 300.0, "inside": True},
    "SFTTrainer": {"strength": 300.0, "update": "proximal"},
    "DPOTrainer": {"strength": 300.0},
    "GRPOTrainer": {"strength": 300.0, "parts": ["force"]},  # its filter is refused
}  # fmt: skip
"""What is given to the callback; some say how the trainer goes."""


def by_place(completions: list[str], **_: Any) -> list[float]:
    return [float(i % 2) for i in range(len(completions))]


class Spoils(TrainerCallback):
    """A weight is no number from the third step on."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            lora_sites(kwargs["model"])[0].a.data.fill_(float("nan"))


def trained(
    case: str,
    base: Path,
    out: Path,
    name: str,
    checkpoint: str | None = None,
    spoils: TrainerCallback | None = None,
) -> dict[str, Any]:
    told, many = dict(CASES[case]), processes.count()
    stage, micro, clip = told.pop("stage", 2), told.pop("micro", 1), told.pop("clip", 1.0)
    inside, half, grown, zero = (
        told.pop("inside", False),
        told.pop("half", False),
        told.pop("grown", False),
        told.pop("zero", {}),
    )
    kind = (
        case.removesuffix("Trainer") if case in ("SFTTrainer", "DPOTrainer", "GRPOTrainer") else ""
    )
    torch.manual_seed(0)
    loaded = retain.load_model(base, dtype="float32")
    model: Any = attach_lora(loaded.model if kind else deep(2), rank=3)
    if half:
        model = model.to(torch.bfloat16)
    curvature = retain.fit_curvature(model, SOURCE, batch_size=4, progress=False)
    if grown:  # an earlier task has learned in the first row
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "lora_B" in key:
                    p[:, 0] = 0.1
    config: dict[str, Any] = {"deepspeed": {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto", "zero_optimization": {"stage": stage} | zero,
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": half},
    }}  # fmt: skip
    said: dict[str, Any] = {
        "output_dir": str(out / name), "max_steps": STEPS, "logging_steps": 1, "save_steps": 2,
        "per_device_train_batch_size": 4 // many // micro, "gradient_accumulation_steps": micro,
        "max_grad_norm": clip, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "accelerator_config": {"split_batches": False},
        "bf16": half and many > 1, **(config if many > 1 else {"save_strategy": "no"}),
    }  # fmt: skip
    rows: Any = [{"input_ids": row, "labels": row} for row in ids(2, 16)]
    if kind in ("DPO", "GRPO"):
        rows = [{"prompt": f"say {i}", "chosen": " ok", "rejected": " no"} for i in range(16)]
    more: dict[str, Any] = {"reward_funcs": by_place} if kind == "GRPO" else {}
    if kind == "GRPO":
        said |= {"num_generations": 2, "max_completion_length": 4}
    if kind:
        import trl
        from datasets import Dataset

        trainer = getattr(trl, case)(
            model=model, train_dataset=Dataset.from_list(rows),
            args=getattr(trl, f"{kind}Config")(**said), processing_class=loaded.tokenizer, **more,
        )  # fmt: skip
    else:
        trainer = Trainer(model=model, train_dataset=rows, args=TrainingArguments(**said))
    call: Any = retain.RetentionCallback(curvature, **told)
    if inside:
        kept = out / "whole" / "retention.safetensors" if checkpoint else None
        fit = {"batch_size": 4, "progress": False}
        call = FittingCallback(SOURCE, curvature=kept, fit=fit, **told)
    trainer.add_callback(call)
    if spoils is not None:
        trainer.add_callback(spoils)
    trainer.train(resume_from_checkpoint=checkpoint and str(out / checkpoint))
    assert (call.recipe.filter is None) is ("parts" in told)
    assert (zero_of(trainer.optimizer) is not None) is (many > 1)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    assert all(p.dtype == (torch.bfloat16 if half else torch.float32) for p in weights.values())
    told_of = [e for e in trainer.state.log_history if "predicted_nats" in e]
    nats, norms = ([e[key] for e in told_of] for key in ("predicted_nats", "grad_norm"))
    return {"weights": weights, "nats": nats, "norms": norms, "strength": call.strength}


def main(out: Path) -> None:
    import deepspeed

    torch.set_num_threads(1)
    for name in deepspeed.ops.__compatible_ops__:  # compile nothing
        deepspeed.ops.__compatible_ops__[name] = False
    torch.distributed.init_process_group("gloo")
    for case in CASES:
        for name, checkpoint in (("whole", None), ("resumed", "whole/checkpoint-2")):
            place = out / case / f"{name}-{processes.rank()}.pt"
            place.parent.mkdir(exist_ok=True)
            torch.save(trained(case, out / "tiny", out / case, name, checkpoint), place)
    place = out / "GRPOTrainer" / f"free-{processes.rank()}.pt"
    CASES["GRPOTrainer"]["strength"] = 0.0
    torch.save(trained("GRPOTrainer", out / "tiny", out / "GRPOTrainer", "free"), place)
    with pytest.raises(TrainingError, match="not finite; got: NaN or infinity at step 3"):
        trained("transformers.Trainer", out / "tiny", out, "spoilt", spoils=Spoils())
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not FOUND:
        pytest.skip("DeepSpeed is not installed")
    out = tmp_path_factory.mktemp("zero")
    save_tiny(out / "tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [*sys.path, str(BESIDE)]
    known = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths), "DS_ACCELERATOR": "cpu", "MASTER_PORT": str(port),
        "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(out)], env=known | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    said = [process.communicate(timeout=280)[0] for process in started]
    assert all(process.returncode == 0 for process in started), said[0][-3000:]
    return out


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.shows(c, "DeepSpeed")] * c.endswith("Trainer"))
     for c in CASES],
)  # fmt: skip
def test_two_processes_hold_as_one(two: Path, case: str, tmp_path: Path) -> None:
    """And go on from a checkpoint where they were, to the bit. GRPO's draw answers of their own."""
    first, other = (torch.load(two / case / f"whole-{rank}.pt") for rank in (0, 1))
    resumed = torch.load(two / case / "resumed-0.pt")
    assert first["nats"][-1] > 0 and resumed["nats"] == first["nats"]
    for name, value in first["weights"].items():
        for others in (other, resumed):
            assert torch.equal(value, others["weights"][name]), name
    if case == "GRPOTrainer":
        free = torch.load(two / case / "free-0.pt")
        assert first["nats"][-1] < 0.9 * free["nats"][-1]
        return
    one = trained(case, two / "tiny", tmp_path, "one")
    most = 0.1 if "bfloat16" in case else 1e-4  # where one process has no float32 beside it
    assert first["nats"] == pytest.approx(one["nats"], rel=10 * most, abs=1e-9)
    assert first["norms"] == pytest.approx(one["norms"], rel=10 * most)
    assert first["strength"] == pytest.approx(one["strength"], rel=1e-3)
    if case == "budget":  # it was reached
        assert one["strength"] != pytest.approx(0.2 / 2e-5)
    for name, value in one["weights"].items():
        apart = (first["weights"][name] - value).abs().max()
        assert apart <= most * value.abs().max(), name


def stand_in(model: torch.nn.Module) -> Any:
    """DeepSpeed's optimiser, with what is asked of it."""
    weights = [w for s in lora_sites(model) for w in (s.a, s.b)]
    flat = torch.cat([w.detach().reshape(-1) for w in weights])
    for w, part in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
        w.data = part.view(w.shape)
    return SimpleNamespace(
        bit16_groups=[weights],
        bit16_groups_flat=[flat],
        single_partition_of_fp32_groups=[flat],
        unscale_and_clip_grads=None,
        optimizer=torch.optim.SGD(weights, lr=0.1),
    )


def test_what_cannot_be_held_is_refused() -> None:
    model = attach_lora(deep(2), rank=3)
    curvature = retain.fit_curvature(model, SOURCE, batch_size=4, progress=False)
    zero = stand_in(model)
    ZeroStep(zero, Recipe(curvature), model, lambda: None).release()
    halves = [zero.bit16_groups[0][::2], zero.bit16_groups[0][1::2]]  # LoRA+
    split = SimpleNamespace(**vars(zero) | {"bit16_groups": halves})
    with pytest.raises(ConfigError, match="got: 2 groups of settings"):
        ZeroStep(split, Recipe(curvature), model, lambda: None)
    small = [zero.bit16_groups_flat[0].half()]
    narrow = SimpleNamespace(**vars(zero) | {"single_partition_of_fp32_groups": small})
    with pytest.raises(ConfigError, match="masters are not in float32; got: float16"):
        ZeroStep(narrow, Recipe(curvature), model, lambda: None)
    moved = SimpleNamespace(**vars(zero) | {"bit16_groups_flat": [zero.bit16_groups_flat[0] + 0]})
    with pytest.raises(ModelError, match="lie in another way"):
        ZeroStep(moved, Recipe(curvature), model, lambda: None)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
