"""What FFCV does to those who use it directly, and that reading through simclr.data is free of it.

FFCV changes the process that imports it, and some of its faults end or hang that process. So each group of
observations below is made by a process of its own, once for all tests. ``python -m tests.test_data_ffcv GROUP
FOLDER`` prints one line of JSON for each. Functions named ``observe_...`` run there, tests run here.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simclr import beton
from simclr.data import Batch, EpochPlan, ImageSource, ffcv_source, open_images
from tests.helpers import ROOT
from tests.test_data import numbered_images

NUM_IMAGES = 1003
PLAN = EpochPlan(np.arange(NUM_IMAGES), 16, seed=5)  # 62 steps: many times the ring of 5 buffers
PATIENCE_SECONDS = 2.0  # after which FFCV is taken to hang; what it waits for takes milliseconds


def plain_loader(path: Path, num_workers: int = 1, **options: Any) -> Any:
    """FFCV's own loader, used as its documentation says, in file order."""
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import Squeeze, ToTensor

    return Loader(
        str(path),
        batch_size=16,
        num_workers=num_workers,
        order=OrderOption.SEQUENTIAL,
        os_cache=True,
        **{
            "pipelines": {
                "image": [SimpleRGBImageDecoder(), ToTensor()],
                "label": [IntDecoder(), ToTensor(), Squeeze(1)],
            },
            **options,
        },
    )


def num_wrong(batches: list[Batch], plan: EpochPlan, start_step: int = 0) -> int:
    """How many batches differ from what the plan names, in pixels, labels or indices."""
    images, labels = numbered_images(NUM_IMAGES)
    rows = list(plan.batches(start_step=start_step))
    assert len(rows) == len(batches)
    return sum(
        not (
            np.array_equal(batch.index.numpy(), index)
            and np.array_equal(batch.image.numpy(), images[index])
            and np.array_equal(batch.label.numpy(), labels[index])
        )
        for batch, index in zip(batches, rows, strict=True)
    )


def finishes(action: Callable[[], object]) -> bool:
    """Whether ``action`` returns or raises in time. If not, its thread is left behind."""

    def run() -> None:
        try:
            action()
        except Exception as error:
            print(f"raised: {error!r}", file=sys.stderr)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    return not thread.is_alive()


def num_threads_in_the_end(before: int) -> int:
    """Threads of this process beyond ``before``; those that are about to end are waited for."""
    gc.collect()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    return threading.active_count() - before


# ---------------------------------------------------------------------------------------------------------------
# Observations


def observe_held_batches(path: Path) -> dict[str, Any]:
    images, _ = numbered_images(NUM_IMAGES)
    plain = [image for image, _ in plain_loader(path)]
    num_wrong_plain = sum(
        not np.array_equal(image.numpy(), images[16 * step : 16 * (step + 1)]) for step, image in enumerate(plain)
    )
    with open_images(path, backend="ffcv") as source:
        held = list(source.batches(PLAN))
        wrong = num_wrong(held, PLAN)
        for batch in source.batches(PLAN):
            for tensor in batch:
                tensor.fill_(99)  # must reach neither the file's later batches nor those of the next epoch
        wrong_after_writing = num_wrong(list(source.batches(PLAN)), PLAN)
    return {"plain": [num_wrong_plain, len(plain)], "ours": [wrong, wrong_after_writing, len(held)]}


