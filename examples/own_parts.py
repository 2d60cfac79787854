"""An encoder, a projector, an objective and views that this project does not have. See docs/own_parts.md.

python train_simclr.py demo --name own --parts examples/own_parts.py --model.encoder plain_net \
    --model.projector one_layer --loss.name align_uniform --loss.settings uniformity 0.5 --augmentation cutout
python linear_probe.py --run results/own-seed0 --parts examples/own_parts.py
"""

import torch
from timm.models import register_model
from torch import Tensor, nn

from simclr.models import ModelConfig
from simclr.parts import register_objective, register_projector, register_views
from simclr.unit_length import unit_rows
from simclr.views import View


@register_model
def plain_net(num_classes: int = 0, **of_timm: object) -> nn.Module:
    """Four convolutions: (b, 3, H, W) -> (b, 128)."""
    layers: list[nn.Module] = []
    for width_in, width in ((3, 16), (16, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(width_in, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@register_projector
def one_layer(representation_dim: int, config: ModelConfig) -> nn.Module:
    """A linear map: (b, D) -> (b, d)."""
    return nn.Linear(representation_dim, config.projection_dim)


@register_objective
def align_uniform(z1: Tensor, z2: Tensor, uniformity: float = 1.0) -> Tensor:
    """Alignment and uniformity on the sphere (Wang and Isola 2020, arXiv:2005.10242, section 4)."""
    z1, z2 = unit_rows(z1), unit_rows(z2)
    align = (z1 - z2).square().sum(dim=1).mean()
    uniform = torch.stack([torch.pdist(z).square().mul(-2).exp().mean().log() for z in (z1, z2)]).mean()
    return align + uniformity * uniform


@register_views
def cutout(image: Tensor, view: View) -> Tensor:
    """The standard view with a gray square somewhere (DeVries and Taylor 2017, arXiv:1708.04552)."""
    pixels = view.standard(image)  # (b, 3, S, S), in [0, 1]
    corner = view.uniforms(2, image.device) * view.size * 3 / 4  # (b, 2)
    place = torch.arange(view.size, device=image.device)
    inside = (place >= corner[..., None]) & (place < corner[..., None] + view.size / 4)  # (b, 2, S): rows, columns
    return torch.where((inside[:, 0, :, None] & inside[:, 1, None, :])[:, None], 0.5, pixels)
