"""The core needs no package of an extra, and where one is missing, one line names its extra.

Each part runs in a process of its own, in which those packages cannot be found.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import retain
from retain.errors import RetainError
from retain.extras import MissingExtra, classes_of, load, missing

HIDE = """
import sys

HIDDEN = {names!r}.split()

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *more):
        hidden = name.partition(".")[0] in HIDDEN
        return None if hidden else self.finder.find_spec(name, *more)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""


EXTRAS = (
    "datasets", "pyarrow", "pandas", "gguf", "pydantic", "rich", "typer", "scipy", "sklearn",
    "altair", "vl_convert", "trl", "lm_eval", "ray", "bitsandbytes",
)  # fmt: skip

CORE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from retain import Retention, RetentionCallback, attach_lora, fit_curvature, load_curvature

torch.manual_seed(0)
config = LlamaConfig(vocab_size=13, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
                     pad_token_id=0)
model = attach_lora(LlamaForCausalLM(config), rank=2)
rows = [{"input_ids": [1 + i, 5, 7, 2], "labels": [1 + i, 5, 7, 2]} for i in range(8)]
fit_curvature(model, rows, batch_size=4, progress=False).save("c.safetensors")
curvature = load_curvature("c.safetensors")
trainer = Trainer(
    model=model, train_dataset=rows,
    args=TrainingArguments(output_dir="out", max_steps=2, report_to="none", save_strategy="no",
                           use_cpu=True, disable_tqdm=True, learning_rate=0.01, logging_steps=1),
    callbacks=[RetentionCallback(curvature, budget=0.05, source=rows)],
)
trainer.train()
loop = Retention(model, curvature, 1.0)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
for _ in range(2):
    model(**{k: torch.tensor([row[k] for row in rows]) for k in rows[0]}).loss.backward()
    loop.step(optimizer)
    optimizer.zero_grad()

import sys
strangers = {"filelock", "jinja2", "markupsafe", "regex", "yaml"}
for name, module in list(sys.modules.items()):
    if name.split(".")[0] == "retain":
        for what, value in vars(module).items():
            home = str(getattr(value, "__module__", None) or getattr(value, "__name__", ""))
            assert home.split(".")[0] not in strangers, (name, what)
print("trained", trainer.state.global_step, "on", trainer.state.log_history[0]["predicted_nats"])
"""


def run(code: str, folder: Path, *hidden: str) -> subprocess.CompletedProcess[str]:
    text = HIDE.format(names=" ".join(hidden)) + code
    here = {"PYTHONPATH": str(Path(retain.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-c", text], cwd=folder, env=os.environ | here, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip


def test_the_core_needs_the_core_alone(tmp_path: Path) -> None:
    done = run(CORE, tmp_path, *EXTRAS)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "trained 2 on" in done.stdout


@pytest.mark.parametrize(
    ("command", "hidden", "said"),
    [
        ("study", "typer", "retain study needs typer: pip install 'retain-lora[study]'"),
        ("fit", "pydantic", "retain fit needs pydantic: pip install 'retain-lora[cli]'"),
        ("--help", "typer", "retain needs typer: pip install 'retain-lora[cli]'"),
        ("report", "altair", "retain report needs altair: pip install 'retain-lora[report]'"),
    ],
)
def test_a_command_without_its_extra_is_one_line(
    command: str, hidden: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "somewhere").mkdir()
    words = [command, "somewhere"] if command == "report" else [command]
    code = f"from retain.cli import main; sys.exit(main({words!r}))"
    done = run(code, tmp_path, hidden)
    assert (done.returncode, done.stderr) == (2, f"retain: {said}\n")


def test_a_name_without_its_extra_is_our_error(tmp_path: Path) -> None:
    code = "import retain\ntry: retain.train_run\nexcept retain.RetainError as error: print(error)"
    done = run(code, tmp_path, "pydantic")
    assert done.stdout == "retain.train_run needs pydantic: pip install 'retain-lora[cli]'\n"


def test_a_file_without_its_extra_is_our_error(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1" + bytes(20) + b"PAR1")
    code = (
        "from retain.data.sources import read_rows\nfrom retain.errors import RetainError\n"
        "try: read_rows('rows.parquet')\nexcept RetainError as error: print(error)"
    )
    done = run(code, tmp_path, "pyarrow", "datasets")
    assert done.stdout == "reading rows.parquet needs pyarrow: pip install 'retain-lora[data]'\n"


def test_an_import_of_something_else_stays_as_it_is() -> None:
    with pytest.raises(ModuleNotFoundError) as caught:
        load("no_such_package", "nobody")
    assert not isinstance(caught.value, RetainError)
    assert missing(caught.value, "nobody") is None
    assert missing(ImportError("broken", name="yaml"), "nobody") is None


def test_it_is_ours_and_an_import_error() -> None:
    error = missing(ModuleNotFoundError("no", name="yaml.reader"), "retain study")
    assert isinstance(error, MissingExtra) and isinstance(error, ImportError)
    assert str(error) == "retain study needs PyYAML: pip install 'retain-lora[study]'"
    assert error.exit_code == 2


def test_a_class_of_what_is_not_imported_is_none() -> None:
    assert classes_of("no_such_package", "Error") == ()
    assert classes_of("pathlib", "Path") == (Path,)