def observe_equality(path: Path) -> dict[str, Any]:
    """Both backends, over plans of every kind; equal means dtype, shape, bits and contiguity."""
    indices = np.random.Generator(np.random.Philox(2)).permutation(NUM_IMAGES)[:900]
    plans = {
        f"train, {world_size} ranks, batch {size}, rank {rank}, epoch {epoch}, from step {start}": (
            EpochPlan(indices, size, world_size, rank, seed=3),
            epoch,
            start,
        )
        for world_size, size in ((1, 64), (2, 64), (4, 96))
        for rank in range(world_size)
        for epoch, start in ((0, 0), (1, 5))
    } | {
        f"evaluation, {world_size} ranks, batch {size}, rank {rank}": (
            EpochPlan(indices, size, world_size, rank, shuffle=False, drop_last=False),
            0,
            0,
        )
        for world_size, size in ((1, 128), (4, 128), (4, 64), (4, 3), (4, 897))  # 64 and 897 leave ranks without images
        for rank in range(world_size)
    }
    plans["no step left"] = (PLAN, 0, len(PLAN))
    result = {}
    for num_workers in (1, 2):
        with (
            open_images(path, backend="ffcv", num_workers=num_workers) as ffcv,
            open_images(path, backend="memory") as memory,
        ):
            for name, (plan, epoch, start) in plans.items():
                ours = list(ffcv.batches(plan, epoch=epoch, start_step=start))
                expected = list(memory.batches(plan, epoch=epoch, start_step=start))
                result[f"{name}, {num_workers} threads"] = len(ours) == len(expected) == len(plan) - start and all(
                    a.dtype == b.dtype and a.is_contiguous() and torch.equal(a, b)
                    for one, other in zip(ours, expected, strict=True)
                    for a, b in zip(one, other, strict=True)
                )
    return result


