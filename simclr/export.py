"""A pretrained encoder as a safetensors file, for other programs: weights under timm's names, and what they expect.

    python -m simclr.export results/cifar10-simclr-100-seed0        # writes encoder.safetensors into it

Nothing is executed when it is read. Its metadata has the encoder's name, the side of the images, mean and standard
deviation per channel, where the weights come from, and the SHA-256 of their bytes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
import tyro
from safetensors.torch import load, save
from torch import Tensor, nn

from simclr import parts
from simclr.models import Stem, make_encoder
from simclr.run import checkpoint, files, host
from simclr.run.checkpoint import CheckpointError, Pretrained
from simclr.run.files import PathLike

NAME = "encoder.safetensors"


@dataclass(frozen=True)
class Options:
    """What to export, and where to."""

    run: tyro.conf.Positional[Path]
    """A run's folder, which stands for its simclr_best_epoch.pt, or a checkpoint."""
    output: Path | None = None
    """Default: encoder.safetensors beside the checkpoint."""
    parts: Path | None = None
    """The file that the run was trained with, if it has parts of its own; it is executed."""


def export_encoder(pretrained: Pretrained, path: PathLike) -> None:
    """Write the encoder's weights and buffers.

    Args:
        pretrained: What :func:`simclr.run.checkpoint.load_pretrained` gives.
        path: Where to; at every moment it is the old file or the whole new one.

    Raises:
        CheckpointError: If it cannot be written.
    """
    weights = {name: value.contiguous() for name, value in pretrained.model.encoder.state_dict().items()}
    mean, std = pretrained.facts.normalisation
    model = pretrained.config.model
    metadata = {
        "encoder": model.encoder,
        "stem": model.stem,
        "image_size": str(pretrained.facts.height),
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        "pretrained_on": pretrained.facts.source,
        "objective": pretrained.config.loss.name,
        "step": str(pretrained.step),
        "sha256": _sha256(weights),
    }
    with checkpoint.whole_file(path) as file:
        file.write(save(weights, metadata))


@dataclass(frozen=True)
class Encoder:
    """An encoder that was exported."""

    encoder: nn.Module
    """In eval mode: normalised images (b, 3, H, W) -> representation (b, D)."""
    metadata: dict[str, str]


def load_encoder(path: PathLike, device: torch.device | str = "cpu") -> Encoder:
    """Load what :func:`export_encoder` wrote.

    Raises:
        CheckpointError: If the file is missing, damaged, or not of this project.
    """
    try:
        content = Path(path).read_bytes()
        weights = load(content)
        with safetensors.safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    missing = {"encoder", "stem", "image_size", "sha256"} - set(metadata)
    if missing:
        raise CheckpointError(f"{path} was not written by simclr.export: its metadata lacks {sorted(missing)}")
    if _sha256(weights) != metadata["sha256"]:
        raise CheckpointError(f"{path} is damaged: its weights do not have the SHA-256 that it names; export it again")
    try:
        stem: Stem = metadata["stem"]  # type: ignore[assignment]  # an unknown one is refused by what follows
        encoder = make_encoder(metadata["encoder"], stem, int(metadata["image_size"]))
        encoder.load_state_dict(weights, strict=True)
    except (ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit this version of the code: {error}") from error
    return Encoder(encoder.to(device).eval(), metadata)


def _sha256(weights: Mapping[str, Tensor]) -> str:
    """Return the digest of names, shapes, types and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@files.explain_refusals()
def main(options: Options) -> Path:
    """Export, and return where to."""
    if options.parts is not None:
        parts.load(options.parts)
    pretrained = checkpoint.load_pretrained(options.run)
    path = options.output or pretrained.path.with_name(NAME)
    export_encoder(pretrained, path)
    print(f"{path}: {pretrained.config.model.encoder}, {path.stat().st_size:,} bytes, of step {pretrained.step}")
    return path


if __name__ == "__main__":
    host.outlive_readers()
    try:
        main(tyro.cli(Options, prog="python -m simclr.export", description=__doc__))
    except ValueError as error:
        sys.exit(f"simclr.export: {error}")
