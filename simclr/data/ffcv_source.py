"""The batches of :mod:`simclr.data`, read and decoded by FFCV's threads. The only user of FFCV.

Its background thread is used through its internals, since its public loader takes no order from outside.
"""

from __future__ import annotations

import ctypes
import functools
import os
import queue
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr import beton
from simclr.beton import Facts
from simclr.data import Batch, ImageSource, sent

FFCV_VERSION = "1.0.2"
_INSTALL_FFCV = "python native/install_ffcv.py"


class FFCVSource(ImageSource):
    """FFCV reads and decodes in a background thread; each batch is copied out of its ring of buffers.

    The file is mapped, not read: what is written to it later would be read as images. So each batch is handed on only
    if the file, looked at after the batch was read, is as it was when it was opened.
    """

    backend = "ffcv"

    def __init__(self, path: Path, facts: Facts, device: torch.device, checked: str, num_workers: int | None) -> None:
        wanted = num_workers or (1 if facts.encoding == "raw" else 4)
        usable = load_ffcv().most_threads
        workers = min(wanted, usable)
        reason = f"ffcv {FFCV_VERSION} with {workers} thread{'s' if workers > 1 else ''}"
        if num_workers is not None and num_workers > usable:
            reason += f" ({num_workers} asked for, {usable} usable)"
        super().__init__(path, facts, device, f"{reason}; {checked}")
        self._process = os.getpid()
        self._file = path.open("rb")
        self._as_opened = os.fstat(self._file.fileno())
        # Compiled once: the code fits every batch size.
        self._loader = load_ffcv().make_loader(path, facts.encoding, workers)
        # Now, rather than with the first batch, when another file may have the name
        self._loader.memory_manager.context.mmap = np.memmap(self._file, np.uint8, mode="r")
        self._producers: set[Any] = set()
        # Also runs when the interpreter ends, which may abort while such a thread is alive.
        self._stop_producers = weakref.finalize(self, _stop_all, self._producers, self._process)

    def _check_usable(self) -> None:
        self._check_open()
        if os.getpid() != self._process:
            raise RuntimeError(
                f"{self.path} was opened with FFCV by process {self._process} and is used by process {os.getpid()}, "
                "forked from it: threads do not survive a fork. Open it in the new process, started with the spawn "
                'method, or open it with --loader memory (in Python: backend="memory")'
            )

    def _require_unchanged(self) -> None:
        before, now = self._as_opened, os.fstat(self._file.fileno())
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise beton.BetonError(
                f"{self.path} was written to after it was opened ({before.st_size} bytes then, {now.st_size} now): "
                "nothing was done with what has been read since. Put it back as it was, and start again"
            )

    def _read(self, slices: Iterator[NDArray[np.int64]]) -> Iterator[Batch]:
        rows = list(slices)
        order = np.concatenate([*rows, np.empty(0, np.int64)])
        producer = None
        self._check_usable()
        if len(order):
            # FFCV cuts the order into batches of this size, as the plan did: only the last one is smaller.
            self._loader.batch_size = len(rows[0])
            producer = load_ffcv().producer(self._loader, order)
            self._producers.add(producer)
        try:
            for index in rows:
                self._check_usable()
                image = np.empty((0, self.facts.height, self.facts.width, 3), np.uint8)
                label = np.empty((0, 1), np.int64)
                if len(index):
                    image, label = self._take(producer)
                    self._require_unchanged()
                assert len(image) == len(label) == len(index)
                yield Batch(self._copy(image), self._copy(label).view(-1), torch.from_numpy(index.copy()))
        finally:
            if producer is not None:
                self._producers.discard(producer)
                _stop_all({producer}, self._process)

    def _copy(self, buffer: NDArray[Any]) -> Tensor:
        """Copy out of FFCV's ring, which it overwrites as soon as the next batch is taken."""
        if self.device.type == "cpu":
            return torch.from_numpy(buffer.copy())
        return sent(torch.from_numpy(buffer), self.device)

    def _take(self, producer: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return the next batch. FFCV's own iterator waits without end for a thread that has died."""
        while True:
            was_alive = producer.is_alive()  # asked first, so that what it delivered before it died is not lost
            try:
                item = producer.output_queue.get(timeout=0.2)
            except queue.Empty:
                if was_alive:
                    continue
                item = None
            if item is None:
                self._check_open()
                raise RuntimeError(
                    f"FFCV's background thread stopped while reading {self.path}: {producer.failure!r}"
                ) from producer.failure
            _, (image, label) = item
            return image, label

    def close(self) -> None:
        """End FFCV's threads and let the file go. May be called twice."""
        super().close()
        self._stop_producers()
        self._loader = None
        self._file.close()


def _stop_all(producers: set[Any], process: int) -> None:
    """End FFCV's threads and wait for them. In a forked copy of the process there are none."""
    if os.getpid() != process:
        return
    for producer in list(producers):
        producer.close()
        while producer.is_alive():
            # It may be waiting, without a time limit, for room in its queue.
            while not producer.output_queue.empty():
                producer.output_queue.get_nowait()
            producer.join(0.01)


def ffcv_obstacle(encoding: str) -> str | None:
    """Return why FFCV cannot read images of this encoding here, and what to do about it; None if it can."""
    if sys.platform != "linux":
        return f"FFCV runs on Linux only, and this is {sys.platform}"
    try:
        version = metadata.version("ffcv")
    except metadata.PackageNotFoundError:
        return f"ffcv is not installed (to install it: {_INSTALL_FFCV})"
    if version != FFCV_VERSION:
        return f"ffcv {version} is installed, and only {FFCV_VERSION} is supported (to install it: {_INSTALL_FFCV})"
    try:
        ffcv = load_ffcv()
    except Exception as error:  # whatever a binary package may raise when it does not fit; it is reported
        return f"ffcv does not import, {type(error).__name__}: {error} (to install it again: {_INSTALL_FFCV})"
    if ffcv.process != os.getpid():
        return (
            f"this process was forked from one that uses FFCV (process {ffcv.process}), where FFCV may hang "
            "(to avoid it: start processes with the spawn method)"
        )
    if encoding == "jpeg" and not ffcv.decodes_jpeg():
        return (
            "the installed ffcv cannot decode JPEG (to change that: install the libturbojpeg headers, on Debian "
            f"and Ubuntu libturbojpeg0-dev, then {_INSTALL_FFCV})"
        )
    return None


class _FFCV(NamedTuple):
    """What this module takes from FFCV, and the process that loaded it."""

    process: int
    most_threads: int  # the cores that this process may use, or fewer by NUMBA_NUM_THREADS
    producer: Any  # class: (loader, order) -> thread that fills ``output_queue``
    make_loader: Any  # (path, encoding, num_workers) -> ffcv.loader.Loader
    decodes_jpeg: Any  # () -> whether JPEG decodes, to the same pixels as in simclr.beton


@functools.cache
def load_ffcv() -> _FFCV:
    """Import FFCV and amend what it does to the rest of the process."""
    torch_threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it imports distutils, and does not use it
        import numba
        import numba.typed

        numba_threads, typed_dict = numba.get_num_threads(), numba.typed.Dict
        # FFCV's table of two encodings is a compiled dictionary, which takes 3 seconds, and is read by Python only.
        numba.typed.Dict = dict
        try:
            from ffcv import _libffcv
            from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
            from ffcv.loader import Loader, OrderOption, epoch_iterator
            from ffcv.pipeline.compiler import Compiler
        finally:
            numba.typed.Dict = typed_dict
            # Importing FFCV sets both to 1; torch comes last, as numba may share its OpenMP library.
            numba.set_num_threads(numba_threads)
            torch.set_num_threads(torch_threads)

    # FFCV sets torch's thread count to its own number of workers when a loader is made and, from the background
    # thread, when an epoch starts. Remembering the number is all that it needs for compiling.
    def remember_num_threads(compiler: Any, num_threads: int) -> None:
        compiler.num_threads = num_threads

    Compiler.set_num_threads = classmethod(remember_num_threads)
    # No GPU work happens in these pipelines. Without this, each epoch makes streams and events on the GPU.
    epoch_iterator.IS_CUDA = False

    numba_config: Any = numba.config
    one_at_a_time = threading.Lock()

    class Stopped(Exception):  # noqa: N818 - not an error
        pass

    class Producer(epoch_iterator.EpochIterator):  # type: ignore[misc]
        """FFCV's background thread, which can be stopped and tells why it ended. Starts when made."""

        failure: BaseException | None = None

        def run(self) -> None:
            numba.set_num_threads(self.loader.num_workers)  # numba counts per thread
            try:
                super().run()
            except Stopped:
                pass
            except BaseException as error:  # raised again where the batches are taken
                self.failure = error

        def run_pipeline(self, *args: Any) -> Any:
            if self.terminate_event.is_set():
                raise Stopped
            with one_at_a_time:  # numba's "workqueue" threads abort the process if two callers meet
                return super().run_pipeline(*args)

    jpeg_decoder = _make_jpeg_decoder(_libffcv.__file__, SimpleRGBImageDecoder, Compiler)

    def make_loader(path: Path, encoding: str, num_workers: int) -> Any:
        decoder = SimpleRGBImageDecoder if encoding == "raw" else jpeg_decoder
        return Loader(
            str(path),
            batch_size=1,  # set for each epoch
            num_workers=num_workers,
            os_cache=True,  # the ranks of one machine share the file's pages
            order=OrderOption.SEQUENTIAL,  # not used: the plan's order goes to the producer
            seed=0,  # without it, the loader draws from numpy's global generator
            drop_last=False,
            pipelines={"image": [decoder()], "label": [IntDecoder()]},
        )

    @functools.cache
    def decodes_jpeg() -> bool:
        return jpeg_decoder is not None and _decodes_like_pillow(_libffcv.__file__)

    return _FFCV(os.getpid(), numba_config.NUMBA_NUM_THREADS, Producer, make_loader, decodes_jpeg)


def _turbojpeg(libffcv: str) -> tuple[Any, Any, Any]:
    """Return tjInitDecompress, tjDecompress2 and tjDestroy of the library that FFCV is linked with.

    Raises:
        AttributeError: If FFCV was built without it.
    """
    library = ctypes.CDLL(libffcv)
    start, decompress, stop = library.tjInitDecompress, library.tjDecompress2, library.tjDestroy
    start.restype, start.argtypes = ctypes.c_void_p, []
    decompress.restype = stop.restype = ctypes.c_int
    stop.argtypes = [ctypes.c_void_p]
    # handle, stream, its size, pixels, width, bytes per line (0: no padding), height, pixel format (0: RGB), flags
    decompress.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, *[ctypes.c_int] * 5]
    return start, decompress, stop