def observe_dead_thread(path: Path) -> dict[str, Any]:
    class PipelineError(Exception):
        pass

    def fail_at_the_fourth(loader: Any) -> None:
        (first_stage, outputs), *rest = loader.code[0]
        num_calls = 0

        def stage(**arguments: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls == 4:
                raise PipelineError("disk on fire")
            return first_stage(**arguments)

        loader.code = [(stage, outputs), *rest], loader.code[1]

    plain = plain_loader(path)
    fail_at_the_fourth(plain)
    plain_finishes = finishes(lambda: list(plain))

    source: Any = open_images(path, backend="ffcv")
    fail_at_the_fourth(source._loader)
    threads, start, received = threading.active_count(), time.monotonic(), []
    try:
        received.extend(source.batches(PLAN))
    except RuntimeError as error:
        message, cause = str(error), repr(error.__cause__)
    return {
        "plain finishes": plain_finishes,
        "seconds": time.monotonic() - start,
        "message": message,
        "cause": cause,
        "received": num_wrong(received, EpochPlan(PLAN.indices[:48], 48)) if not received else len(received),
        "threads": num_threads_in_the_end(threads),
        "next epoch is right": num_wrong(list(source.batches(PLAN)), PLAN) == 0,
    }


def observe_early_exit(path: Path) -> dict[str, Any]:
    plan = EpochPlan(np.arange(NUM_IMAGES), 1, shuffle=False)

    def stop_by_break(source: ImageSource) -> None:
        for _ in source.batches(plan):
            break

    def stop_by_closing_the_iterator(source: ImageSource) -> None:
        batches: Any = source.batches(plan)
        next(batches)
        batches.close()

    def stop_by_error(source: ImageSource) -> None:
        try:
            for _ in source.batches(plan):
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass

    def stop_by_closing_the_source(source: ImageSource) -> str:
        batches = source.batches(plan)
        next(batches)
        source.close()
        try:
            list(batches)
        except ValueError as error:
            return str(error)
        return "no error"

    def stop_before_the_first(source: ImageSource) -> None:
        source.batches(plan)

    before = threading.active_count()
    result: dict[str, Any] = {}
    plain = plain_loader(path)
    for _ in range(3):
        for _ in plain:
            break
    result["plain"] = num_threads_in_the_end(before)

    before = threading.active_count()
    source: Any = open_images(path, backend="ffcv")
    for stop in (stop_by_break, stop_by_closing_the_iterator, stop_by_error, stop_before_the_first):
        for _ in range(3):
            stop(source)
        result[stop.__name__] = num_threads_in_the_end(before)

    # Stopping must not read the rest of the epoch first.
    batches: Any = source.batches(plan)
    next(batches)
    (producer,) = source._producers
    batches.close()
    result["batches left unread"] = len(list(producer.iter_ixes))

    result["message"] = stop_by_closing_the_source(source)
    result["stop_by_closing_the_source"] = num_threads_in_the_end(before)
    return result


def observe_unchecked_indices(path: Path) -> dict[str, Any]:
    from ffcv.fields.decoders import IntDecoder

    beyond = np.array([NUM_IMAGES], np.int64)
    pipelines = {"image": None, "label": [IntDecoder()]}
    ((labels,),) = plain_loader(path, pipelines=pipelines, indices=beyond, drop_last=False)
    plain = labels.item()
    with open_images(path, backend="ffcv") as source:
        try:
            list(source.batches(EpochPlan(beyond, 1)))
        except ValueError as error:
            return {"plain": plain, "ours": str(error)}
    return {"plain": plain, "ours": "no error"}


def observe_thread_counts(path: Path) -> dict[str, Any]:
    """Runs before any other observation: importing numba and FFCV is a part of it."""

    def counts() -> tuple[int, int]:
        import numba

        return torch.get_num_threads(), numba.get_num_threads()

    torch.set_num_threads(3)
    result = {}
    with open_images(path, backend="ffcv", num_workers=1) as source:
        result["opened"] = counts()
        batches = source.batches(PLAN)
        for _ in range(10):
            next(batches)
        result["reading"] = counts()
        list(batches)
        result["epoch over"] = counts()
    return result


def observe_plain_thread_counts(path: Path) -> dict[str, Any]:
    """Runs before simclr.data has loaded FFCV in this process."""
    torch.set_num_threads(3)
    import ffcv

    assert ffcv is not None
    imported = torch.get_num_threads()
    torch.set_num_threads(3)
    next(iter(plain_loader(path, num_workers=2)))
    result: dict[str, Any] = {"imported": imported, "loader with 2 workers": torch.get_num_threads()}
    try:
        plain_loader(path, num_workers=10_000)
    except ValueError as error:
        result["loader with 10000 workers"] = str(error)
    return result


def observe_num_workers(path: Path) -> dict[str, Any]:
    source: Any = open_images(path, backend="ffcv", num_workers=10_000)
    with source:
        wrong = num_wrong(list(source.batches(PLAN)), PLAN)
        return {"reason": source.reason, "wrong": wrong, "loader": source._loader.num_workers}


def observe_accelerate(path: Path) -> dict[str, Any]:
    from accelerate import Accelerator, skip_first_batches

    accelerator, result = Accelerator(cpu=True), {}
    for backend in ("ffcv", "memory"):
        source = open_images(path, backend=backend)
        prepared = accelerator.prepare(source)
        model, optimizer, among_others = accelerator.prepare(
            linear := torch.nn.Linear(2, 2), torch.optim.SGD(linear.parameters()), source
        )
        assert model is not None
        assert optimizer is not None
        refused = []
        for meddle in (accelerator.prepare_data_loader, skip_first_batches):
            try:
                meddle(source)
            except (AttributeError, TypeError) as error:
                refused.append(type(error).__name__)
        result[backend] = {
            "is the same": prepared is source and among_others is source,
            "registered": len(accelerator._dataloaders),
            "wrong": num_wrong(list(prepared.batches(PLAN)), PLAN),
            "refused": refused,
        }
    return result


def observe_fork(path: Path) -> dict[str, Any]:
    def error_of(action: Callable[[], object]) -> str:
        try:
            return f"no error: {action()}"
        except (RuntimeError, ValueError) as error:
            return str(error)

    def in_a_fork(action: Callable[[], object]) -> Any:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            try:
                answer = action()
            except BaseException:
                answer = traceback.format_exc()
            os.write(writer, json.dumps(answer).encode())
            os._exit(0)
        os.close(writer)
        deadline = time.monotonic() + PATIENCE_SECONDS * (1 if action is iterate_plain else 10)
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "hangs"
            time.sleep(0.02)
        with os.fdopen(reader) as answers:
            return json.loads(answers.read())

    plain = iter(plain_loader(path))
    next(plain)

    def iterate_plain() -> list[int]:
        return [len(image) for image, _ in plain]

    source: Any = open_images(path, backend="ffcv")
    batches: Any = source.batches(PLAN)
    received = [next(batches)]

    def use() -> dict[str, Any]:
        automatic = open_images(path)
        return {
            "iterator": error_of(lambda: next(batches)),
            "source": error_of(lambda: list(source.batches(PLAN))),
            "ffcv": error_of(lambda: open_images(path, backend="ffcv")),
            "auto": [automatic.backend, automatic.reason, num_wrong(list(automatic.batches(PLAN)), PLAN)],
        }

    def let_go() -> str:
        nonlocal batches, source
        with source._producers.copy().pop().output_queue.mutex:  # as if it was forked in the middle of a put
            batches.close()
            source.close()
        batches = source = None
        gc.collect()
        return "done"

    result = {
        "plain": in_a_fork(iterate_plain),
        "ours": in_a_fork(use),
        "let go": in_a_fork(let_go),
    }
    received.extend(batches)
    return {**result, "parent": num_wrong(received, PLAN)}


def observe_compilation(path: Path) -> dict[str, Any]:
    source: Any = open_images(path, backend="ffcv")

    def num_compiled() -> list[int]:
        compiled = [f for stage, _ in source._loader.code[0] for f in stage.__globals__.values()]
        return [len(f.signatures) for f in compiled if hasattr(f, "signatures")]

    counts = [num_compiled()]
    for epoch in range(2):
        for size in (1, 16, 200):
            list(source.batches(EpochPlan(np.arange(NUM_IMAGES), size), epoch=epoch))
            counts.append(num_compiled())
    return {"compiled": counts}


def observe_generators(path: Path) -> dict[str, Any]:
    def states() -> tuple[bytes, object, bytes]:
        legacy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - that it is left alone is the point
        return legacy["state"]["key"].tobytes(), random.getstate(), torch.get_rng_state().numpy().tobytes()

    before = states()
    with open_images(path, backend="ffcv") as source:
        list(source.batches(PLAN))
    return {"untouched": states() == before}


def observe_choice(path: Path) -> dict[str, Any]:
    with open_images(path) as source:
        return {"backend": source.backend, "reason": source.reason}


def observe_jpeg(path: Path) -> dict[str, Any]:
    path = path.with_name("jpeg.beton")
    images = np.random.Generator(np.random.Philox(9)).integers(0, 256, (64, 24, 40, 3), dtype=np.uint8)
    beton.write(path, images, np.zeros(64, np.int64), encoding="jpeg", jpeg_quality=95)
    expected, _ = beton.read(path)
    plan = EpochPlan(np.arange(64), 16, shuffle=False)
    result: dict[str, Any] = {"supported": ffcv_source.load_ffcv().decodes_jpeg()}
    if result["supported"]:  # without libjpeg-turbo, plain FFCV ends the process or returns what its buffer held
        plain = [image.numpy().copy() for image, _ in plain_loader(path)]
        result["plain"] = int(np.abs(np.concatenate(plain).astype(int) - expected).max())
    with open_images(path) as source:
        result["auto"] = [source.backend, source.reason]
    try:
        with open_images(path, backend="ffcv", num_workers=2) as source:
            ours = np.concatenate([batch.image.numpy() for batch in source.batches(plan)])
            result["ffcv"] = int(np.abs(ours.astype(int) - expected).max())
    except ValueError as error:
        result["ffcv"] = str(error)
    if result["supported"]:
        layout, content = beton.check(path), bytearray(path.read_bytes())
        content[layout.offsets[40] : layout.offsets[40] + 20] = bytes(20)
        path.write_bytes(content)
        damaged = ffcv_source.FFCVSource(path, beton.load_facts(path), torch.device("cpu"), "", None)
        try:
            list(damaged.batches(plan))
        except RuntimeError as error:
            result["damaged"] = str(error)
    return result


def observe_gpu(path: Path) -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"skipped": True}
    with open_images(path, backend="ffcv", device="cuda") as source:
        batches = list(source.batches(PLAN))
    on_cpu = [Batch(*(tensor.cpu() for tensor in batch)) for batch in batches]
    devices = {tuple(tensor.device.type for tensor in batch) for batch in batches}
    return {"devices": sorted(devices), "wrong": num_wrong(on_cpu, PLAN)}


