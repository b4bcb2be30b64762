"""A server of the protocol in a thread, pools that answer what a test wants, and clients that ask."""

import asyncio
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest

if not os.environ.get("CI"):
    for needed in ("httpx", "tritonclient.http", "tritonclient.grpc"):
        pytest.importorskip(needed)
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from flowad_fast import bundle as bundles
from flowad_fast.detector import Detection, Detector, load
from flowad_fast.files import sha256
from flowad_fast.line.scoring import InThread
from flowad_fast.serve.local import Local, LocalPool
from flowad_fast.serve.protocol.front import Front
from flowad_fast.serve.protocol.settings import FrontSettings
from flowad_fast.serve.settings import ServeLimits
from flowad_fast.stages.decision import Calibration, ClassCalibration
from tests.models import PARTS, exported, tiny_frames

WAYS = ("http", "http-json", "grpc")
TOKEN = "a-token-of-tests-0123456789"

FRAMES = np.concatenate([tiny_frames(3, 80, 50), np.zeros((1, 80, 50, 3), np.uint8)])
"""The last one is black."""
KINDS = (PARTS[1], PARTS[0], PARTS[2], PARTS[0])
ALL = ("map", "score", "verdict", "reason", "judged_score")


def calibrated(folder: Path) -> Path:
    """A bundle with Triton's repository, of a conditional model, whose thresholds some of `tiny_frames` exceed."""
    bundle = folder / "bundle"
    shutil.copytree(exported("triton-server", len(PARTS))[1].path, bundle)
    _, manifest = bundles.read(bundle)
    scores = load(bundle)(tiny_frames(4), [PARTS[0]] * 4).raw_score
    limits = ClassCalibration(threshold=float(np.median(scores)), parts=100)
    calibration = Calibration(alpha=0.01, classes=dict.fromkeys(PARTS, limits))
    bundles.write_manifest(bundle, manifest.model_copy(update={"calibration": calibration}))
    return bundle


def local(bundle: Path, around: Callable[[Detector], Any] = lambda it: it, **options: Any) -> LocalPool:
    """A pool of one bundle, in a thread; `around` wraps its detector."""
    limits = options.pop("limits", ServeLimits())
    return LocalPool({"part": opened(bundle, around, **options)}, limits)


def opened(bundle: Path, around: Callable[[Detector], Any] = lambda it: it, **options: Any) -> Local:
    """A bundle as a local pool takes it."""
    scoring = InThread(around(load(bundle)), sha256(bundle / bundles.MANIFEST)[:12])
    return Local(scoring, bundles.read(bundle)[1], **options)


class Moody:
    """A detector that does what a test wants before it judges."""

    def __init__(self, detector: Detector, before: Callable[[], None]) -> None:
        self._detector, self.before = detector, before
        self.engine, self.classes, self.frame_size = detector.engine, detector.classes, detector.frame_size
        self.image_size, self.calibration = detector.image_size, detector.calibration
        self.armed = False
        """Whether it does so; not while it is started."""

    def __call__(self, frames: np.ndarray, classes: Any = None) -> Detection:
        if self.armed:
            self.before()
        return self._detector(frames, classes)


class Running:
    """A front before a pool, at free ports of this computer, from entering to leaving."""

    def __init__(self, pool: Any, **settings: Any) -> None:
        self.pool = pool
        self.settings = FrontSettings.model_validate({"http_port": 0, "grpc_port": 0} | settings)
        self._up = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> "Running":
        self._thread.start()
        assert self._up.wait(60)
        if self._failed is not None:
            raise self._failed
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def stop(self) -> None:
        """Begin to end, as SIGTERM does."""
        self._loop.call_soon_threadsafe(self._stop.set)

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            if isinstance(self.pool, LocalPool):
                await self.pool.start()
            self.front = Front(self.pool, self.settings)
            await self.front.start()
        except BaseException as error:
            self._failed = error
            self._up.set()
            return
        self.http, self.grpc = self.front.http or "", self.front.grpc or ""
        self._up.set()
        await self._stop.wait()
        await self.front.close()


@dataclass
class Answer:
    """What any of the clients was told."""

    outputs: dict[str, np.ndarray]
    id: str
    version: str


class Client:
    """One way to ask: a module of tritonclient, and binary tensors or not."""

    def __init__(self, way: str, server: Running, token: str | None = None) -> None:
        self.way, self.binary = way, way != "http-json"
        self.module: Any = tritonclient.grpc if way == "grpc" else tritonclient.http
        url = server.grpc if way == "grpc" else server.http.removeprefix("http://")
        self.client = self.module.InferenceServerClient(url)
        name = "authorization" if way == "grpc" else "Authorization"
        self.headers = {} if token is None else {name: f"Bearer {token}"}

    def tensor(self, name: str, values: np.ndarray, datatype: str) -> Any:
        one = self.module.InferInput(name, list(values.shape), datatype)
        one.set_data_from_numpy(values, **({} if self.way == "grpc" else {"binary_data": self.binary}))
        return one

    def __call__(
        self,
        frames: np.ndarray,
        classes: np.ndarray | None = None,
        names: tuple[str, ...] | None = None,
        outputs: tuple[str, ...] = (),
        model: str = "part",
        **options: Any,
    ) -> Answer:
        inputs = [self.tensor("frames", frames, "UINT8")]
        if classes is not None:
            inputs.append(self.tensor("classes", classes, "INT64"))
        if names is not None:
            inputs.append(self.tensor("class_names", np.array([[one] for one in names], np.object_), "BYTES"))
        wanted = outputs or (ALL if self.way == "http-json" else ())
        extra = {} if self.way == "grpc" else {"binary_data": self.binary}
        asked = [self.module.InferRequestedOutput(name, **extra) for name in wanted] or None
        found = self.client.infer(model, inputs, outputs=asked, headers=dict(self.headers), **options)
        said = found.get_response()
        if self.way == "grpc":
            listed, id, version = [one.name for one in said.outputs], said.id, said.model_version
        else:
            listed, id, version = [one["name"] for one in said["outputs"]], said.get("id", ""), said["model_version"]
        return Answer({name: found.as_numpy(name) for name in listed}, id, version)


def failure(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Status and message of a call that the server refuses."""
    with pytest.raises(InferenceServerException) as told:
        call(*arguments, **options)
    return f"{told.value.status()} {told.value.message()}"


def indices(kinds: tuple[str, ...] = KINDS) -> np.ndarray:
    return np.array([[PARTS.index(one)] for one in kinds], np.int64)


def request_json(**changes: Any) -> dict[str, Any]:
    frames = {"name": "frames", "shape": [1, 2, 2, 3], "datatype": "UINT8", "data": [0] * 12}
    return {"inputs": [frames]} | changes
