"""A pretrained encoder for other programs: one folder that timm, torch, ONNX runtimes and the Hugging Face hub take.

    python -m simclr.export results/cifar10-simclr-100-seed0     # writes results/cifar10-simclr-100-seed0/encoder

model.safetensors    the weights under timm's names, for normalised images; nothing is executed when they are read
encoder.pt2          the encoder as a program (torch.export): uint8 images in, representations out
encoder.onnx         the same for ONNX runtimes; needs the packages of the extra "export"
config.json          what the files take and give, and what timm reads
README.md            the model card: what was measured and how, and lines that load each file, all of which run

Every file is compared with the encoder before the folder takes its name.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import timm
import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import load, save
from torch import Tensor, nn

from simclr import files, parts, system
from simclr.evaluation import Normalisation
from simclr.export import model_card
from simclr.export.timm_alone import TimmAlone, timm_alone
from simclr.files import PathLike
from simclr.models import Stem, make_encoder
from simclr.run import checkpoint
from simclr.run.checkpoint import CheckpointError, Pretrained
from simclr.schema import Size

FOLDER = "encoder"
WEIGHTS, PROGRAM, ONNX, CONFIG, CARD = "model.safetensors", "encoder.pt2", "encoder.onnx", "config.json", "README.md"
_FILES = {WEIGHTS, PROGRAM, ONNX, CONFIG, CARD}
_ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_INSTALL = 'pip install "simclr[export]", or pip install ' + " ".join(_ONNX_PACKAGES)
# Other kernels sum in another order. Of the largest number in a representation.
_TOLERANCE = 1e-4
_METADATA = {"encoder", "stem", "image_size", "read_at", "representation_dim", "mean", "std", "encoding"}
_METADATA |= {"jpeg_quality", "pretrained_on", "step", "sha256"}


@dataclass(frozen=True)
class Options:
    """What to export, and where to."""

    run: tyro.conf.Positional[Path]
    """A run's folder, which stands for its simclr_best_epoch.pt, or a checkpoint."""
    output: Path | None = None
    """The folder to write. Default: encoder, beside the checkpoint. An earlier export there is replaced."""
    program: bool = True
    """Whether to write encoder.pt2. Without it there is no encoder.onnx either, which is made from it."""
    onnx: Literal["auto", "yes", "no"] = "auto"
    """Whether to write encoder.onnx. auto: if its packages are installed; it is said if they are not."""
    image_size: Size | None = None
    """Side in pixels at which the encoder reads images, such as linear_probe.py --image-sizes finds: encoder.pt2 and
    encoder.onnx take images of the stored size and resize them inside. Default: as stored."""
    license: str | None = None
    """Of the weights, for the model card, as the Hugging Face hub writes it: mit, cc-by-4.0 and the like."""
    parts: Path | None = None
    """The file that the run was trained with, if it has parts of its own; it is executed."""


class ImageEncoder(nn.Module):
    """Stored pixels -> representation, with the normalisation inside: what the program and the ONNX file compute.

    Args:
        encoder: Normalised images (b, 3, S, S) -> (b, D).
        normalisation: Mean and standard deviation per channel.
        size: Side S that images are resized to. None: as they come.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: nn.Module, normalisation: Normalisation, size: int | None = None) -> None:
        super().__init__()
        self.encoder, self.size = encoder, size
        for name, values in zip(("mean", "std"), normalisation, strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Encode RGB images, uint8 (b, H, W, 3) -> float32 (b, D), as simclr.views.plain_view brings them about."""
        x = (image.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        if self.size is not None and x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=self.size < x.shape[2])
        representation: Tensor = self.encoder(x)
        return representation


