"""Capacity on paper, a section of `docs/scaling.md`: how many lines a pool of replicas serves, from records of one.

The model is the queue M/D/c: parts arrive at random, each of c replicas takes the same time for every part, and a part
that would wait too long is late. `runs/capacity.py` holds it against the policy that a line really uses.
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowad_fast.benchmarks.record import fewer
from flowad_fast.benchmarks.record.capacity_record import CapacityRecord
from flowad_fast.benchmarks.record.front import FrontRecord
from flowad_fast.benchmarks.record.line import LineRecord
from flowad_fast.benchmarks.record.lines import table_lines
from flowad_fast.benchmarks.record.record import Record, read
from flowad_fast.kernels.account import H100, account

MISSED = 1e-3
"""Share of parts that may be without a verdict in time, as where the line's rate was measured."""
HIGHEST = 0.97
"""Utilisation above which nothing is planned."""
REPLICAS = (1, 2, 4, 8, 16)
DEADLINES = (0.1, 0.2, 0.5)
"""Seconds, for a core of a CPU."""
SOON = (0.01, 0.1)
"""Seconds, for a GPU."""
BEATS = (1, 2, 5)
"""Parts per second of one line."""
LINKS = {"1 Gbit/s": 125e6, "10 Gbit/s": 1.25e9}
"""Bytes per second on paper."""
LINE = "line-rate-cpu"
FRONT = "front-cpu"
SINGLE = (
    ("cpu-demo", "inversion-s3/onnxruntime/fp32/b1/offline"),
    ("cpu-student", "teacher/mismatch-s1/eager/fp32/b1/offline"),
    ("cpu-student", "student/mismatch-s1/eager/fp32/b1/offline"),
    ("cpu-small", "inversion-s3/onnxruntime/fp32/b1/offline"),
    ("cpu-paper", "inversion-s3/eager/fp32/b1/offline"),
)
"""Records and rows of one replica."""


def late(replicas: int, service: float, rate: float, wait: float) -> float:
    """The share of parts that wait longer than `wait` seconds in M/D/c.

    The number of parts in the pool, seen every `service` seconds, is a Markov chain: all that were being judged have
    left, and a Poisson number has come. Its stationary distribution gives that of waiting (Franx, 2001).

    Args:
        replicas: c.
        service: seconds that every part takes.
        rate: parts per second; `rate * service` must be below `replicas`.
        wait: seconds, 0 or more.
    """
    coming = rate * service
    if coming >= replicas:
        return 1.0
    if wait < 0:
        return 1.0
    inside = np.cumsum(_inside(replicas, coming))
    k = math.floor(wait / service) + 1
    left = rate * (k * service - wait)
    j = np.arange(k * replicas)
    queued = inside[np.minimum(replicas + k * replicas - j - 1, len(inside) - 1)]
    return float(max(0.0, 1.0 - queued @ _poisson(left, k * replicas)))


def _inside(replicas: int, coming: float) -> NDArray[np.float64]:
    """The stationary distribution of the number of parts in the pool."""
    size = 2 * replicas + 50 + math.ceil(12 / (1 - coming / replicas))  # beyond which there is less than 1e-9
    come = np.arange(size)[:, None] - np.maximum(np.arange(size) - replicas, 0)
    move = np.where(come >= 0, _poisson(coming, size)[come.clip(0)], 0.0)
    move[-1] += 1 - move.sum(0)
    move -= np.eye(size)
    move[-1] = 1
    right = np.zeros(size)
    right[-1] = 1
    found: NDArray[np.float64] = np.linalg.solve(move, right)
    return found.clip(0)


def _poisson(mean: float, count: int) -> NDArray[np.float64]:
    """Probabilities of 0 to `count` - 1."""
    if mean == 0:
        return np.eye(1, count)[0]
    j = np.arange(count)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(j[1:]))])
    found: NDArray[np.float64] = np.exp(j * math.log(mean) - mean - factorials)
    return found