def observe_two_iterators(path: Path) -> dict[str, Any]:
    """Runs with numba's "workqueue" threads, which abort the process if two threads use them at once."""
    numba: Any = importlib.import_module("numba")
    size = 501  # large batches, so that the two threads are at work most of the time
    plans = [EpochPlan(np.arange(NUM_IMAGES), size, seed=seed) for seed in (0, 1)]
    with (
        open_images(path, backend="ffcv", num_workers=2) as train,
        open_images(path, backend="ffcv", num_workers=2) as test,
    ):
        wrong = 0
        for _ in range(100):
            first, second = [], []
            for one, other in zip(train.batches(plans[0]), test.batches(plans[1]), strict=True):
                first.append(one)
                second.append(other)
            wrong += num_wrong(first, plans[0]) + num_wrong(second, plans[1])
        nested = [
            num_wrong(list(train.batches(plans[1])), plans[1]) for _ in train.batches(plans[0]) for _ in range(10)
        ]
    return {"threads": numba.threading_layer(), "wrong": wrong + sum(nested)}


def observe_iterator_alive_at_the_end(path: Path) -> dict[str, Any]:
    """Runs last. What it leaves behind is stopped when the interpreter ends, or may abort it."""
    for num_workers in (1, 2):
        source = open_images(path, backend="ffcv", num_workers=num_workers)
        batches = source.batches(EpochPlan(np.arange(NUM_IMAGES), 100))
        next(batches)
        _LEFT_BEHIND.append(batches)
    return {"threads": threading.active_count()}