def export(pretrained: Pretrained, options: Options) -> Path:
    """Write the folder, whole or not at all; an earlier export in its place goes when the new one is complete.

    Args:
        pretrained: What :func:`simclr.run.checkpoint.load_pretrained` gives.
        options: What to write, and where.

    Returns:
        The folder.

    Raises:
        CheckpointError: If the folder holds anything else, the encoder cannot be made a program, a file does not give
            the encoder's numbers, or ONNX is asked for and its packages are missing.
    """
    folder = options.output or pretrained.path.with_name(FOLDER)
    _require_own(folder)
    lacking = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if options.onnx == "yes" and (lacking or not options.program):
        needs = f"{', '.join(lacking)}: {_INSTALL}" if lacking else "the program too: leave --no-program out"
        raise CheckpointError(f"{ONNX} needs {needs}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    encoder, facts = pretrained.model.encoder.cpu().eval(), pretrained.facts
    if options.image_size is not None:
        pretrained.model.require_size(options.image_size)
    about, metadata = _about(pretrained, options.image_size), metadata_of(pretrained, options.image_size)
    noise = torch.randint(0, 256, (3, facts.height, facts.width, 3), generator=torch.Generator().manual_seed(0))
    images = noise.to(torch.uint8)
    model = ImageEncoder(encoder, facts.normalisation, options.image_size).eval().requires_grad_(False)
    alone = timm_alone(encoder, metadata["encoder"], images.permute(0, 3, 1, 2) / 255)

    with files.atomic_folder(folder) as new:
        _write_config(new, about, alone)
        (new / WEIGHTS).write_bytes(save(_weights(encoder), metadata))
        if options.program:
            program, content = _make_program(model, images)
            (new / PROGRAM).write_bytes(content)
            if options.onnx != "no" and not lacking:
                (new / ONNX).write_bytes(_make_onnx(program, model, images))
        written = sorted(path.name for path in new.iterdir())
        card = model_card.render(pretrained, alone=alone, files=written, about=about, license_id=options.license)
        (new / CARD).write_text(card, encoding="utf-8")

    print(
        f"{folder}: {metadata['encoder']} of step {pretrained.step}, {metadata['representation_dim']} numbers an image"
    )
    for path in sorted(folder.iterdir()):
        print(f"  {path.name:<20}{path.stat().st_size:>13,} bytes")
    if options.program and options.onnx == "auto" and lacking:
        print(f"  {ONNX} was not written, as {', '.join(lacking)} are missing: {_INSTALL}, and run this again")
    if alone is None:
        print(f"  timm alone does not build {metadata['encoder']}: use {PROGRAM} where this project is not")
    return folder


def metadata_of(pretrained: Pretrained, read_at: int | None = None) -> dict[str, str]:
    """Return what a program has to know of an encoder, as a safetensors file holds it: text, or else JSON.

    Args:
        pretrained: The encoder.
        read_at: Side in pixels that stored images are resized to. None: as stored.
    """
    known = {"format": "pt", **_about(pretrained, read_at), "sha256": _sha256(_weights(pretrained.model.encoder))}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in known.items()}


def _about(pretrained: Pretrained, read_at: int | None) -> dict[str, Any]:
    facts, model = pretrained.facts, pretrained.config.model
    mean, std = facts.normalisation
    return {
        "encoder": model.encoder,
        "stem": model.stem,
        "image_size": facts.height,
        "read_at": read_at or facts.height,
        "representation_dim": pretrained.model.representation_dim,
        "mean": mean,
        "std": std,
        "encoding": facts.encoding,
        "jpeg_quality": facts.jpeg_quality,
        "pretrained_on": facts.source,
        "objective": pretrained.config.loss.name,
        "step": pretrained.step,
        "torch": torch.__version__,
    }


@dataclass(frozen=True)
class Encoder:
    """An encoder, and what it has to be given."""

    encoder: nn.Module
    """In eval mode: normalised images (b, 3, H, W) -> representation (b, D)."""
    metadata: dict[str, str]

    @property
    def image_size(self) -> int:
        """Side of the images in pixels, as they are stored."""
        return int(self.metadata["image_size"])

    @property
    def read_at(self) -> int:
        """Side in pixels that they are resized to for the encoder."""
        return int(self.metadata["read_at"])

    @property
    def normalisation(self) -> Normalisation:
        """Mean and standard deviation per channel, on the scale where 255 is 1."""
        mean, std = (tuple(json.loads(self.metadata[name])) for name in ("mean", "std"))
        return mean, std


def load_encoder(path: PathLike, device: torch.device | str = "cpu") -> Encoder:
    """Load what this command wrote.

    Args:
        path: The folder, or its model.safetensors.
        device: Where the encoder goes.

    Raises:
        CheckpointError: If the file is missing, damaged, or not of this project.
    """
    path = Path(path)
    path = path / WEIGHTS if path.is_dir() else path
    try:
        content = path.read_bytes()
        weights = load(content)
        with safetensors.safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    missing = _METADATA - set(metadata)
    if missing:
        raise CheckpointError(f"{path} was not written by simclr.export: its metadata lacks {sorted(missing)}")
    if _sha256(weights) != metadata["sha256"]:
        raise CheckpointError(f"{path} is damaged: its weights do not have the SHA-256 that it names; export it again")
    try:
        stem: Stem = metadata["stem"]  # type: ignore[assignment]  # an unknown one is refused by what follows
        encoder = make_encoder(metadata["encoder"], stem, int(metadata["image_size"]))
        encoder.load_state_dict(weights, strict=True)
    except (ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not fit this version of the code and the encoders known to it: {error}. "
            f"Where {PROGRAM} lies beside it, torch.export.load({PROGRAM!r}).module() needs no code"
        ) from error
    return Encoder(encoder.to(device).eval(), metadata)