@cache
def most(replicas: int, service: float, deadline: float) -> float:
    """Parts per second at which no more than `MISSED` of them are late; 0 where one part alone is.

    Args:
        replicas: c.
        service: seconds that every part takes.
        deadline: seconds from a part's arrival to its outcome.
    """
    if deadline < service:
        return 0.0
    low, high = 0.0, HIGHEST
    if late(replicas, service, high * replicas / service, deadline - service) <= MISSED:
        return high * replicas / service
    for _ in range(14):
        middle = (low + high) / 2
        if late(replicas, service, middle * replicas / service, deadline - service) <= MISSED:
            low = middle
        else:
            high = middle
    return low * replicas / service


@dataclass(frozen=True)
class Replica:
    """One replica that parts are sent to: ms per part, where the figure is from, and what is tabled of its pools."""

    name: str
    ms: float
    source: str
    deadlines: tuple[float, ...] = DEADLINES
    pools: tuple[int, ...] = REPLICAS


def section(folder: Path) -> list[str]:
    """The section's paragraphs and tables, from the records in `folder`."""
    line, forms = measured_line(folder), _forms(folder)
    pools = [*([line] if line else []), *_predicted()]
    parts = [
        "## Capacity",
        "How many lines a pool serves. All figures of one replica are from the records that are named; what a pool of "
        "several does is **computed, not measured**.",
        "### One replica",
        _single(folder, line),
        "Records are of different days on a shared machine: figures of different records are not to be compared.",
        "### Lines of a pool",
        f"At most {MISSED:.1%} of the parts may be without a verdict by their deadline. Parts are taken to come at "
        "random (Poisson), as from many lines that know nothing of each other; every replica takes the same time for "
        "each part, one part at a time: the queue M/D/c. The deadline counts from the frame's arrival at the pool; "
        "what the network and decoding take has to come off before. No pool is planned for more than "
        f"{HIGHEST:.0%} of what its replicas could. A larger pool is used better, since its replicas "
        "stand in for each other; a deadline that is shorter than one part's time cannot be kept by any pool.",
        *(_pool(one) for one in pools),
        *_checked(forms),
        "### Bytes of a frame",
        _bytes(forms),
        "### Where it stops",
        *_limits(folder, line, forms),
    ]
    return parts


def measured_line(folder: Path) -> Replica | None:
    """The line's own figure: one thread, whole parts."""
    path = folder / f"{LINE}.json"
    found = read(path) if path.is_file() else None
    if not isinstance(found, LineRecord) or found.added is None:
        return None
    added = found.added
    size = "x".join(map(str, added.setting.frame_size))
    name = f"one core of a CPU ({added.setting.bundle}, frames of {size}), measured"
    return Replica(name, added.line.p50, LINE)


def _predicted() -> list[Replica]:
    """The paper's model on an H100."""
    paper = fewer.scales()[-1]
    backbone = fewer.fused_backbone_cost(paper.backbone, paper.shape.image, 1).seconds
    found = []
    for n in (3, 1):
        seconds = backbone + sum(c.seconds(H100) for c in account(paper.shape, 1, n, 0, fewer.PRECISION))
        name = f"one {H100.name} ({paper.name}, {fewer.PRECISION}, {n} evaluation{'s' if n > 1 else ''}), predicted"
        source = "the account, one frame per call: a limit, nothing was measured"
        found.append(Replica(name, seconds * 1e3, source, SOON, REPLICAS[:3]))
    return found


def _single(folder: Path, line: Replica | None) -> str:
    rows = []
    if line is not None:
        rows.append([line.name, "1", f"{line.ms:.1f}", f"{1e3 / line.ms:.1f}", f"{1e3 / line.ms:.1f}", line.source])
    for stem, name in SINGLE:
        path = folder / f"{stem}.json"
        record = read(path) if path.is_file() else None
        row = next((r for r in record.cases if r.name == name), None) if isinstance(record, Record) else None
        if record is None or row is None or row.measured is None:
            continue
        threads = record.environment.threads
        fps = row.measured.fps
        rows.append(
            [f"{row.preset}, {row.name}", str(threads), f"{row.measured.latency_ms.p50:.1f}", f"{fps:.2f}",
             f"{fps / threads:.2f}", stem]
        )  # fmt: skip
    for one in _predicted():
        rows.append([one.name, "–", f"{one.ms:.2f}", f"≤ {1e3 / one.ms:.0f}", "–", one.source])
    head = ("replica", "threads", "ms per frame, p50", "frames/s", "frames/s per core", "record")
    return "\n".join(table_lines(head, rows, "---:"))


