"""Own parts: the example's encoder, projector, objective and views, through training, resuming and measuring."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import linear_probe
import train_simclr
from simclr import export, losses, parts
from simclr.command_line import parse_train_config
from simclr.config import LossConfig, ProbeConfig, SpeedConfig, TrainConfig, to_json
from simclr.models import ModelConfig, SimCLR, make_encoder
from simclr.run import checkpoint
from simclr.run.opening import statement
from simclr.views import View, ViewSpec, own_view, require_function_of_the_image, sample_parameters, two_views
from tests.helpers import ROOT
from tests.runs import is_equal, train_on, weights, write_shapes

EXAMPLE = ROOT / "examples" / "own_parts.py"
UNIT: dict[str, Any] = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def pretrain(rank: int, world_size: int, config: TrainConfig) -> None:
    train_simclr.main(config)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of six steps, on one device, with every part of the example."""
    folder = tmp_path_factory.mktemp("own")
    for name in ("train", "test"):
        write_shapes(folder / f"{name}.beton", 48, name)
    shutil.copy(EXAMPLE, folder / "mine.py")
    parts.load(folder / "mine.py")
    config = TrainConfig(
        data=folder / "train.beton",
        output=folder / "one",
        parts=folder / "mine.py",
        epochs=2,
        global_batch_size=16,
        model=ModelConfig(encoder="plain_net", projector="one_layer", projection_dim=8),
        loss=LossConfig(name="align_uniform", settings=(("uniformity", 0.5),)),
        augmentation="cutout",
        precision="fp64",
        num_validation=10,
        speed=SpeedConfig(loader="memory"),
    )
    train_on(1, pretrain, config)
    return config


@pytest.mark.distributed
def test_two_devices_give_the_weights_of_one(config: TrainConfig, tmp_path: Path) -> None:
    two = dataclasses.replace(config, output=tmp_path / "two", world_size=2)
    train_on(2, pretrain, two)
    one = weights(config)
    assert "encoder.0.weight" in one
    for name, value in weights(two).items():
        torch.testing.assert_close(value, one[name], rtol=1e-9, atol=1e-12)


def test_a_resumed_run_has_the_same_bits(config: TrainConfig, tmp_path: Path) -> None:
    resumed = dataclasses.replace(config, output=tmp_path / "run", stop_at_step=2)
    train_on(1, pretrain, resumed)
    train_on(1, pretrain, dataclasses.replace(resumed, stop_at_step=None))
    assert is_equal(weights(resumed), weights(config))


def test_the_run_keeps_the_file_and_goes_on_only_with_that(config: TrainConfig, tmp_path: Path) -> None:
    kept = config.folder / checkpoint.PARTS
    assert kept.read_bytes() == EXAMPLE.read_bytes()
    changed = tmp_path / "mine.py"
    changed.write_text("from simclr.parts import register_projector\n")
    other = dataclasses.replace(config, parts=changed)
    with pytest.raises(ValueError, match=rf"mine\.py is not what this run was trained with so far, which is {kept}"):
        train_on(1, pretrain, other)
    assert statement(other, EXAMPLE)["the code"] != statement(config, EXAMPLE)["the code"]  # ranks must agree


def test_the_example_is_measured_and_exported(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = ProbeConfig(config.folder, parts=EXAMPLE, baselines=False, epochs=2, learning_rates=(0.1,))
    report = linear_probe.main(dataclasses.replace(probe, weight_decays=(0.0,)))
    text = report.with_suffix(".md").read_text()
    assert "align_uniform, of the run's own parts, uniformity 0.5" in text
    exported = export.main(export.Options(config.folder, parts=EXAMPLE))
    card = (exported / "README.md").read_text()
    assert "- objective: align_uniform, of the run's own parts, uniformity 0.5\n" in card
    encoder = export.load_encoder(exported).encoder
    assert encoder(torch.rand(2, 3, 32, 32)).shape == (2, 128)

    # Without the file: one line, which names it
    monkeypatch.setattr(parts.OBJECTIVES, "_own", {})
    for load in (checkpoint.load_pretrained, checkpoint.load_classifier):
        where = config.folder if load is checkpoint.load_pretrained else report.parent
        with pytest.raises(
            checkpoint.CheckpointError, match=rf"copy in the run's folder, first: --parts {config.parts}, or"
        ) as refusal:
            load(where)
        assert "\n" not in str(refusal.value)


# ----------------------------------------------------------------------------------------------- each kind of part


def test_an_own_encoder_keeps_its_first_layers_for_small_images() -> None:
    parts.load(EXAMPLE)
    first = make_encoder("plain_net", "auto", 32).get_submodule("0")
    assert isinstance(first, nn.Conv2d)
    assert first.kernel_size == (3, 3)
    assert first.stride == (2, 2)


def test_an_own_objective_gets_the_settings_and_the_whole_batch() -> None:
    parts.load(EXAMPLE)
    z1, z2 = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True).unbind()
    unit = [z.detach() / z.detach().norm(dim=1, keepdim=True) for z in (z1, z2)]
    align = sum(float((a - b) @ (a - b)) for a, b in zip(*unit, strict=True)) / 6
    uniform = 0.0
    for z in unit:
        pairs = [float(torch.exp(-2 * (z[i] - z[j]) @ (z[i] - z[j]))) for i in range(6) for j in range(i)]
        uniform += np.log(np.mean(pairs)) / 2
    for weight in (0.0, 3.0):
        found = losses.own_objective("align_uniform", z1, z2, {"uniformity": weight})
        assert found.item() == pytest.approx(align + weight * uniform, rel=1e-12)


