"""What would leave for the hub: a stand-in for its client tells, and no network is asked."""

from __future__ import annotations

import json
import pickle
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard

import retain
from retain.errors import ArtifactError, ConfigError, ModelError, OutputError
from tiny import ROWS, tiny

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


class Client:
    """Stands for `huggingface_hub.HfApi`: keeps what it is given, or breaks."""

    made: tuple[Any, ...] = ()
    breaks: Exception | None = None

    def __init__(self, token: str | None = None) -> None:
        self.token, Client.sent = token, {}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        signature(HfApi.create_repo).bind(self, repo_id, private=private, exist_ok=exist_ok)
        if Client.breaks:
            raise Client.breaks
        Client.made = (repo_id, private, exist_ok, self.token)

        class Url(str):
            pass

        url: Any = Url(f"https://hub/{repo_id}")
        url.repo_id = repo_id
        return url

    def create_commit(self, repo_id: str, operations: Any, *, commit_message: str) -> None:
        signature(HfApi.create_commit).bind(self, repo_id, operations, commit_message="")
        for added in operations:
            with added.as_file() as file:
                Client.sent[added.path_in_repo] = file.read()

    sent: dict[str, bytes]


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Client]:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "RETAIN_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi", Client)
    monkeypatch.setattr(Client, "breaks", None)
    monkeypatch.setattr(Client, "sent", {}, raising=False)
    return Client


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return retain.save_adapter(tiny("bert", moved=True), tmp_path / "adapter", str(tmp_path))


def test_an_adapter_without_paths_of_this_machine(
    adapter: Path, hub: type[Client], tmp_path: Path
) -> None:
    (adapter / "tokenizer_config.json").write_text(
        json.dumps({"name_or_path": str(tmp_path), "a": 1})
    )
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / ".cache").mkdir()
    before = {p.name: p.read_bytes() for p in adapter.iterdir() if p.is_file()}
    found = retain.push_to_hub(adapter, "me/may", base_model="smollm2-135m", token="secret")
    assert hub.made == ("me/may", True, True, "secret")
    names = ("README.md", "adapter_config.json", "adapter_model.safetensors", "config.json",
             "tokenizer.json", "tokenizer_config.json")  # fmt: skip
    assert found == ("https://hub/me/may", names) and tuple(hub.sent) == names
    assert not [name for name, data in hub.sent.items() if str(tmp_path).encode() in data]
    assert json.loads(hub.sent["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert json.loads(hub.sent["tokenizer_config.json"]) == {"a": 1}
    assert hub.sent["adapter_model.safetensors"] == before["adapter_model.safetensors"]
    assert ModelCard(hub.sent["README.md"].decode()).data.base_model == BASE
    assert {p.name: p.read_bytes() for p in adapter.iterdir() if p.is_file()} == before


def test_what_is_not_to_leave_is_refused_or_left(adapter: Path, hub: type[Client]) -> None:
    for name in ("training_args.bin", "certify.json", "rows.jsonl"):
        (adapter / name).write_text("mine")
    with pytest.raises(
        ConfigError, match=r"got: certify.json, rows.jsonl, training_args.bin; allo"
    ):
        retain.push_to_hub(adapter, "me/may", base_model=BASE)
    assert not hub.sent
    found = retain.push_to_hub(adapter, "me/may", base_model=BASE, leave_others=True, private=False)
    assert set(found.files) == set(hub.sent) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "config.json"
    }  # fmt: skip
    assert hub.made[1] is False


def test_a_curvature_and_its_card(hub: type[Client], tmp_path: Path) -> None:
    rows = tmp_path / "mine.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS["llama"]))
    curvature = retain.fit_curvature(tiny("llama"), rows, batch_size=4, progress=False)
    file = curvature.save(tmp_path / "c.safetensors")
    assert str(rows).encode() in file.read_bytes()
    found = retain.push_to_hub(file, "me/source", base_model="smollm2-135m")
    assert found.files == tuple(hub.sent) == ("README.md", "curvature.safetensors")
    assert not [name for name, data in hub.sent.items() if str(tmp_path).encode() in data]
    card = hub.sent["README.md"].decode()
    assert "mine.jsonl: 4 rows" in card and f"fingerprint `{curvature.info.model}`" in card
    assert ModelCard(card).data.base_model == BASE
    (tmp_path / "back.safetensors").write_bytes(hub.sent["curvature.safetensors"])
    back = retain.load_curvature(tmp_path / "back.safetensors")
    moved = tiny("llama", moved=True)
    assert back.quadratic(moved) == curvature.quadratic(moved) and back.info.note == "mine.jsonl"


def test_refusals(adapter: Path, hub: type[Client], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(
        kind: type[Exception], said: str, path: Path, name: str = "me/x", **how: Any
    ) -> None:
        with pytest.raises(kind, match=said):
            retain.push_to_hub(path, name, **how)
        assert not hub.sent

    refused(ConfigError, "nobody else has .*base_model='org/name'", adapter)
    refused(ConfigError, "no name of a repository; got: 'a/b/c'", adapter, "a/b/c")
    refused(ModelError, "did you mean .*adapter", adapter.parent)
    refused(ArtifactError, "no such curvature file", adapter / "none.safetensors")
    refused(ArtifactError, "damaged or is none", adapter / "adapter_model.safetensors")
    hub.breaks = OSError("no route to host")
    refused(OutputError, "no route to host.*hf auth login", adapter, base_model=BASE)
    (adapter / "README.md").write_text("---\n[1]\n---\n")
    refused(OutputError, "the model card cannot be added to", adapter, base_model=BASE)
    (adapter / "adapter_model.safetensors").write_bytes(pickle.dumps({"a": 1}))
    refused(ModelError, "the adapter is damaged", adapter, base_model=BASE)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused(ModelError, "pickle", adapter, base_model=BASE)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(ConfigError, "the hub is switched off", adapter)