def _pool(replica: Replica) -> str:
    rows = []
    for deadline in replica.deadlines:
        for count in replica.pools:
            rate = most(count, replica.ms / 1e3, deadline)
            rows.append([
                f"{deadline * 1e3:.0f}", str(count), f"{rate:.1f}" if rate < 100 else str(math.floor(rate)),
                f"{rate * replica.ms / 1e3 / count:.0%}", *(str(math.floor(rate / beat)) for beat in BEATS),
            ])  # fmt: skip
    beats = (f"lines of {beat} part{'s' if beat > 1 else ''}/s" for beat in BEATS)
    head = ("deadline ms", "replicas", "parts/s at most", "of what replicas could", *beats)
    return f"Replica: {replica.name} ({replica.source}).\n\n" + "\n".join(table_lines(head, rows, "---:"))


def _checked(forms: tuple[str, CapacityRecord] | None) -> list[str]:
    if forms is None:
        return ["The model was not held against the policy in a committed record."]
    stem, record = forms
    rows = [
        [str(s.replicas), f"{s.deadline_s * 1e3:.0f}", f"{s.rate:.1f}", f"{s.rate * s.service_s / s.replicas:.0%}",
         str(s.cameras), s.arrivals, str(s.parts), f"{s.missed:.3%}", f"{s.model:.3%}"]
        for s in record.simulated
    ]  # fmt: skip
    head = ("replicas", "deadline ms", "parts/s", "utilisation", "cameras", "arrivals", "parts", "late: policy",
            "late: model")  # fmt: skip
    return [
        "**The model against the policy.** The class that decides on a line who is judged when "
        f"(`line/policy.py`) was driven with a simulated clock, {record.simulated[0].service_s * 1e3:.1f} ms per part "
        f"(record {stem}). One camera's parts are judged in their order, and those that cannot be in time any more are "
        "given up: fewer are late than the model says. Many cameras take turns, so that nobody is judged because of "
        "having waited longest: of parts at random more are late than the model says. Lines with a beat of their own "
        "come less unevenly than at random, and fewer are late. The waiting itself is the model's: "
        "`tests/test_capacity.py` holds its distribution to within 0.015.",
        "\n".join(table_lines(head, rows, "---:")),
    ]


def _forms(folder: Path) -> tuple[str, CapacityRecord] | None:
    """The record of `runs/capacity.py`, with its name; of several the first."""
    for path in sorted(folder.glob("capacity*.json")):
        found = read(path)
        if isinstance(found, CapacityRecord):
            return path.stem, found
    return None


def _bytes(forms: tuple[str, CapacityRecord] | None) -> str:
    if forms is None:
        return "Not measured: no record has been committed yet (`python -m flowad_fast.benchmarks.runs.capacity`)."
    stem, record = forms
    rows = []
    for one in record.cases:
        decode = "not measured" if one.decode_ms is None else f"{one.decode_ms:.2f}"
        links = (f"{capacity / one.mean_bytes:.0f}" for capacity in LINKS.values())
        rows.append([one.form, f"{one.mean_bytes:.0f}", f"{one.least_bytes}–{one.most_bytes}", decode, *links])
    head = ("form", "bytes, mean", "least–most", "ms to decode, one thread", *(f"frames/s, {name}" for name in LINKS))
    height, width = record.frame_size
    return (
        f"{record.cases[0].photos} photos of {record.dataset}, {height}x{width} (record {stem}); links as on paper, "
        "without what protocols add.\n\n" + "\n".join(table_lines(head, rows, "---:"))
    )


