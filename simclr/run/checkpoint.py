"""Checkpoints: written atomically beside training, loaded strictly and without executing anything in them.

Files in a run's folder, all of one format:

    checkpoint_last.pt            everything needed to continue (also optimizer and gradient scaler)
    checkpoint_step<number>.pt    the ones before it, to fall back to
    simclr_best_epoch.pt          the model of the epoch with the best validation kNN accuracy
    simclr_lin_best.pt            encoder and linear classifier, which linear_probe.py writes

Each is a zip archive as torch.save writes it. Its checksums (CRC-32), which torch.load does not look at, are compared
before anything is used.

No random-number state is saved because none is used: order and views are functions of the seed and the step.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import io
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from simclr.beton import Facts
from simclr.config import ProbeConfig, TrainConfig, from_json, to_json
from simclr.evaluation import Classifier
from simclr.files import PathLike, atomic_write
from simclr.models import SimCLR, make_encoder

SCHEMA = 3
LAST = "checkpoint_last.pt"
BEST = "simclr_best_epoch.pt"
CLASSIFIER = "simclr_lin_best.pt"
PARTS = "parts.py"
"""The copy that a run keeps of the file with parts of its own."""
_MODEL_KEYS = {"schema", "kind", "model", "config", "facts", "step", "epoch", "knn_accuracy", "best_knn_accuracy"}
_RESUME_KEYS = _MODEL_KEYS | {"optimizer", "scaler", "world_size"}
_EARLIER = re.compile(r"checkpoint_step(\d+)\.pt")
_UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or not what was asked for."""


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model, with what it was made from."""

    model: SimCLR
    """In eval mode."""
    config: TrainConfig
    facts: Facts
    """What is known of the images it was pretrained on."""
    step: int
    """Optimizer steps taken."""
    epoch: int
    """Epochs finished."""
    knn_accuracy: float | None
    """Validation kNN accuracy in percent, if it was measured."""
    path: Path


def save_atomically(path: PathLike, payload: dict[str, Any]) -> None:
    """Write ``payload`` so that ``path`` is at every moment either the old file or the whole new one.

    Raises:
        CheckpointError: If the disk is full or the folder cannot be written; the old file stays.
        TypeError: If the payload holds anything but tensors, numbers, strings, and dicts and lists of them.
    """
    _require_plain(payload, "payload")
    with whole_file(path) as file:
        torch.save(payload, file)


@contextlib.contextmanager
def whole_file(path: PathLike) -> Iterator[io.BufferedRandom]:
    """Open a new file as :func:`simclr.files.atomic_write` does.

    Raises:
        CheckpointError: If the disk is full or the folder cannot be written; the old file stays.
    """
    try:
        with atomic_write(path) as file:
            yield file
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError about file positions
        raise CheckpointError(
            f"cannot write {path}: {error}; is the disk full or read-only? The old file stays"
        ) from error


def require_safe_loading() -> None:
    """Refuse to start where the environment makes torch execute code from checkpoints.

    :func:`load_safely` asks for weights only, which torch 2.14 puts above the environment; other libraries may not ask.

    Raises:
        CheckpointError: If TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set to true, whatever its spelling.
    """
    if os.environ.get(_UNSAFE, "0").lower() not in {"", "0", "false", "n", "no"}:
        raise CheckpointError(
            f"{_UNSAFE}={os.environ[_UNSAFE]} makes torch execute code from checkpoints; take it out of the "
            f"environment: unset {_UNSAFE}"
        )


def load_safely(path: PathLike) -> dict[str, Any]:
    """Read a file of :func:`save_atomically`, on the CPU, executing nothing.

    Raises:
        CheckpointError: If it is missing, damaged, holds anything but plain data, or has another schema.
        OSError: If the operating system refuses to read it, which does not mean that it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with path.open("rb") as file:
            archive = zipfile.ZipFile(file)
            # A changed attribute can make a tensor a folder to torch, which then takes the values from foreign memory.
            attributed = (entry.filename for entry in archive.infolist() if entry.external_attr)
            if (damaged := next(attributed, None) or archive.testzip()) is not None:
                raise ValueError(f"{damaged} in it has a wrong checksum or attribute")
            file.seek(0)
            payload = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        # No rights, for example: it may be intact, and an older one would lose steps. EINVAL is a damaged offset.
        if error.errno not in {errno.EIO, errno.EINVAL}:
            raise
        raise CheckpointError(f"{path} is damaged or cannot be read: {error.strerror}") from error
    except Exception as error:  # torch raises half a dozen types of error for foreign files
        raise CheckpointError(f"{path} is damaged or no checkpoint of this project: {error}") from error
    if not isinstance(payload, dict) or payload.get("schema") != SCHEMA:
        found = payload.get("schema") if isinstance(payload, dict) else type(payload).__name__
        raise CheckpointError(f"{path} has schema {found!r}, this version reads {SCHEMA}")
    return payload


