from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import train_simclr
from data_prep.shapes import CLASSES, draw
from simclr import beton, evaluation, losses
from simclr.config import LossConfig, OptimizerConfig, SpeedConfig, TrainConfig
from simclr.data import EpochPlan, open_images, validation_split
from simclr.evaluation import DivergedError
from simclr.models import ModelConfig, SimCLR
from simclr.run import checkpoint, opening
from simclr.run.devices import require_world_size
from simclr.run.meter import collapse_measures
from simclr.run.runlog import read_metrics
from simclr.schedule import learning_rate_at
from simclr.step.recompute import recompute_blocks
from simclr.views import ViewSpec, two_views
from tests.helpers import RankError, run_python
from tests.runs import SMALL, is_equal, lines, train_on, type_command, weights, write_shapes

NUM_IMAGES = 100
BATCH = 24  # 4 steps an epoch, and 4 images left out
STEPS = 4


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("images") / "train.beton", NUM_IMAGES)


def settings(images: Path, output: Path, **changes: Any) -> TrainConfig:
    """A small run in float64, where two runs that are the same differ by rounding alone."""
    defaults: dict[str, Any] = {
        "data": images,
        "output": output,
        "epochs": 3,
        "global_batch_size": BATCH,
        "model": SMALL,
        "optimizer": OptimizerConfig(base_learning_rate=2.0, warmup_epochs=1 if changes.get("epochs", 3) > 2 else 0),
        "precision": "fp64",
        "view_sizes": ((16, 1.0),),  # a quarter of the work
        "num_validation": 30,
        "knn_every_epochs": 1,
        "log_every_steps": 3,
        "speed": SpeedConfig(loader="memory"),
    }
    return TrainConfig(**{**defaults, **changes})


BARLOW: dict[str, Any] = {
    "loss": LossConfig(name="barlow_twins", scale=0.1),
    "model": dataclasses.replace(SMALL, projector="barlow3"),
    "optimizer": OptimizerConfig(name="lars", base_learning_rate=1.0, lars_trust_coefficient=0.02, lars_clip=True),
    "view_2": ViewSpec(solarise_probability=0.2),
    "batch_norm_per_view": True,
}


def pretrain(rank: int, world_size: int, config: TrainConfig) -> None:
    """What each rank runs."""
    assert train_simclr.main(config) == config.output


def pretrain_as_asked(rank: int, world_size: int, config: TrainConfig) -> None:
    """What each rank runs where results are equal, whether blocks are recomputed or not, and whatever the loss's form.

    That they are as asked shows in what is called.
    """
    with (
        mock.patch.object(opening, "recompute_blocks", wraps=recompute_blocks) as recomputed,
        mock.patch.object(losses, "nt_xent", wraps=losses.nt_xent) as nt_xent,
    ):
        pretrain(rank, world_size, config)
    assert recomputed.call_count == config.speed.recompute
    steps = 20 if config.loss.name == "nt_xent" else 0
    assert [call.kwargs["form"] for call in nt_xent.call_args_list] == [config.speed.nt_xent_form] * steps


def run(config: TrainConfig, world_size: int = 1) -> None:
    """Pretrain on one device in this process, on several in others."""
    train_on(world_size, pretrain, config)


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Norm of the difference of all weights and buffers over the norm of all."""
    assert left.keys() == right.keys()
    differ, size = 0.0, 0.0
    for name, value in left.items():
        differ += float((value.double() - right[name].double()).square().sum())
        size += float(value.double().square().sum())
    return math.sqrt(differ / size)


def has_moved(config: TrainConfig) -> bool:
    """Whether a run's weights are others than it began with."""
    torch.manual_seed(config.seed)
    return difference(weights(config), SimCLR(config.model, 32).double().state_dict()) > 1e-3