_LEFT_BEHIND: list[Iterator[Batch]] = []

GROUPS: dict[str, tuple[dict[str, str], list[Callable[[Path], dict[str, Any]]]]] = {
    "reading": (
        {"NUMBA_NUM_THREADS": "2"},
        [
            observe_thread_counts,
            observe_generators,
            observe_choice,
            observe_held_batches,
            observe_equality,
            observe_early_exit,
            observe_dead_thread,
            observe_unchecked_indices,
            observe_num_workers,
            observe_compilation,
            observe_jpeg,
            observe_gpu,
            observe_accelerate,
            observe_iterator_alive_at_the_end,
        ],
    ),
    "processes": (
        {"NUMBA_NUM_THREADS": "2", "NUMBA_THREADING_LAYER": "workqueue"},
        [
            observe_plain_thread_counts,
            observe_two_iterators,
            observe_fork,
            observe_iterator_alive_at_the_end,
        ],
    ),
}


def _observe(group: str, folder: Path) -> None:
    path = folder / "numbered.beton"
    beton.write(path, *numbered_images(NUM_IMAGES))
    for observation in GROUPS[group][1]:
        start = time.monotonic()
        try:
            result = observation(path)
        except Exception:
            result = {"failed": traceback.format_exc()}
        print(json.dumps({observation.__name__.removeprefix("observe_"): result}), flush=True)
        print(f"{observation.__name__}: {time.monotonic() - start:.1f} s", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------
# Tests


class Observed:
    """A process that observes; its results are waited for when the first of them is asked for."""

    def __init__(self, group: str, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.test_data_ffcv", group, str(folder)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **GROUPS[group][0]},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.errors = ""
        self.results: dict[str, dict[str, Any]] = {}

    def __getitem__(self, name: str) -> dict[str, Any]:
        if self.process.returncode is None:
            output, self.errors = self.process.communicate(timeout=300)
            for line in output.splitlines():
                if line.startswith("{"):
                    self.results.update(json.loads(line))
        if name not in self.results:
            pytest.fail(f"not reached; the process ended with {self.process.returncode}:\n{self.errors}")
        result = self.results[name]
        if "failed" in result:
            pytest.fail(f"{result['failed']}\n{self.errors}")
        return result


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Observed]]:
    try:
        metadata.version("ffcv")
    except metadata.PackageNotFoundError:
        pytest.skip("ffcv is not installed: these tests would show that reading through it is safe and exact")
    groups = {group: Observed(group, tmp_path_factory.mktemp(group)) for group in GROUPS}  # both at the same time
    yield groups
    for group in groups.values():
        group.process.kill()
        group.process.communicate()