def _limits(folder: Path, line: Replica | None, forms: tuple[str, CapacityRecord] | None) -> list[str]:
    found = []
    h100 = _predicted()[0]
    if forms is not None:
        stem, record = forms
        by = {one.form: one for one in record.cases}
        raw, small = record.cases[0], min(record.cases, key=lambda one: one.mean_bytes)
        gigabit = LINKS["1 Gbit/s"] / raw.mean_bytes
        cores = (
            "" if line is None else f", as many as {math.floor(gigabit * line.ms / 1e3)} of the measured cores judge"
        )
        found.append(
            f"- **Network.** A link of 1 Gbit/s carries {gigabit:.0f} frames/s as {raw.form} ({stem}){cores}, and "
            f"{gigabit * h100.ms / 1e3:.2f} of the rate predicted for one H100; as {small.form} "
            f"{raw.mean_bytes / small.mean_bytes:.1f} times as many. JPEG changes pixels, and so scores."
        )
        timed = [one for one in by.values() if one.decode_ms]
        if timed:
            slowest = max(timed, key=lambda one: one.decode_ms or 0.0)
            assert slowest.decode_ms is not None, "only those are here"
            found.append(
                f"- **Decoding.** {slowest.form} takes {slowest.decode_ms:.2f} ms of one core ({stem}): it decodes "
                f"{1e3 / slowest.decode_ms:.0f} frames/s, which is {1e3 / slowest.decode_ms * h100.ms / 1e3:.2f} of "
                "the rate predicted for one H100."
            )
        else:
            found.append("- **Decoding.** Not measured yet.")
    found += _bandwidth(folder)
    found.append(_front(folder, line))
    if line is not None:
        found.append(
            f"- **The deadline.** Below one part's own time ({line.ms:.1f} ms on a core, record {line.source}) more "
            "replicas do not help; more threads, fewer evaluations or a smaller field do."
        )
    return ["\n".join(found)]


def _front(folder: Path, line: Replica | None) -> str:
    """The process that takes requests and hands them to replicas."""
    record = read(folder / f"{FRONT}.json") if (folder / f"{FRONT}.json").is_file() else None
    if not isinstance(record, FrontRecord):
        return "- **The front process** that takes requests and hands them to replicas: not measured yet."
    rows = [row for row in record.cases if row.together > 1]
    each = ", ".join(f"{row.cpu_ms:.2f} ms as {row.way}" for row in rows)
    best = min(rows, key=lambda row: row.cpu_ms)
    height, width = record.frame_size
    feeds = "" if line is None else f", as many as {math.floor(line.ms / best.cpu_ms)} of the measured cores judge"
    return (
        f"- **The front process** that takes requests and hands them to replicas. Without them, a request of one frame "
        f"of {height}x{width} and its answer take of one core {each} ({FRONT}). It is one process, so it carries at "
        f"most {1e3 / best.cpu_ms:.0f} frames/s{feeds}; beyond that, start another at another port."
    )


def _bandwidth(folder: Path) -> list[str]:
    """Memory: bytes per frame by the account, against the copy bandwidth of the same run."""
    found = []
    for stem, name in SINGLE:
        path = folder / f"{stem}.json"
        record = read(path) if path.is_file() else None
        if not isinstance(record, Record) or record.roofs.copy_gb_s is None:
            continue
        row = next((r for r in record.cases if r.name == name), None)
        if row is None or row.prediction is None or row.measured is None:
            continue
        limit = record.roofs.copy_gb_s / row.prediction.gb * row.batch
        found.append(
            f"{row.preset} {limit:.0f} frames/s ({row.prediction.gb / row.batch:.2f} GB per frame, "
            f"{record.roofs.copy_gb_s:.0f} GB/s; {limit / row.measured.fps:.0f} times the record's "
            f"{row.measured.fps:.2f} on {record.environment.threads} threads; {stem})"
        )
    if not found:
        return []
    return [
        "- **Memory bandwidth.** Replicas on one machine share it. By the account, which lets nothing stay in caches, "
        f"it ends at {'; '.join(found)}. One frame per call reads all weights; batches share that."
    ]