def model_payload(
    *,
    model: nn.Module,
    config: str,
    facts: str,
    step: int,
    epoch: int,
    knn_accuracy: float | None,
    best_knn_accuracy: float | None,
) -> dict[str, Any]:
    """Return the contents of ``simclr_best_epoch.pt``; ``config`` and ``facts`` are JSON text."""
    return {
        "schema": SCHEMA,
        "kind": "model",
        "model": model.state_dict(),
        "config": config,
        "facts": facts,
        "step": step,
        "epoch": epoch,
        "knn_accuracy": knn_accuracy,
        "best_knn_accuracy": best_knn_accuracy,
    }


def resumable_payload(
    *, optimizer: torch.optim.Optimizer, scaler: Any, world_size: int, **model: Any
) -> dict[str, Any]:
    """Return the contents of ``checkpoint_last.pt``; ``model`` stands for the arguments of :func:`model_payload`."""
    return model_payload(**model) | {
        "kind": "resumable",
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else {},
        "world_size": world_size,
    }


class CheckpointWriter:
    """Writes a run's checkpoints in a background thread, one save at a time, while training goes on.

    Training waits while its tensors are copied to host memory, and for the previous save where that is not done yet.

    Args:
        folder: The run's folder.
        keep: Number of resumable checkpoints to keep, including the last one.
        last_step: Step of the intact ``checkpoint_last.pt`` that the run continued from; None if there was none.
        before: Called in the thread before a save, to write what must be on the disk by then.
        after: Called in the thread with the step of a checkpoint once that is on the disk.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        last_step: int | None,
        before: Callable[[], None] = lambda: None,
        after: Callable[[int], None] = lambda step: None,
    ) -> None:
        self._folder, self._keep, self._last_step = folder, keep, last_step
        self._before, self._after = before, after
        self._host_copies = HostCopies()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None

    def save(self, payload: dict[str, Any], *, is_best: bool) -> None:
        """Write what :func:`resumable_payload` returned, in the background. The caller may change it at once.

        Raises:
            CheckpointError: If the previous save has failed.
        """
        self.flush()
        self._pending = self._thread.submit(self._write, self._host_copies.take(payload), is_best)

    def raise_if_failed(self) -> None:
        """Raise the error of a save that has failed in the background, without waiting for one that goes on."""
        if self._pending is not None and self._pending.done():
            self.flush()

    def is_idle(self) -> bool:
        """Wait for a tenth of a second at most; return whether nothing is on its way to the disk."""
        return self._pending is None or bool(concurrent.futures.wait([self._pending], 0.1).done)

    def flush(self) -> None:
        """Wait until all is on the disk. Raises CheckpointError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, payload: dict[str, Any], is_best: bool) -> None:
        """Write in an order that leaves an intact checkpoint to continue from, at whatever line the run is killed."""
        self._before()
        if is_best:  # first: killed in between, the run continues from before this measurement and repeats it
            model = {key: value for key, value in payload.items() if key in _MODEL_KEYS}
            save_atomically(self._folder / BEST, model | {"kind": "model"})
        if self._keep > 1 and self._last_step is not None:
            _keep_as_earlier(self._folder, self._last_step)
        save_atomically(self._folder / LAST, payload)
        self._last_step = payload["step"]
        _prune(self._folder, self._keep - 1, before_step=payload["step"])
        self._after(payload["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.flush()
        except (ValueError, OSError) as failure:
            if error is None:
                raise
            error.add_note(f"besides: {failure}")
        finally:
            self._thread.shutdown()


class HostCopies:
    """Copies tensors to host memory, into the same buffers each time; page-locked buffers for tensors on a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Return ``payload`` with every tensor replaced by its copy, which the next call overwrites."""
        copied: dict[str, Any] = self._copy(payload, "")
        if any(buffer.is_pinned() for buffer in self._buffers.values()):
            torch.cuda.current_stream().synchronize()  # all copies were only started
        return copied

    def _copy(self, value: Any, where: str) -> Any:
        if isinstance(value, dict):
            return {key: self._copy(entry, f"{where}/{key}") for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(entry, f"{where}/{i}") for i, entry in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        buffer = self._buffers.get(where)
        if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
            buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self._buffers[where] = buffer
        return buffer.copy_(value, non_blocking=True)


@dataclass(frozen=True)
class Resumable:
    """A checkpoint to continue from."""

    payload: dict[str, Any]
    path: Path
    passed_over: tuple[str, ...]
    """Why each newer checkpoint was passed over: it is missing or damaged."""


def load_newest(folder: PathLike) -> Resumable | None:
    """Return the newest intact checkpoint of a run's folder, or None if it holds no checkpoint at all.

    Raises:
        CheckpointError: If none of its checkpoints is intact. Starting anew would overwrite what they hold.
    """
    folder = Path(folder)
    candidates = [folder / LAST, *(path for _, path in _earlier_checkpoints(folder))]
    if not any(path.exists() for path in candidates):
        return None
    passed_over: list[str] = []
    for path in candidates:
        try:
            return Resumable(load_resumable(path), path, tuple(passed_over))
        except CheckpointError as error:
            passed_over.append(str(error))
    raise CheckpointError(
        f"{folder} holds a run, but none of its checkpoints is intact: {'; '.join(passed_over)}. To begin anew give "
        "another --output"
    )


def load_resumable(path: PathLike) -> dict[str, Any]:
    """Read ``checkpoint_last.pt``.

    Raises:
        CheckpointError: As :func:`load_safely`, or if a run cannot continue from it.
    """
    payload = load_safely(path)
    if set(payload) != _RESUME_KEYS:
        raise CheckpointError(f"{path} cannot be continued from: {_describe_difference(set(payload), _RESUME_KEYS)}")
    return payload


def load_pretrained(path: PathLike, device: torch.device | str = "cpu") -> Pretrained:
    """Load a pretrained model, every weight and buffer of it.

    Args:
        path: A checkpoint, or a run's folder, which stands for its ``simclr_best_epoch.pt``.
        device: Where the model goes.

    Raises:
        CheckpointError: If there is none, it is damaged, or its weights do not fit its configuration exactly.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / BEST).is_file():
            raise CheckpointError(
                f"{path} holds no {BEST}; pretraining writes it when it measures kNN accuracy and at its end. "
                f"To use an unfinished run, name its {LAST}"
            )
        path = path / BEST
    payload = load_safely(path)
    missing = _MODEL_KEYS - set(payload)
    if missing:
        raise CheckpointError(f"{path} is no pretrained model: it lacks {sorted(missing)}")
    try:
        config = from_json(TrainConfig, payload["config"])
        facts = from_json(Facts, payload["facts"])
        model = SimCLR(config.model, image_size=facts.height)
        model.load_state_dict(payload["model"], strict=True)
    except CheckpointError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit this version of the code: {error}") from error
    return Pretrained(
        model=model.to(device).eval(),
        config=config,
        facts=facts,
        step=payload["step"],
        epoch=payload["epoch"],
        knn_accuracy=payload["knn_accuracy"],
        path=path,
    )


def save_classifier(
    path: PathLike, classifier: Classifier, *, pretraining: TrainConfig, pretraining_facts: Facts, probe: ProbeConfig
) -> None:
    """Write ``simclr_lin_best.pt``, all that :func:`load_classifier` needs. Errors as :func:`save_atomically`."""
    payload = {
        "schema": SCHEMA,
        "kind": "classifier",
        "model": classifier.state_dict(),
        "classes": list(classifier.classes),
        "image_size": classifier.size,
        "config": to_json(pretraining),
        "facts": to_json(pretraining_facts),
        "probe": to_json(probe),
    }
    save_atomically(path, payload)


def load_classifier(path: PathLike, device: torch.device | str = "cpu") -> Classifier:
    """Load ``simclr_lin_best.pt``.

    Args:
        path: The file, or the folder that holds it.
        device: Where it goes.

    Returns:
        The classifier in eval mode: uint8 (b, H, W, 3) -> logits (b, c).

    Raises:
        CheckpointError: If it is missing, damaged, or no classifier, or its weights do not fit.
    """
    path = Path(path)
    payload = load_safely(path / CLASSIFIER if path.is_dir() else path)
    if payload.get("kind") != "classifier":
        raise CheckpointError(
            f"{path} holds a {payload.get('kind')!r}, not a classifier; linear_probe.py writes one as {CLASSIFIER}"
        )
    try:
        config, facts = from_json(TrainConfig, payload["config"]), from_json(Facts, payload["facts"])
        encoder = make_encoder(config.model.encoder, config.model.stem, facts.height)
        num_classes, width = payload["model"]["head.weight"].shape
        head, size = nn.Linear(width, num_classes), payload["image_size"]
        classifier = Classifier(encoder, head, facts.normalisation, payload["classes"], size)
        classifier.load_state_dict(payload["model"], strict=True)
    except CheckpointError:
        raise
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit this version of the code: {error}") from error
    return classifier.to(device).eval()


def _describe_difference(found: set[str], expected: set[str]) -> str:
    return f"it lacks {sorted(expected - found)} and has besides {sorted(map(str, found - expected))}"


def _earlier_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return step and path of the checkpoints before the last one, newest first."""
    matches = ((_EARLIER.fullmatch(path.name), path) for path in folder.glob("checkpoint_step*.pt"))
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def _prune(folder: Path, number: int, *, before_step: int) -> None:
    """Keep the newest ``number`` of the checkpoints before a step. Those of later steps were damaged; remove them."""
    earlier = [path for step, path in _earlier_checkpoints(folder) if step < before_step]
    for _, path in _earlier_checkpoints(folder):
        if path not in earlier[:number]:
            path.unlink(missing_ok=True)


def _keep_as_earlier(folder: Path, step: int) -> None:
    """Give the last checkpoint a second name, so that it stays when the next one takes the first."""
    last, earlier = folder / LAST, folder / f"checkpoint_step{step:08d}.pt"
    earlier.unlink(missing_ok=True)
    try:
        earlier.hardlink_to(last)
    except FileNotFoundError:  # deleted while the run went on
        return
    except OSError:  # a file system without hard links: for a moment there is no last one, but the earlier one is found
        last.replace(earlier)


def _require_plain(value: Any, where: str) -> None:
    """Raise TypeError unless loading the value needs no code; ``where`` names it in the message."""
    if isinstance(value, dict):
        for key, entry in value.items():
            _require_plain(key, f"a key of {where}")
            _require_plain(entry, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, entry in enumerate(value):
            _require_plain(entry, f"{where}[{i}]")
    # By type, since numpy's float64 is a float
    elif not isinstance(value, torch.Tensor) and type(value) not in (type(None), bool, int, float, str):
        raise TypeError(f"{where} is a {type(value).__name__}, which a checkpoint cannot hold; convert it before")
