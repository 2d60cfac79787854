"""A residual network of three basic blocks, small enough to be trained on CPUs.

It is timm's ResNet with ``layers=(1, 1, 1)``: names and order of the weights, initial values and outputs to the bit.
It is written out so that a run that needs no other encoder does not import timm, and with it torchvision and
torch.compile, which take 3.3 of the 5.5 s in which a process starts.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

STEM_CHANNELS = 64


class SmallResNet(nn.Module):
    """A stem, three stages of one basic block at widths N, 2N, 4N, the mean over the last map: (b, 3, H, W) -> (b, D).

    Args:
        width: N, channels of the first stage.
        representation_dim: D. Where it is given, a 1x1 convolution widens the last map to it, as MobileNets end: a
            linear classifier reads more from a wide representation, and on maps this small that costs little. None: 4N.

    Source:
        He et al. 2016, arXiv:1512.03385, figure 5 (left). Initialised as section 3.2 of arXiv:1502.01852 (fan out); the
        last normalisation of a block starts at 1, not at 0, which helps deep networks and holds this one back.
    """

    def __init__(self, width: int, representation_dim: int | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM_CHANNELS, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        # Sequences, as other parts of this project look for blocks in them
        self.layer1 = nn.Sequential(BasicBlock(STEM_CHANNELS, width, stride=1))
        self.layer2 = nn.Sequential(BasicBlock(width, 2 * width, stride=2))
        self.layer3 = nn.Sequential(BasicBlock(2 * width, 4 * width, stride=2))
        initialise(self)
        self.layer4 = nn.Identity() if representation_dim is None else widening(4 * width, representation_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Encode images, (b, 3, H, W)."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(2, 3))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a way past them, which is a 1x1 convolution where size or width changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        shortcut = None
        if stride != 1 or channels != width:
            shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU(inplace=True)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, H, W) -> (b, width, H / stride, W / stride)."""
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        out: Tensor = self.act2(y)
        return out


def widening(channels: int, width: int) -> nn.Sequential:
    """Return a 1x1 convolution to ``width`` channels, normalisation and ReLU."""
    return initialise(
        nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    )


Module = TypeVar("Module", bound=nn.Module)


def initialise(module: Module) -> Module:
    """Draw the weights of all convolutions, each by its fan out (He et al. 2015); return the module."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
    return module