# ---------------------------------------------------------------------------------------------------------------
# The files


def _make_program(model: ImageEncoder, images: Tensor) -> tuple[torch.export.ExportedProgram, bytes]:
    """Return the encoder as torch.export's program, for any number of images, and the bytes of its file."""
    try:
        with torch.inference_mode(False), torch.no_grad():
            batch = torch.export.Dim("batch")
            program = torch.export.export(model, (images,), dynamic_shapes={"image": {0: batch}})
    except Exception as error:  # torch.export answers what it cannot trace with errors of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"torch.export cannot make a program of this encoder ({reason}); write the rest with --no-program"
        ) from error
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    read_back = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    _compare(PROGRAM, read_back, model, images)
    return program, buffer.getvalue()


def _make_onnx(program: torch.export.ExportedProgram, model: ImageEncoder, images: Tensor) -> bytes:
    """Return the bytes of the ONNX file, which onnxruntime has run."""
    import onnx
    import onnxruntime

    try:
        made = torch.onnx.export(
            program,
            (images,),
            dynamo=True,
            input_names=["image"],
            output_names=["representation"],
            dynamic_shapes={"image": {0: "batch"}},
            external_data=False,
            verbose=False,
        )
        assert made is not None
        content: bytes = made.model_proto.SerializeToString()
        onnx.checker.check_model(content, full_check=True)
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # likewise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"ONNX cannot hold this encoder ({reason}); write the rest with --onnx no") from error
    _compare(ONNX, lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0]), model, images)
    return content


def _compare(name: str, made: Callable[[Tensor], Tensor], model: ImageEncoder, images: Tensor) -> None:
    """Raise CheckpointError unless ``made`` gives the encoder's representations, of one image and of several."""
    for batch in (images[:1], images):
        with torch.no_grad():
            expected, found = model(batch), made(batch)
        if found.shape != expected.shape or not (
            (found - expected).abs().max() <= _TOLERANCE * expected.abs().max().clamp(min=1e-6)
        ):
            raise CheckpointError(
                f"{name} does not give the encoder's representations of {len(batch)} images: shape "
                f"{tuple(found.shape)}, expected {tuple(expected.shape)}; nothing was written"
            )


def _write_config(folder: Path, about: Mapping[str, Any], alone: TimmAlone | None) -> None:
    """Write config.json: what timm reads, where it builds the encoder by name, and what the files take and give."""
    if alone is not None and alone.call is not None:
        size = (3, about["read_at"], about["read_at"])
        images = {"mean": about["mean"], "std": about["std"], "input_size": size, "crop_pct": 1.0}
        known: dict[str, Any] = alone.model.pretrained_cfg  # type: ignore[assignment]  # an attribute that timm adds
        known |= images | {"interpolation": "bicubic", "crop_mode": "center", "fixed_input_size": bool(alone.arguments)}
        timm.models.save_for_hf(alone.model, str(folder), model_args=dict(alone.arguments), safe_serialization=True)
    path, side, read_at = folder / CONFIG, about["image_size"], about["read_at"]
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    config["simclr"] = {
        **about,
        "resize": f"shorter side to {side} (bicubic, antialiased), centre cropped to a square",
        WEIGHTS: f"float32 (batch, 3, {read_at}, {read_at}), RGB, (pixel / 255 - mean) / std",
        f"{PROGRAM}, {ONNX}": f"uint8 (batch, {side}, {side}, 3), RGB, as decoded; it is normalised inside",
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _require_own(folder: Path) -> None:
    """Raise CheckpointError if the folder holds what this command did not write, which would be lost."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(
            f"--output {folder} is a file; name a folder that is empty, an export's, or not there yet"
        )
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in _FILES) if folder.exists() else []
    if foreign:
        raise CheckpointError(
            f"{folder} holds other files than an export's, such as {', '.join(foreign[:5])}, which would be lost; name "
            "another --output"
        )


def _weights(encoder: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in encoder.state_dict().items()
    }


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
    """Export, and return the folder."""
    if options.parts is not None:
        parts.load(options.parts)
    return export(checkpoint.load_pretrained(options.run), options)


def cli() -> None:
    """Run :func:`main` with the options of the command line."""
    system.outlive_readers()
    try:
        main(tyro.cli(Options, prog="python -m simclr.export", description=__doc__))
    except ValueError as error:
        sys.exit(f"simclr.export: {error}")