@pytest.fixture
def reading(observed: dict[str, Observed]) -> Observed:
    return observed["reading"]


@pytest.fixture
def processes(observed: dict[str, Observed]) -> Observed:
    return observed["processes"]


def test_ffcv_is_chosen_where_it_works(reading: Observed) -> None:
    assert reading["choice"]["backend"] == "ffcv"
    assert reading["choice"]["reason"] == "ffcv 1.0.2 with 1 thread; checksum verified"


def test_both_backends_yield_the_same_bits(reading: Observed) -> None:
    equal = reading["equality"]
    assert len(equal) == 2 * (14 + 17 + 1)
    assert [name for name, is_equal in equal.items() if not is_equal] == []


def test_batches_stay_valid_when_they_are_kept(reading: Observed) -> None:
    num_wrong_plain, num_plain = reading["held_batches"]["plain"]
    assert num_plain == 62
    assert num_wrong_plain > 50, "FFCV no longer overwrites its batches: the copy may be unnecessary"
    assert reading["held_batches"]["ours"] == [0, 0, 62]


def test_a_thread_that_dies_is_reported_within_seconds(reading: Observed) -> None:
    observed = reading["dead_thread"]
    assert not observed["plain finishes"], "FFCV no longer hangs: the watch may be unnecessary"
    assert observed["seconds"] < 5
    assert "background thread stopped while reading" in observed["message"]
    assert observed["cause"] == "PipelineError('disk on fire')"
    assert "disk on fire" in observed["message"]
    assert observed["received"] == 3, "batches that were ready before are delivered"
    assert observed["threads"] == 0
    assert observed["next epoch is right"]


@pytest.mark.parametrize(
    "way",
    [
        "stop_by_break",
        "stop_by_closing_the_iterator",
        "stop_by_error",
        "stop_before_the_first",
        "stop_by_closing_the_source",
    ],
)
def test_stopping_early_leaves_no_thread(reading: Observed, way: str) -> None:
    assert reading["early_exit"]["plain"] == 3, "FFCV no longer leaks threads: stopping them may be unnecessary"
    assert reading["early_exit"][way] == 0


def test_stopping_early_does_not_read_on(reading: Observed) -> None:
    assert reading["early_exit"]["batches left unread"] > NUM_IMAGES - 20


def test_closing_the_source_ends_its_iterators_with_an_error(reading: Observed) -> None:
    assert "was closed; open it again" in reading["early_exit"]["message"]


def test_indices_are_checked(reading: Observed) -> None:
    assert isinstance(reading["unchecked_indices"]["plain"], int), "what FFCV found in foreign memory"
    assert "reads image 1003, but" in reading["unchecked_indices"]["ours"]