def _make_jpeg_decoder(libffcv: str, simple_decoder: Any, compiler: Any) -> Any:
    """Return FFCV's decoder with two changes, or None if FFCV was built without JPEG.

    FFCV asks libjpeg-turbo for its fast transform, which differs from Pillow's pixels by up to 10 of 255 levels
    and is 10 % faster, and it ignores failures: the batch then holds what was in the buffer before.
    """
    try:
        start, decompress, stop = _turbojpeg(libffcv)
    except AttributeError:
        return None

    class ExactJPEGDecoder(simple_decoder):  # type: ignore[misc]
        def generate_code(self) -> Any:
            memory_read, iterate = self.memory_read, compiler.get_iterator()

            def decode(batch_indices: Any, destination: Any, metadata: Any, storage_state: Any) -> Any:
                num_failed = 0
                for i in iterate(len(batch_indices)):
                    field = metadata[batch_indices[i]]
                    stream, pixels = memory_read(field["data_ptr"], storage_state), destination[i]
                    height, width = pixels.shape[0], pixels.shape[1]
                    handle = start()  # takes a microsecond, and threads cannot share one
                    status = decompress(
                        handle, stream.ctypes.data, stream.size, pixels.ctypes.data, width, 0, height, 0, 0
                    )
                    stop(handle)
                    num_failed += status != 0
                if num_failed > 0:
                    raise ValueError("JPEG streams of this batch cannot be decoded")
                return destination[: len(batch_indices)]

            decode.is_parallel = True  # type: ignore[attr-defined]
            return decode

    return ExactJPEGDecoder


def _decodes_like_pillow(libffcv: str) -> bool:
    """Return whether FFCV's libjpeg-turbo gives Pillow's pixels, tried on one small image."""
    from io import BytesIO

    from PIL import Image

    start, decompress, stop = _turbojpeg(libffcv)
    height, width = 40, 24
    ramps = np.add.outer(np.arange(height)[:, None] * [3, 5, 1], np.arange(width)).transpose(0, 2, 1)
    stream = beton.encode_jpeg(ramps.astype(np.uint8), quality=75)
    expected = np.asarray(Image.open(BytesIO(stream)).convert("RGB"))
    pixels = np.zeros((height, width, 3), np.uint8)
    handle = start()
    status = decompress(handle, stream, len(stream), pixels.ctypes.data, width, 0, height, 0, 0)
    stop(handle)
    return status == 0 and np.array_equal(pixels, expected)