@pytest.fixture(scope="module")
def one_device(images: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished run on one device."""
    config = settings(images, tmp_path_factory.mktemp("run") / "one")
    run(config)
    return config


def test_a_run_begins_from_anothers_settings_and_options_override_them(
    one_device: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_file = one_device.folder / "config.json"
    same, other = (dataclasses.replace(one_device, output=tmp_path / name) for name in ("same", "other"))
    type_command(monkeypatch, "--config", settings_file, "--output", same.folder)
    assert is_equal(weights(same), weights(one_device))
    assert lines(same) == lines(one_device)
    type_command(monkeypatch, f"--config={settings_file}", "--output", other.folder, "--seed", 8)
    assert not is_equal(weights(other), weights(one_device))
    with pytest.raises(SystemExit, match="seed was 0 and is 8"):  # in the folder of the run that it was taken from
        type_command(monkeypatch, "--config", settings_file, "--seed", 8)


# ------------------------------------------------------------------------------------------ the same run on N devices


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_several_devices_give_the_weights_of_one(one_device: TrainConfig, tmp_path: Path, world_size: int) -> None:
    config = dataclasses.replace(one_device, output=tmp_path / "run", world_size=world_size)
    run(config, world_size)
    manifest = json.loads((config.folder / "manifest.json").read_text())
    assert manifest["derived"]["world_size"] == world_size
    assert manifest["derived"]["per_device_batch_size"] == BATCH // world_size
    assert difference(weights(config), weights(one_device)) < 1e-12
    for here, there in zip(lines(config), lines(one_device), strict=True):
        assert here.keys() == there.keys()
        for key, value in here.items():
            if key == "projection_spread":  # of each rank's rows, averaged
                continue
            assert value == (there[key] if key == "kind" else pytest.approx(there[key], rel=1e-6)), key


@pytest.mark.distributed
@pytest.mark.parametrize(
    "changes",
    [
        BARLOW,
        {"optimizer": OptimizerConfig(name="adamw", base_learning_rate=0.01, gradient_clip_norm=0.05)},
        {"batch_norm_per_view": True, "model": ModelConfig(encoder="small_resnet_w8", projector="simclr3")},
        {"optimizer": OptimizerConfig(name="muon", base_learning_rate=0.05), "view_sizes": ((16, 0.5),)},
    ],
    ids=["barlow_twins", "adamw-clipped", "views-apart", "muon-small-views"],
)
def test_so_do_other_losses_optimizers_and_networks(images: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    runs = [settings(images, tmp_path / str(world_size), epochs=2, **changes) for world_size in (1, 2)]
    for world_size, config in zip((1, 2), runs, strict=True):
        run(config, world_size)
    assert difference(weights(runs[0]), weights(runs[1])) < 1e-11
    assert has_moved(runs[0])


@pytest.fixture(scope="module")
def twenty_steps(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainConfig]:
    """Runs of 20 steps on one device, whole batches."""
    folder = tmp_path_factory.mktemp("twenty")
    runs = {
        "simclr": settings(images, folder / "simclr", epochs=5),
        "barlow": settings(images, folder / "barlow", epochs=5, **BARLOW),
    }
    for config in runs.values():
        run(config)
        assert checkpoint.load_resumable(config.folder / checkpoint.LAST)["step"] == 20
        assert has_moved(config)
    return runs


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("method", "world_size", "recompute", "form"),
    [
        ("simclr", 1, False, "matrix"),
        ("simclr", 1, True, "auto"),
        ("simclr", 2, False, "matrix"),
        ("simclr", 2, True, "tiled"),
        ("simclr", 4, False, "tiled"),
        ("barlow", 1, True, "auto"),
        ("barlow", 2, True, "auto"),
        ("barlow", 4, False, "auto"),
    ],
)
def test_devices_recomputed_blocks_and_forms_of_the_loss_give_the_same_weights(
    twenty_steps: dict[str, TrainConfig], tmp_path: Path, method: str, world_size: int, recompute: bool, form: Any
) -> None:
    reference = twenty_steps[method]
    config = dataclasses.replace(
        reference,
        output=tmp_path / "run",
        world_size=world_size,
        speed=SpeedConfig(loader="memory", recompute=recompute, nt_xent_form=form),
    )
    train_on(world_size, pretrain_as_asked, config)
    assert checkpoint.load_resumable(config.folder / checkpoint.LAST)["step"] == 20
    assert difference(weights(config), weights(reference)) < 1e-9
    if world_size == 1 and form == "auto":  # not even rounding
        assert difference(weights(config), weights(reference)) == 0


def test_a_run_may_go_on_with_recomputed_blocks(one_device: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(one_device, output=tmp_path / "run", stop_at_step=5)
    run(config)
    run(dataclasses.replace(config, stop_at_step=None, speed=SpeedConfig(loader="memory", recompute=True)))
    assert difference(weights(config), weights(one_device)) == 0


@pytest.mark.distributed
@pytest.mark.parametrize("per_view", [False, True])
def test_micro_batches_give_the_same_weights(images: Path, tmp_path: Path, per_view: bool) -> None:
    """Of an encoder without batch normalisation; the projector has it. The last micro-batch is a smaller one."""
    model = ModelConfig(encoder="test_vit", projector_hidden=16, projection_dim=8)
    whole = settings(
        images,
        tmp_path / "whole",
        epochs=1,
        stop_at_step=2,
        model=model,
        batch_norm_per_view=per_view,
        num_validation=0,
    )
    run(whole)
    for world_size, size in ((1, 9), (2, 5)):
        config = dataclasses.replace(
            whole, output=tmp_path / f"{world_size}", speed=SpeedConfig(loader="memory", micro_batch_size=size)
        )
        run(config, world_size)
        assert checkpoint.load_resumable(config.folder / checkpoint.LAST)["step"] == 2
        assert 0 < difference(weights(config), weights(whole)) < 1e-9


@pytest.mark.distributed
def test_batch_norm_per_device_is_another_run(one_device: TrainConfig, tmp_path: Path) -> None:
    # So the tests above would notice.
    config = dataclasses.replace(one_device, output=tmp_path / "run", global_batch_norm=False)
    run(config, 2)
    assert difference(weights(config), weights(one_device)) > 1e-4


@pytest.mark.distributed
def test_in_float32_devices_differ_by_rounding(images: Path, tmp_path: Path) -> None:
    # One step: the next ones make rounding grow, in so small a network a hundredfold.
    runs = [settings(images, tmp_path / str(n), precision="fp32", stop_at_step=1) for n in (1, 2)]
    for world_size, config in zip((1, 2), runs, strict=True):
        run(config, world_size)
    assert 0 < difference(weights(runs[0]), weights(runs[1])) < 1e-4


def test_ffcv_gives_the_same_weights_bit_for_bit(one_device: TrainConfig, tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    config = dataclasses.replace(one_device, output=tmp_path / "run", speed=SpeedConfig(loader="ffcv"))
    run(config)
    assert is_equal(weights(config), weights(one_device))
    assert json.loads((config.folder / "manifest.json").read_text())["loader"].startswith("ffcv")


def test_fused_views_give_the_same_run_with_any_loader_and_in_pieces(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("numba")
    fused: dict[str, Any] = {"precision": "fp32", "speed": SpeedConfig(loader="memory", views="fused")}
    whole, in_pieces, with_ffcv = (settings(images, tmp_path / name, **fused) for name in ("a", "b", "c"))
    run(whole)
    manifest = json.loads((whole.folder / "manifest.json").read_text())
    assert manifest["views"].startswith("fused")
    assert manifest["step"] == "launch by launch, not compiled (since the run is on cpu)"
    for stop in (1, 6, None):
        run(dataclasses.replace(in_pieces, stop_at_step=stop))
    assert is_equal(weights(in_pieces), weights(whole))
    pytest.importorskip("ffcv")
    run(dataclasses.replace(with_ffcv, speed=SpeedConfig(loader="ffcv", views="fused")))
    assert is_equal(weights(with_ffcv), weights(whole))


def test_fused_views_and_others_differ_by_rounding(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("numba")
    ways: tuple[Any, Any] = ("fused", "torch")
    one, other = (
        settings(
            images, tmp_path / way, precision="fp32", speed=SpeedConfig(loader="memory", views=way), stop_at_step=1
        )
        for way in ways
    )
    run(one)
    run(other)
    assert 0 < difference(weights(one), weights(other)) < 1e-4
    run(dataclasses.replace(one, speed=other.speed, stop_at_step=2))  # so a run may go on with the others


def test_the_seed_decides(one_device: TrainConfig, tmp_path: Path) -> None:
    again = dataclasses.replace(one_device, output=tmp_path / "again")
    other = dataclasses.replace(one_device, output=tmp_path / "other", seed=1)
    for config in (again, other):
        run(config)
    assert is_equal(weights(again), weights(one_device))
    assert difference(weights(other), weights(one_device)) > 0.1


# ------------------------------------------------------------------------------------------ interruption


@pytest.fixture(scope="module")
def every_step_logged(one_device: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The same run with a line of metrics for each step."""
    config = dataclasses.replace(one_device, output=tmp_path_factory.mktemp("logged") / "run", log_every_steps=1)
    run(config)
    return config


@pytest.mark.parametrize("stops", [(1,), (STEPS,), (5, 6, 11)], ids=["first-step", "end-of-epoch", "three-times"])
def test_a_run_in_pieces_gives_the_same_weights_bit_for_bit(
    every_step_logged: TrainConfig, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    whole, config = every_step_logged, dataclasses.replace(every_step_logged, output=tmp_path / "run")
    for stop in (*stops, None):
        run(dataclasses.replace(config, stop_at_step=stop))
        saved = checkpoint.load_resumable(config.folder / checkpoint.LAST)
        assert saved["step"] == (stop or 3 * STEPS)
    assert is_equal(weights(config), weights(whole))
    assert is_equal(weights(config, checkpoint.BEST), weights(whole, checkpoint.BEST))
    assert lines(config) == lines(whole)
    sessions = json.loads((config.folder / "manifest.json").read_text())["sessions"]
    assert [session["from_step"] for session in sessions] == [0, *stops]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_a_compiled_run_is_the_same_and_goes_on_without(
    one_device: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    config = dataclasses.replace(
        one_device, output=tmp_path / "run", speed=SpeedConfig(loader="memory", compile="default")
    )
    run(dataclasses.replace(config, stop_at_step=STEPS + 1))
    assert any((tmp_path / "cache").rglob("*.so"))  # something was compiled
    run(dataclasses.replace(config, speed=one_device.speed))
    ways = [session["step"] for session in json.loads((config.folder / "manifest.json").read_text())["sessions"]]
    assert [", compiled for fixed shapes" in way for way in ways] == [True, False]
    assert difference(weights(config), weights(one_device)) < 1e-11


def test_so_does_one_whose_views_grow(images: Path, tmp_path: Path) -> None:
    muon = OptimizerConfig(name="muon", base_learning_rate=0.05)
    whole, pieces = (
        settings(images, tmp_path / name, view_sizes=((16, 0.35), (24, 0.35)), optimizer=muon)
        for name in ("whole", "pieces")
    )
    run(whole)
    for stop in (STEPS - 1, STEPS, STEPS + 1, None):
        run(dataclasses.replace(pieces, stop_at_step=stop))
    assert is_equal(weights(pieces), weights(whole))
    always_full = settings(images, tmp_path / "full", optimizer=muon)
    run(always_full)
    assert difference(weights(always_full), weights(whole)) > 1e-3


@pytest.mark.distributed
def test_a_run_goes_on_with_another_number_of_devices(one_device: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(one_device, output=tmp_path / "run")
    for world_size, stop in ((2, 3), (1, 6), (4, None)):
        run(dataclasses.replace(config, stop_at_step=stop), world_size)
    assert difference(weights(config), weights(one_device)) < 1e-12


def test_lines_of_steps_after_the_checkpoint_are_written_once(one_device: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(one_device, output=tmp_path / "run")
    run(dataclasses.replace(config, stop_at_step=STEPS))
    kept = (config.folder / checkpoint.LAST).read_bytes()
    run(dataclasses.replace(config, stop_at_step=2 * STEPS))
    (config.folder / checkpoint.LAST).write_bytes(kept)  # as if killed before the second checkpoint
    run(config)
    # Reports also stand at each stop, here the ends of epochs, where the uninterrupted run has them too.
    assert lines(config) == lines(one_device)
    assert is_equal(weights(config), weights(one_device))


def test_a_stop_that_lies_behind_is_said_and_changes_nothing(
    one_device: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(one_device, output=tmp_path / "run", stop_at_step=5)
    run(config)
    before = weights(config)
    capsys.readouterr()
    run(dataclasses.replace(config, stop_at_step=2))
    assert "already past stop_at_step 2" in capsys.readouterr().out
    assert is_equal(weights(config), before)


def test_a_finished_run_is_left_alone(one_device: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(one_device, output=tmp_path / "run")
    shutil.copytree(one_device.folder, config.folder)
    rewritten = {"manifest.json", "config.json"}  # with this folder's name
    before = {path.name: path.read_bytes() for path in config.folder.iterdir() if path.name not in rewritten}
    run(config)
    assert {path.name: path.read_bytes() for path in config.folder.iterdir() if path.name in before} == before


# ------------------------------------------------------------------------------------------ what is measured and kept


def test_metrics_say_what_was_done(one_device: TrainConfig) -> None:
    steps = [line for line in read_metrics(one_device.folder) if line["kind"] == "step"]
    assert [line["step"] for line in steps] == [3, 4, 6, 8, 9, 12]
    for line in steps:
        assert line["epoch"] == pytest.approx(line["step"] / STEPS)
        expected = learning_rate_at(line["step"] - 1, peak=2.0 * BATCH / 256, total_steps=3 * STEPS, warmup_steps=STEPS)
        assert line["learning_rate"] == pytest.approx(expected)
        assert 0 < line["loss"] < math.log(2 * BATCH - 1) + 1
        assert line["images_per_second"] > 0
        assert -1 <= line["positive_similarity"] <= 1
        assert 0 < line["projection_spread"] <= 1.0001
    measured = [line for line in read_metrics(one_device.folder) if line["kind"] == "knn"]
    assert [line["step"] for line in measured] == [STEPS, 2 * STEPS, 3 * STEPS]


def test_the_best_checkpoint_is_the_epoch_with_the_best_validation_accuracy(one_device: TrainConfig) -> None:
    measured = [line for line in read_metrics(one_device.folder) if line["kind"] == "knn"]
    best = max(measured, key=lambda line: (line["knn_accuracy"], -line["step"]))  # the first of equals
    pretrained = checkpoint.load_pretrained(one_device.folder)
    assert (pretrained.step, pretrained.knn_accuracy) == (best["step"], best["knn_accuracy"])
    assert pretrained.config == one_device
    bank, queries = validation_split(NUM_IMAGES, 30)
    with open_images(one_device.data, backend="memory") as source:
        features = [evaluation.extract_features(pretrained.model.encoder, source, rows) for rows in (bank, queries)]
    accuracy = evaluation.knn_accuracy(*features, k=20, num_classes=10)
    assert accuracy == pytest.approx(best["knn_accuracy"])


def test_the_first_step_is_what_torch_computes(images: Path, tmp_path: Path) -> None:
    """One step by hand: plain SGD from the seed's weights on the first batch."""
    optimizer_config = OptimizerConfig(base_learning_rate=2.0)
    config = settings(images, tmp_path / "run", stop_at_step=1, optimizer=optimizer_config, view_sizes=())
    run(config)

    torch.manual_seed(config.seed)
    model = SimCLR(config.model, 32).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0 * BATCH / 256, weight_decay=0)
    facts = beton.load_facts(images)
    stored, _ = beton.read(images)
    plan = EpochPlan(np.arange(NUM_IMAGES), BATCH)
    index = next(iter(plan.batches(0)))
    mean, std = facts.normalisation
    views = two_views(
        torch.from_numpy(stored[index]),
        index,
        config.view_1,
        config.view_2,
        seed=0,
        epoch=0,
        size=32,
        mean=mean,
        std=std,
    )
    z = torch.nn.functional.normalize(model(torch.cat(views).double())[1], dim=1)
    similarity = (z @ z.T / 0.5).fill_diagonal_(-math.inf)
    positive = (torch.arange(2 * BATCH) + BATCH) % (2 * BATCH)
    loss = (torch.logsumexp(similarity, dim=1) - similarity[torch.arange(2 * BATCH), positive]).mean()
    torch.autograd.backward(loss)
    # weight decay on matrices only, added to the gradient
    for parameter in model.parameters():
        assert parameter.grad is not None
        if parameter.ndim > 1:
            parameter.grad += 5e-4 * parameter.detach()
    optimizer.step()
    assert difference(model.state_dict(), weights(config)) < 1e-12
    (line,) = lines(config)
    assert line["loss"] == pytest.approx(float(loss.detach()), rel=1e-12)


@pytest.mark.parametrize("why", ["the images have no labels", "all images are of one class", "num_validation is 0"])
def test_without_labels_the_last_epoch_stands_for_the_best(
    images: Path, tmp_path: Path, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {"num_validation": 0}
    if "images" in why:
        label = -1 if "no labels" in why else 0
        beton.write(tmp_path / "u.beton", draw(0, "train", 0, NUM_IMAGES)[0], np.full(NUM_IMAGES, label), source="test")
        changes = {"data": tmp_path / "u.beton"}
    config = settings(images, tmp_path / "run", epochs=2, **changes)
    run(config)
    assert f"kNN:        not measured, since {why};" in capsys.readouterr().out
    assert {line["kind"] for line in lines(config)} == {"step"}
    pretrained = checkpoint.load_pretrained(config.folder)
    assert (pretrained.epoch, pretrained.knn_accuracy) == (2, None)
    assert is_equal(weights(config, checkpoint.BEST), weights(config))


def test_a_number_of_validation_images_that_is_not_given_is_kept_as_a_number(images: Path, tmp_path: Path) -> None:
    config = settings(images, tmp_path / "run", num_validation=None, stop_at_step=1)
    run(config)
    assert checkpoint.load_resumable(config.folder / checkpoint.LAST)["config"].count('"num_validation": 10,') == 1
    run(dataclasses.replace(config, num_validation=10, stop_at_step=2))  # as a checkpoint of an earlier version has it
    run(dataclasses.replace(config, stop_at_step=3))
    with pytest.raises(checkpoint.CheckpointError, match="num_validation was 10 and is 11"):
        run(dataclasses.replace(config, num_validation=11))


def test_every_precision_of_a_cpu_trains(images: Path, tmp_path: Path) -> None:
    found, chosen = {}, {}
    for precision in ("auto", "bf16", "fp32"):
        config = settings(images, tmp_path / precision, precision=precision, epochs=1)
        run(config)
        found[precision] = weights(config)
        assert all(value.dtype != torch.float64 for value in found[precision].values())
        chosen[precision] = json.loads((config.folder / "manifest.json").read_text())["mixed_precision"]
    assert (chosen["bf16"], chosen["fp32"]) == ("bf16", "no")
    assert is_equal(found["auto"], found["fp32" if chosen["auto"] == "no" else "bf16"])
    # bfloat16's rounding has moved the weights by 8e-2 of their norm by now; float32's, against float64, by 6e-6.
    assert difference(found["bf16"], found["fp32"]) > 1e-3


def test_collapse_measures() -> None:
    torch.manual_seed(0)
    everywhere = torch.randn(4000, 16)
    one_point = torch.ones(4000, 16)
    similarity, spread = collapse_measures(everywhere, everywhere).tolist()
    assert (similarity, spread) == (pytest.approx(1), pytest.approx(1, abs=0.02))
    similarity, spread = collapse_measures(one_point, -one_point).tolist()
    assert (similarity, spread) == (pytest.approx(-1), pytest.approx(0, abs=1e-6))


def test_tensorboard_gets_all_that_the_metrics_have_once(images: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = settings(images, tmp_path / "run", epochs=2, tracker="tensorboard", name="mine")
    run(dataclasses.replace(config, stop_at_step=STEPS))
    run(config)
    tracked: list[tuple[str, int, float]] = []
    for path in (config.folder / "mine-seed0").glob("events.*"):  # named as the run is
        events = accumulator.EventAccumulator(str(path)).Reload()
        for name in events.Tags()["scalars"]:
            tracked += [(name, event.step, event.value) for event in events.Scalars(name)]
    written = [
        (name, line["step"], float(value))
        for line in read_metrics(config.folder)
        for name, value in line.items()
        if name not in {"kind", "step"}
    ]
    assert {name for name, *_ in written} >= {"gradient_norm", "projection_spread", "knn_accuracy", "seconds"}
    for seen, meant in zip(sorted(tracked), sorted(written), strict=True):
        assert seen[:2] == meant[:2]
        assert seen[2] == pytest.approx(meant[2])


# ------------------------------------------------------------------------------------------ refusals


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    one_device: TrainConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(one_device, output=tmp_path / "run")
    run(dataclasses.replace(config, stop_at_step=5))
    last = config.folder / checkpoint.LAST
    saved = checkpoint.load_resumable(last)
    saved["optimizer"]["state"][0]["momentum_buffer"].fill_(math.nan)  # step 6 spoils the weights
    checkpoint.save_atomically(last, saved)
    good = last.read_bytes()
    with pytest.raises(DivergedError, match=r"the gradient is not finite at step 7; this rank's loss is nan") as stop:
        run(config)
    assert f"the last good checkpoint is {last}. A lower --optimizer.base-learning-rate" in str(stop.value)
    assert last.read_bytes() == good
    assert max(line["step"] for line in lines(config)) == 6


def test_weights_that_are_not_finite_are_not_saved(one_device: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(one_device, output=tmp_path / "run", stop_at_step=3)
    run(config)
    last = config.folder / checkpoint.LAST
    saved = checkpoint.load_resumable(last)
    saved["optimizer"]["state"][0]["momentum_buffer"].fill_(math.nan)
    checkpoint.save_atomically(last, saved)
    good = last.read_bytes()
    with pytest.raises(DivergedError, match=r"weights are not finite after step 4 .* may help"):
        run(dataclasses.replace(config, stop_at_step=4))
    assert last.read_bytes() == good


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 2}, "world_size is 2, but the number of processes that take part is 1"),
        (
            {"global_batch_size": 101, "num_validation": 100},
            "has 100 images: they do not fill one batch of .* 101; num_validation 100 leaves .* Use --global-batch",
        ),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"resume": "must"}, "resume is must, but there is no"),
        ({"data": Path("nowhere.beton")}, "nowhere.beton"),
        ({"data": Path()}, "is a folder"),
        (
            {"view_sizes": ((16, 0.5),), "model": ModelConfig(encoder="vit_tiny_patch16_224", projection_dim=8)},
            "cannot take 16x16 images",
        ),
    ],
)
def test_what_cannot_run_is_refused_at_once(
    images: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = settings(images, tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=message):
        run(config)
    assert not config.folder.exists()


def test_images_that_are_not_square_are_refused(tmp_path: Path) -> None:
    wide = np.random.default_rng(0).integers(0, 256, (40, 32, 48, 3), dtype=np.uint8)
    beton.write(tmp_path / "w.beton", wide, np.arange(40) % 2, classes=["a", "b"], source="test")
    with pytest.raises(ValueError, match="32 x 48 pixels; pretraining needs square ones"):
        run(settings(tmp_path / "w.beton", tmp_path / "run"))


@pytest.mark.distributed
def test_a_batch_that_cannot_be_shared_is_refused_with_sizes_that_can(images: Path, tmp_path: Path) -> None:
    config = settings(images, tmp_path / "run", global_batch_size=23)
    with pytest.raises(RankError, match=r"23 is not divisible by the 2 processes\. Use --global-batch-size 22 or 24"):
        run(config, 2)


def test_another_run_in_the_folder_is_neither_continued_nor_touched(one_device: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(one_device.folder, folder)
    here = dataclasses.replace(one_device, output=folder)
    beton.write(
        tmp_path / "other.beton", *draw(1, "train", 0, NUM_IMAGES), classes=list(CLASSES), source="other shapes"
    )
    facts = beton.load_facts(one_device.data)
    for name, changes in (
        ("bright", {"channel_mean": (0.1, 0.2, 0.3)}),
        ("swapped", {"classes": facts.classes[::-1]}),
    ):
        shutil.copy(one_device.data, tmp_path / f"{name}.beton")
        beton.save_facts(tmp_path / f"{name}.beton", dataclasses.replace(facts, **changes))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused = [
        (dataclasses.replace(here, seed=7), "seed was 0 and is 7"),
        (dataclasses.replace(here, epochs=9), "epochs was 3 and is 9"),
        (
            dataclasses.replace(here, optimizer=dataclasses.replace(here.optimizer, momentum=0.5)),
            "optimizer.momentum was 0.9 and is 0.5",
        ),
        (dataclasses.replace(here, data=tmp_path / "other.beton"), "is of a run on other images"),
        (dataclasses.replace(here, data=tmp_path / "bright.beton"), "other images.* channel_mean differs"),
        (dataclasses.replace(here, data=tmp_path / "swapped.beton"), "other images.* classes differs"),
        (dataclasses.replace(here, resume="never"), "resume is never, but .* holds a run"),
    ]
    for config, message in refused:
        with pytest.raises(ValueError, match=message):
            run(config)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_is_named_as_allowed_may_change(
    one_device: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(one_device, output=tmp_path / "run", stop_at_step=5)
    run(config)
    beton.write(
        tmp_path / "other.beton", *draw(1, "train", 0, NUM_IMAGES), classes=list(CLASSES), source="other shapes"
    )
    changed = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, momentum=0.5, weight_decay=0.0), stop_at_step=6
    )
    with pytest.raises(ValueError, match=r"momentum was 0.9 and is 0.5; .*--allow-changed optimizer.momentum optim"):
        run(changed)
    with pytest.raises(ValueError, match=r"optimizer.weight_decay was 0.0005 and is 0.0. Give"):
        run(dataclasses.replace(changed, allow_changed=("optimizer.momentum",)))
    run(dataclasses.replace(changed, allow_changed=("optimizer", "data"), data=tmp_path / "other.beton"))
    shown = capsys.readouterr().out
    assert "changed:    optimizer.momentum was 0.9 and is 0.5 (--allow-changed)" in shown
    assert "changed:    other images" in shown
    run(dataclasses.replace(changed, data=tmp_path / "other.beton", stop_at_step=7))  # it is that run now
    with pytest.raises(ValueError, match="allow_changed is 'optimiser', expected the name of a setting"):
        dataclasses.replace(config, allow_changed=("optimiser",))


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(one_device: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(one_device, output=tmp_path / "run", stop_at_step=3)
    run(config)
    (config.folder / checkpoint.LAST).unlink()
    with pytest.raises(ValueError, match=r"status.json tells of a checkpoint of step 3, but there is none"):
        run(config)


def test_a_damaged_checkpoint_is_passed_over_and_said(
    one_device: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(one_device, output=tmp_path / "run")
    run(dataclasses.replace(config, stop_at_step=2 * STEPS))
    with (config.folder / checkpoint.LAST).open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    run(config)
    shown = capsys.readouterr().out
    assert re.search(r"passed over: \S*checkpoint_last.pt is damaged .*in it has a wrong checksum", shown)
    assert f"resuming:   after step {STEPS} of" in shown
    assert is_equal(weights(config), weights(one_device))
    assert lines(config) == lines(one_device)


def test_copies_that_srun_started_side_by_side_are_noticed(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ValueError, match="srun started 4 tasks, but this process belongs to a group of 1"):
        require_world_size(settings(images, tmp_path), 1)
    require_world_size(settings(images, tmp_path), 4)
    require_world_size(settings(images, tmp_path), 8)  # a launcher for each task


# ------------------------------------------------------------------------------------------ command line


def test_the_command_line_shows_every_derived_number(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["demo", "--data", images, "--output", tmp_path / "run", "--model.encoder", "small_resnet_w8"]
    options += ["--epochs", 2, "--global-batch-size", BATCH, "--num-validation", 30, "--optimizer.warmup-epochs", 1]
    options += ["--recompute", "--loader", "memory", "--optimizer.base-learning-rate", 0.5]
    type_command(monkeypatch, *options)
    shown = capsys.readouterr().out
    for line in (
        "per_device_batch_size = global_batch_size / world_size = 24 / 1 = 24 source images, 48 views",
        "steps_per_epoch = floor(num_images / global_batch_size) = floor(100 / 24) = 4; 4 images sit out",
        "recompute:  the encoder's blocks, again in the backward pass",
        "loss:       nt_xent: tiled (one device: half the matrix, which is symmetric), torch kernels",
        "total_steps = epochs * steps_per_epoch = 2 * 4 = 8",
        "warmup_steps = warmup_epochs * steps_per_epoch = 1 * 4 = 4",
        "peak_learning_rate = base_learning_rate * global_batch_size / 256 = 0.5 * 24 / 256 = 0.046875",
        "parameters: encoder small_resnet_w8",
        "weight decay",
        "loader:     memory",
        "validation kNN",
    ):
        assert line in shown, line
    type_command(monkeypatch, *options)
    assert "finished:   nothing is left to do" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [(["demo", "--epoch", "3"], "--epoch"), (["cifar11"], "cifar11")])
def test_bad_words_on_the_command_line(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        type_command(monkeypatch, *words)
    assert ended.value.code == 2
    assert message in "".join(capsys.readouterr())


def test_images_that_are_not_there_end_the_process_without_a_traceback() -> None:
    done = run_python("train_simclr.py", "demo", "--data", "nowhere.beton")
    assert done.returncode == 1
    assert "train_simclr.py: " in done.stderr
    assert "Traceback" not in done.stderr
