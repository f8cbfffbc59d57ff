"""What stands in adapters/ is what is said of it, and a recipe trains."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from pathlib import Path

import pytest

from adapters import data, train
from specgen.lora.peft_files import CONFIG, WEIGHTS

ROOT = Path(train.__file__).parent
FOLDERS = sorted(path.parent for path in ROOT.glob(f"*/{CONFIG}"))


def test_the_readme_lists_the_folders_that_there_are() -> None:
    listed = re.findall(r"^\| \[([a-z0-9-]+)\]", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    there = sorted(path.name for path in ROOT.iterdir() if path.is_dir() and (path / "manifest.json").is_file())
    assert sorted(listed) == there
    assert len(FOLDERS) >= 2


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_manifest_tells_of_these_files(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in (CONFIG, WEIGHTS):
        assert manifest["sha256"][name] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    config = json.loads((folder / CONFIG).read_text())
    assert config["base_model_name_or_path"] == manifest["base"]
    assert config["r"] == manifest["rank"] == tomllib.loads((folder / "recipe.toml").read_text())["lora"]["r"] <= 8
    assert manifest["effect"]["adapted"] > manifest["effect"]["base"] + 0.5
    assert (folder / "README.md").read_text().startswith(f"# {folder.name}\n")


@pytest.mark.parametrize("name", sorted(data.TASKS))
def test_what_is_learned_is_what_is_measured_and_not_what_is_asked_then(name: str) -> None:
    import random

    task, draws = data.TASKS[name], random.Random(0)
    drawn = [task.draw(draws) for _ in range(300)]
    assert all(task.is_good(answer) for _, answer in drawn)
    assert not {question for question, _ in drawn} & set(task.held_out)
    assert not task.is_good("Madrid is the capital of Spain.")


@pytest.mark.slow
def test_a_recipe_trains(tmp_path: Path) -> None:
    train.main(["json-answers", "--steps", "2", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS, "manifest.json"}
