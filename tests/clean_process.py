"""What a user of an exported encoder does, in a process that does not have this project.

    python -I clean_process.py REPOSITORY FOLDER...

Runs every Python line of each folder's model card, in that folder, and compares each representation with expected.npy
there. At the end torch.hub loads the same from a copy of the repository. Prints what was compared, by folder, as JSON.
"""

from __future__ import annotations

import importlib
import importlib.abc
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch


class Absent(importlib.abc.MetaPathFinder):
    """Lets no part of this project be imported, however it is installed."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.split(".")[0] in {"simclr", "data_prep", "hubconf", "linear_probe", "train_simclr", "tests"}:
            raise ModuleNotFoundError(fullname)


def is_as_expected(found: Any) -> bool:
    expected = np.load("expected.npy")
    return bool(np.abs(np.asarray(found) - expected).max() <= 1e-4 * np.abs(expected).max())


def run_card() -> list[str]:
    """Run the lines in one namespace, as a reader would; return which files gave the expected numbers."""
    names: dict[str, Any] = {}
    compared: list[str] = []
    for block in re.findall(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL):
        names.pop("representation", None)
        exec(block, names)
        if "representation" in names:
            assert is_as_expected(names["representation"]), block
            compared += re.findall(r"model\(x\)|encoder\.pt2|encoder\.onnx", block)
    return compared


def run_timm_by_folder() -> list[str]:
    config = json.loads(Path("config.json").read_text())
    if "architecture" not in config:
        return []
    cfg = config["pretrained_cfg"]
    images = np.load("images.npy")
    mean, std = (torch.tensor(cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    x = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    model = timm.create_model(f"local-dir:{Path.cwd()}", pretrained=True).eval()
    tuned: Any = timm.create_model(f"local-dir:{Path.cwd()}", pretrained=True, num_classes=7).eval()
    with torch.no_grad():
        assert is_as_expected(model(x))
        assert tuned(x).shape == (len(x), 7)
        assert is_as_expected(tuned.forward_head(tuned.forward_features(x), pre_logits=True))
    return ["local-dir"]


def main(repository: str, folders: list[str]) -> None:
    absent = Absent()
    sys.meta_path.insert(0, absent)
    try:
        importlib.import_module("simclr")
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError("this process has simclr")
    compared = {}
    for folder in folders:
        os.chdir(folder)
        compared[Path(folder).name] = run_card() + run_timm_by_folder()
    assert "simclr" not in sys.modules

    sys.meta_path.remove(absent)  # torch.hub brings the copy of the repository itself
    load: Any = torch.hub.load
    for folder in folders:
        os.chdir(folder)
        config = json.loads(Path("config.json").read_text())["simclr"]
        mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
        x = (torch.from_numpy(np.load("images.npy")).permute(0, 3, 1, 2) / 255 - mean) / std
        x = torch.nn.functional.interpolate(x, (config["read_at"],) * 2, mode="bilinear")
        try:
            model = load(repository, "pretrained", folder, source="local")
        except ValueError as error:
            compared[Path(folder).name].append(str(error))
            continue
        with torch.no_grad():
            assert is_as_expected(model(x))
        compared[Path(folder).name].append("hub")
    model = load(repository, "encoder", "small_resnet_w8", image_size=16, source="local")
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 32)
    assert Path(str(sys.modules["simclr"].__file__)).is_relative_to(repository)
    print(json.dumps(compared))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