@pytest.mark.parametrize(
    ("objective", "what"),
    [
        (lambda z1, z2: z1.sum(dim=1), r"a tensor of shape \(2,\)"),
        (lambda z1, z2: z1.detach().sum(), r"a tensor of shape \(\)"),
        (lambda z1, z2: 1.0, "a float"),
    ],
)
def test_an_objective_returns_a_scalar_with_a_gradient(
    monkeypatch: pytest.MonkeyPatch, objective: Callable[..., Any], what: str
) -> None:
    monkeypatch.setitem(parts.OBJECTIVES._own, "wrong", objective)
    with pytest.raises(ValueError, match=f"the objective wrong must return a scalar .* returned {what}"):
        losses.own_objective("wrong", torch.rand(2, 3, requires_grad=True), torch.rand(2, 3), {})


def test_a_projector_takes_and_gives_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: list[tuple[nn.Module, str]] = [
        (nn.Linear(3, 2), "cannot take"),
        (nn.Unflatten(1, (4, 8)), r"returns shape \(2, 4, 8\)"),
    ]
    for module, words in wrong:
        monkeypatch.setitem(parts.PROJECTORS._own, "wrong", functools.partial(given, module))
        with pytest.raises(ValueError, match=f"the projector wrong {words}"):
            SimCLR(ModelConfig(encoder="small_resnet_w8", projector="wrong"), 16)


