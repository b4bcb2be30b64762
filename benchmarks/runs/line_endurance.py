"""A line under load for an hour: whether its memory stays, and whether every part is accounted for.

The line is the real command in a process of its own, with recorded parts, JSON lines, a database and the page. What was
sampled is on disk at once, so that an end of this process loses none of it.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil

from flowad_fast.benchmarks.record.line import FLAT, EnduranceResult, Sample, Setting, Steady
from flowad_fast.benchmarks.runs.line_load import engine_fps
from flowad_fast.benchmarks.runs.line_rig import TERM, Rig
from flowad_fast.benchmarks.runs.line_work import PICTURES, Work
from flowad_fast.errors import LineStoppedError

LOAD = 0.8
WARM_UP = 0.2
"""Share of the time, at most 10 minutes, before memory must stay: arenas, caches and queues reach their sizes."""
HOLDS, HELD = 5, 0.4
"""How often, while warming up, the detector's process is held, and for how many seconds: what waits meanwhile, and the
batches that follow, bring queues and arenas to the sizes that any later delay would bring them to."""
READINGS, APART = 11, 0.05
"""Of memory, for one sample, and the seconds between them: a picture is in hand for less than that."""
MB = 1e6


def run(
    work: Work,
    folder: Path,
    setting: Setting,
    minutes: float,
    samples: Path,
    tell: Callable[[str], None],
    keep: Callable[[EnduranceResult], None],
    every: float = 5.0,
) -> EnduranceResult:
    """Run a line for `minutes` at 80 % of what the engine does alone; Ctrl-C ends it early, with what was seen.

    Args:
        work: bundle and pictures.
        folder: of the line.
        setting: threads, deadline, batch.
        minutes: how long.
        samples: file that gets a line of JSON per sample at once.
        tell: hears how far it is.
        keep: gets the result so far, once a minute.
        every: seconds between samples.
    """
    tell("endurance: the engine alone")
    alone = engine_fps(work, setting, 10.0)
    rate = LOAD * alone
    source = {"kind": "recorded", "folder": str(work.pictures[0].parent), "rate": rate, "rounds": None}
    rig = Rig(
        work, folder, rate=rate, seed=0, sources={"cell": source}, deadline=setting.deadline_s,
        threads=setting.threads, largest_batch=setting.largest_batch, capacity=64,
        limits={"call": 10.0, "start": 120.0, "drain": 20.0},
    )  # fmt: skip
    found: list[Sample] = []

    def result(parts: int, outcomes: int, results: dict[str, int], problems: Sequence[str]) -> EnduranceResult:
        return EnduranceResult(
            setting=setting, minutes=round(found[-1].seconds / 60, 2) if found else 0.0, asked_minutes=minutes,
            load=LOAD, rate=round(rate, 3), engine_fps=round(alone, 3), parts=parts, outcomes=outcomes,
            results=results, holds=holds, line=steady([(one.seconds, one.line_mb) for one in found], minutes),
            child=steady([(one.seconds, one.child_mb) for one in found], minutes), samples=tuple(found),
            problems=tuple(problems),
        )  # fmt: skip

    problems: list[str] = []
    holds, pause = 0, _warm_up(minutes) / (HOLDS + 1)
    samples.unlink(missing_ok=True)
    with rig:
        rig.start()
        line, child = rig.process, rig.child
        start, kept = time.monotonic(), time.monotonic()
        try:
            while (now := time.monotonic()) - start < 60 * minutes + every / 2:
                if not rig.alive():
                    raise LineStoppedError(f"the line ended by itself: {rig.words()}")
                judged = json.loads(rig.ask("GET", "/api/state")[1])["arrived"]
                found.append(_sample(now - start, line, child, judged))
                with samples.open("a") as file:
                    file.write(found[-1].model_dump_json() + "\n")
                if now - kept > 60 or len(found) == 1:
                    kept = now
                    tell(f"endurance: {(now - start) / 60:.1f} of {minutes:g} minutes, {judged} parts")
                    keep(result(judged, 0, {}, ["not over yet"]))
                if holds < HOLDS and now - start >= (holds + 1) * pause:
                    child.suspend()
                    time.sleep(HELD)
                    child.resume()
                    holds += 1
                time.sleep(max(0.0, every - (time.monotonic() - now)))
        except KeyboardInterrupt:
            problems.append(f"ended after {found[-1].seconds / 60 if found else 0:.1f} minutes")
        except (OSError, LineStoppedError, ValueError, KeyError) as error:
            problems.append(f"{type(error).__name__}: {error}")
        if rig.alive():
            try:
                if code := rig.signal(TERM):
                    problems.append(f"the line ended with exit code {code}: {rig.words()}")
            except LineStoppedError as error:
                problems.append(str(error))
        parts, outcomes, results = _accounted(rig, problems)
    return result(parts, outcomes, results, problems)


def steady(samples: Sequence[tuple[float, float]], minutes: float) -> Steady | None:
    """Of (seconds, MB) after warming up; None where fewer than ten are left."""
    kept = np.array([one for one in samples if one[0] >= _warm_up(minutes)], float)
    if len(kept) < 10:
        return None
    hours, sizes = kept[:, 0] / 3600, kept[:, 1]
    middle = float(np.median(sizes))
    slope = float(np.polyfit(hours - hours.mean(), sizes, 1)[0]) / middle
    spread = float(sizes.max() - sizes.min()) / middle
    trend = slope * float(hours[-1] - hours[0])
    flat = spread <= FLAT and abs(trend) <= FLAT
    return Steady(spread=round(spread, 5), slope_per_hour=round(slope, 5), flat=flat)


def _sample(seconds: float, line: psutil.Process, child: psutil.Process, parts: int) -> Sample:
    """Memory of both processes now, see `Sample`."""
    readings = []
    for i in range(READINGS):
        time.sleep(APART if i else 0.0)
        readings.append([round(process.memory_info().rss / MB, 2) for process in (line, child)])
    lines, children = zip(*readings, strict=True)
    return Sample(
        seconds=round(seconds, 1), line_mb=min(lines), line_peak_mb=max(lines), child_mb=min(children), parts=parts
    )


def _warm_up(minutes: float) -> float:
    """Seconds."""
    return min(600.0, WARM_UP * 60 * minutes)


def _accounted(rig: Rig, problems: list[str]) -> tuple[int, int, dict[str, int]]:
    """What the source has shown, by the names of its pictures, against the database, the JSON lines and the summary."""
    stored = rig.stored()
    names = {part.split("/", 2)[-1] for part, _ in stored}
    shown = max((_number(name) for name in names), default=-1) + 1
    if len(names) != shown or len(stored) != shown:
        problems.append(f"the source showed {shown} parts, the database has {len(stored)} outcomes of {len(names)}")
    try:
        summary = json.loads((rig.folder / "stdout").read_text())
        told, arrived = sum(summary["results"].values()), summary["arrived"]
    except (ValueError, KeyError):
        problems.append("the line gave no summary at its end")
        return shown, len(stored), dict(Counter(result for _, result in stored))
    if not arrived == told == shown:
        problems.append(f"the source showed {shown} parts, the line says {arrived} arrived and {told} were told")
    lines = sum(
        b'"event": "record"' in line
        for path in rig.out.glob("outcomes*.jsonl")
        for line in path.read_bytes().splitlines()
    )
    if lines != shown:
        problems.append(f"the source showed {shown} parts, the JSON lines have {lines} records")
    return shown, len(stored), dict(summary["results"])


def _number(name: str) -> int:
    """Which part of the run: `03.png#2` is the fourth of the second round."""
    picture, _, turn = name.partition("#")
    return PICTURES * (int(turn or 1) - 1) + int(picture.removesuffix(".png"))
