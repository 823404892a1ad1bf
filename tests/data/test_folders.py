"""What a task's file, or a study's, names stays inside the folder that the user names."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from retain.data.loading import inside, load_items
from retain.data.specs import TaskSpec
from retain.errors import SourceError

ROW = '{"text": "so", "label": 0}\n'


def spec(**change: Any) -> TaskSpec:
    return TaskSpec(
        **{
            "name": "mine", "description": "d", "local": "mine", "kind": "choice",
            "prompt": "{{text}}", "options": ["a", "b"], **change,
        }
    )  # fmt: skip


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A data folder with one task, and another folder beside it."""
    for folder in ("home/mine", "home/deep/er", "outside"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "train.jsonl").write_text(ROW)
    (tmp_path / "home-too").mkdir()
    (tmp_path / "home-too" / "train.jsonl").write_text(ROW)
    return tmp_path / "home"


@pytest.mark.parametrize("local", ["mine", "deep/er", "./mine", "deep/../mine", "."])
def test_inside(home: Path, local: str) -> None:
    if local == ".":
        shutil.copy(home / "mine" / "train.jsonl", home)
    assert len(load_items(spec(local=local), "train", data_dir=home)) == 1


@pytest.mark.parametrize(
    "local",
    ["../outside", "mine/../../outside", "..", "../home-too", "{tmp}/outside", "{home}/mine"],
)
def test_outside(home: Path, local: str) -> None:
    local = local.replace("{tmp}", str(home.parent)).replace("{home}", str(home))
    with pytest.raises(SourceError, match=r"leads out of the data folder.*--data-dir"):
        load_items(spec(local=local), "train", data_dir=home)


def test_files_too(home: Path) -> None:
    for train in ("../../outside/train", str(home.parent / "outside" / "train")):
        with pytest.raises(SourceError, match="leads out"):
            load_items(spec(files={"train": train, "eval": "x"}), "train", data_dir=home)


@pytest.mark.parametrize("link", ["folder", "file", "both"])
def test_links(home: Path, link: str) -> None:
    shutil.rmtree(home / "mine")
    if link == "folder":
        os.symlink(home.parent / "outside", home / "mine")
    else:
        (home / "mine").mkdir()
        os.symlink(home.parent / "outside" / "train.jsonl", home / "mine" / "train.jsonl")
    with pytest.raises(SourceError, match="leads out"):
        load_items(spec(), "train", data_dir=home)
    if link == "both":  # a link that stays inside is as good as a file
        os.remove(home / "mine" / "train.jsonl")
        os.symlink(home / "deep" / "er" / "train.jsonl", home / "mine" / "train.jsonl")
        os.symlink(home, home.parent / "linked")
        assert len(load_items(spec(), "train", data_dir=home.parent / "linked")) == 1


def test_the_fix_works(home: Path) -> None:
    with pytest.raises(SourceError, match="name the folder that holds both with --data-dir"):
        load_items(spec(local="../outside"), "train", data_dir=home)
    assert len(load_items(spec(local="outside"), "train", data_dir=home.parent)) == 1


def test_no_path(home: Path) -> None:
    os.symlink("loop", home / "loop")
    for below in ("a\0b", "x" * 5000 + "/y"):
        with pytest.raises(SourceError):
            load_items(spec(local=below), "train", data_dir=home)
    with pytest.raises(SourceError):
        load_items(spec(local="loop"), "train", data_dir=home)
    assert inside(home, "mine", "it") == home / "mine"


@pytest.mark.parametrize("name", ["../outside", "{tmp}/outside", "mine/../.."])
def test_a_study_too(home: Path, name: str) -> None:
    from retain.study.material import _data_file

    work: Any = SimpleNamespace(data_dir=home)
    assert _data_file({"name": "mine"}, "train", work) == home / "mine" / "train.jsonl"
    with pytest.raises(SourceError, match="leads out of the data folder"):
        _data_file({"name": name.replace("{tmp}", str(home.parent))}, "train", work)