def test_thread_counts_of_torch_and_numba_are_left_alone(reading: Observed, processes: Observed) -> None:
    plain = processes["plain_thread_counts"]
    assert (plain["imported"], plain["loader with 2 workers"]) == (1, 2), "FFCV no longer sets torch's thread count"
    assert reading["thread_counts"] == {"opened": [3, 2], "reading": [3, 2], "epoch over": [3, 2]}


def test_more_workers_than_cores_are_not_used(reading: Observed, processes: Observed) -> None:
    assert "must be between 1 and" in processes["plain_thread_counts"]["loader with 10000 workers"]
    observed = reading["num_workers"]
    assert observed["wrong"] == 0
    assert observed["loader"] == 2
    assert observed["reason"].startswith("ffcv 1.0.2 with 2 threads (10000 asked for, 2 usable)")


@pytest.mark.parametrize("backend", ["ffcv", "memory"])
def test_accelerate_leaves_the_source_alone(reading: Observed, backend: str) -> None:
    observed = reading["accelerate"][backend]
    assert observed["is the same"]
    assert observed["registered"] == 0
    assert observed["wrong"] == 0
    assert len(observed["refused"]) == 2, "accelerate took the source for a data loader"


def test_a_forked_process_gets_an_error_and_does_not_hang(processes: Observed) -> None:
    observed = processes["fork"]
    assert observed["plain"] == "hangs", "FFCV no longer hangs in a forked process"
    for name in ("iterator", "source"):
        assert "forked from it: threads do not survive a fork" in observed["ours"][name]
    assert "this process was forked from one that uses FFCV" in observed["ours"]["ffcv"]
    backend, reason, wrong = observed["ours"]["auto"]
    assert (backend, wrong) == ("memory", 0)
    assert "this process was forked from one that uses FFCV" in reason


def test_a_forked_process_can_let_go_of_what_it_inherited(processes: Observed) -> None:
    assert processes["fork"]["let go"] == "done"


def test_forking_does_not_disturb_the_parent(processes: Observed) -> None:
    assert processes["fork"]["parent"] == 0


def test_two_iterators_may_be_open_at_once(processes: Observed) -> None:
    observed = processes["two_iterators"]
    assert observed["threads"] == "workqueue"
    assert observed["wrong"] == 0


@pytest.mark.parametrize("group", ["reading", "processes"])
def test_the_interpreter_ends_well_with_an_iterator_left_open(observed: dict[str, Observed], group: str) -> None:
    assert observed[group]["iterator_alive_at_the_end"]["threads"] >= 3
    assert observed[group].process.returncode == 0, observed[group].errors


def test_code_is_compiled_once_per_source(reading: Observed) -> None:
    before, *after = reading["compilation"]["compiled"]
    assert len(before) >= 2
    assert all(count == [1] * len(before) for count in after)


def test_global_random_generators_are_left_alone(reading: Observed) -> None:
    assert reading["generators"]["untouched"]


def test_jpeg_is_decoded_exactly_or_refused(reading: Observed) -> None:
    observed = reading["jpeg"]
    if observed["supported"]:
        assert observed["plain"] > 0, "FFCV now decodes as Pillow does: our decoder may be unnecessary"
        assert observed["auto"][0] == "ffcv"
        assert observed["ffcv"] == 0
        assert "cannot be decoded" in observed["damaged"]
    else:
        assert observed["auto"][0] == "memory"
        for message in (observed["auto"][1], observed["ffcv"]):
            assert "cannot decode JPEG" in message
            assert "libturbojpeg" in message


@pytest.mark.gpu
def test_ffcv_can_deliver_to_a_gpu(reading: Observed) -> None:
    if "skipped" in reading["gpu"]:
        pytest.skip("needs a GPU: batches would be copied to it before FFCV's buffer is overwritten")
    assert reading["gpu"] == {"devices": [["cuda", "cuda", "cpu"]], "wrong": 0}


if __name__ == "__main__":
    _observe(sys.argv[1], Path(sys.argv[2]))