def test_own_views_are_the_standard_ones_and_a_square() -> None:
    parts.load(EXAMPLE)
    image = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    rows = {"seed": 3, "epoch": 1, "size": 16, **UNIT}
    own = two_views(image, np.arange(4), ViewSpec(), ViewSpec(), augmentation="cutout", **rows)
    standard = two_views(image, np.arange(4), ViewSpec(), ViewSpec(), **rows)
    for left, right in zip(own, standard, strict=True):
        differs = (left != right).any(dim=1)
        assert (left[differs[:, None].expand_as(left)] == 0.5).all()
        assert (differs.sum(dim=(1, 2)) >= 9).all()  # a square of 4 x 4, or 3 x 3 where pixels were gray
    assert not torch.equal(own[0] == 0.5, own[1] == 0.5)
    shifted = own_view(
        "cutout",
        image,
        View(np.arange(4), 3, 1, 1, ViewSpec(), 16),
        mean=(0.1, 0.2, 0.3),
        std=(2.0, 2.0, 2.0),
    )
    torch.testing.assert_close(shifted, (own[0] - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / 2)


def test_uniforms_are_a_function_of_seed_epoch_image_and_view() -> None:
    def view(seed: int = 1, epoch: int = 2, number: int = 1, images: tuple[int, ...] = (0, 7)) -> Tensor:
        return View(np.array(images), seed, epoch, number, ViewSpec(), 8).uniforms(3)

    assert torch.equal(view(), view())
    assert torch.equal(view(images=(7,))[0], view()[1])
    different = [view(), view(seed=2), view(epoch=3), view(number=2), view(images=(1, 8))]
    assert len({tuple(u.flatten().tolist()) for u in different}) == 5
    many = View(np.arange(20_000), 0, 0, 1, ViewSpec(), 8).uniforms(2)
    assert 0 <= float(many.min()) < 1e-3
    assert 1 - 1e-3 < float(many.max()) < 1
    assert torch.allclose(many.mean(dim=0), torch.tensor(0.5), atol=0.01)
    flips = sample_parameters(
        ViewSpec(flip_probability=0.5), np.arange(20_000), seed=0, epoch=0, view=1, height=8, width=8
    ).flip
    assert abs(np.corrcoef(flips, many[:, 0].numpy())[0, 1]) < 0.03  # other numbers than the standard operations'


def given(module: nn.Module, representation_dim: int, config: ModelConfig) -> nn.Module:
    return module


def mixed(image: Tensor, view: View) -> Tensor:
    pixels = view.standard(image)
    return (pixels + pixels.roll(1, dims=0)) / 2


def unrepeatable(image: Tensor, view: View) -> Tensor:
    return view.standard(image) * torch.rand(len(image), 1, 1, 1)


@pytest.mark.parametrize("function", [mixed, unrepeatable])
def test_views_that_would_depend_on_the_number_of_devices_are_refused(
    monkeypatch: pytest.MonkeyPatch, function: Callable[[Tensor, View], Tensor]
) -> None:
    monkeypatch.setitem(parts.VIEWS._own, "wrong", function)
    with pytest.raises(ValueError, match="the views wrong of an image differ from call to call, or with the other"):
        require_function_of_the_image("wrong", ViewSpec(), size=16, stored=16)


@pytest.mark.parametrize("scale", [255.0, -1.0, float("nan")])
def test_views_beyond_0_to_1_are_refused(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    monkeypatch.setitem(parts.VIEWS._own, "wrong", lambda image, view: view.standard(image) * scale)
    with pytest.raises(ValueError, match=r"the views wrong must be pixels in \[0, 1\], and reach from"):
        require_function_of_the_image("wrong", ViewSpec(), size=16, stored=16)


def test_views_have_the_size_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parts.VIEWS._own, "wrong", lambda image, view: image.permute(0, 3, 1, 2).float())
    with pytest.raises(ValueError, match=r"the views wrong must be floating point \(3, 3, 8, 8\), and are .*16, 16\)"):
        require_function_of_the_image("wrong", ViewSpec(), size=8, stored=16)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss": LossConfig(name="allign")},
            "loss.name is 'allign', expected one of nt_xent, barlow_twins, .*--parts",
        ),
        (
            {"model": ModelConfig(projector="big")},
            "model.projector is 'big', expected one of simclr2, simclr3, barlow3",
        ),
        ({"model": ModelConfig(encoder="plain_nett")}, "no model named 'plain_nett'; near: .*plain_net.*--parts"),
        ({"augmentation": "cutmix"}, "augmentation is 'cutmix', expected one of standard, cutout"),
        ({"loss": LossConfig(settings=(("margin", 1.0),))}, "names 'margin', but the objective nt_xent has none"),
        (
            {"loss": LossConfig(name="align_uniform", settings=(("margin", 1.0),))},
            "names 'margin', but the objective align_uniform has uniformity",
        ),
        (
            {"loss": LossConfig(name="lost"), "parts": ROOT / "train_simclr.py"},
            "If .*train_simclr.py registers it, load that file",
        ),
    ],
)
def test_unknown_names_are_refused_when_the_configuration_is_made(changes: dict[str, Any], message: str) -> None:
    parts.load(EXAMPLE)
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ny = x / 0\n", r"line 2, ZeroDivisionError: division by zero"),
        ("def f(:\n", r"SyntaxError"),
        (
            "from simclr.parts import *\n@register_objective\ndef nt_xent(a, b): ...\n",
            "another objective named nt_xent",
        ),
        ("from simclr.parts import *\n@register_views\ndef cutout(a, b): ...\n", "another views named cutout"),
        ("from timm.models import register_model\n@register_model\ndef resnet18(**o): ...\n", "Overwriting resnet18"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    parts.load(EXAMPLE)
    before = timm.models.model_entrypoint("resnet18")
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"broken\.py cannot be loaded: .*{message}"):
        parts.load(path)
    assert timm.models.model_entrypoint("resnet18") is before


def test_the_command_line_loads_the_file_before_it_reads_the_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "more.py"
    path.write_text("from simclr.parts import register_objective\n@register_objective\ndef more(z1, z2): ...\n")
    config = parse_train_config(["demo", "--parts", str(path), "--loss.name", "more"])
    assert (config.parts, config.loss.name) == (path, "more")
    (tmp_path / "config.json").write_text(to_json(config))
    assert parse_train_config(["--config", str(tmp_path / "config.json"), "--parts", str(path)]) == config
    with pytest.raises(SystemExit):
        parse_train_config(["demo", f"--parts={tmp_path / 'gone.py'}"])
    assert "gone.py cannot be read: No such file" in capsys.readouterr().err


def test_the_page_shows_the_example_as_it_is() -> None:
    page = (ROOT / "docs" / "own_parts.md").read_text(encoding="utf-8")
    shown = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(shown) >= 4
    for block in shown:
        assert block in EXAMPLE.read_text(encoding="utf-8")
