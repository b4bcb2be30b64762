"""Archives and data sets through Ray Data: the rows of the single process, whatever is killed in the middle."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import tiny_frames
from PIL import Image
from test_inspect import make_bundle

from flowad_fast import bundle as bundles
from flowad_fast.archive import cluster
from flowad_fast.archive.inspecting import Before, Inspection, Item
from flowad_fast.archive.sources import Cells, Columns, Photo, read_source
from flowad_fast.archive.store import DONE, PartFolder
from flowad_fast.archive.worker import DEATHS, LOST, Ledger, Task, Worker, packed
from flowad_fast.cli.archive import inspect_archive
from flowad_fast.errors import ConfigError, FlowADError, FrameError
from flowad_fast.evaluation.results import COLUMNS, bundle_identity
from flowad_fast.evaluation.scanning import read_ahead

if os.environ.get("CI"):
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray
    from ray.cluster_utils import Cluster
else:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    ray = pytest.importorskip("ray")
    Cluster = pytest.importorskip("ray.cluster_utils").Cluster

pytestmark = pytest.mark.long
INSPECT = "from flowad_fast.cli.inspect import main; main()"
EVALUATE = "from flowad_fast.cli.eval import main; main()"
MANY = 480
"""Photos of the archive that workers, nodes and drivers are killed over."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "plain", invad=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of two sizes, one of them twice, and some that cannot be judged."""
    root = tmp_path_factory.mktemp("photos") / "archive"
    (root / "deep").mkdir(parents=True)
    for i, frame in enumerate(tiny_frames(MANY)):
        frame = frame if i % 3 else frame[:48, :40]
        Image.fromarray(frame).save(root / ("deep" if i % 7 == 0 else ".") / f"{i:04}.png", compress_level=0)
    shutil.copy(root / "0001.png", root / "0001_again.png")
    (root / "0002_page.png").write_text("<html>404</html>")
    (root / "0003_empty.jpg").touch()
    Image.new("L", (64, 64), 0).save(root / "0004_black.png")
    return root


@pytest.fixture(scope="module")
def alone(bundle: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of one process, by path."""
    target = tmp_path_factory.mktemp("alone") / "rows.jsonl"
    done = command(INSPECT, bundle, photos, "--output", target, "--format", "jsonl", "--threads", 1)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in target.read_text().splitlines()]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster of two nodes as processes, with one core each."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Workers import this checkout, whatever is installed.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), before)))
    started = Cluster()
    try:
        for _ in range(2):
            started.add_node(num_cpus=1, object_store_memory=100 << 20, include_dashboard=False)
        yield started
    finally:
        started.shutdown()
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def start(code: str, *arguments: object, cwd: Path | None = None) -> "subprocess.Popen[str]":
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
    )  # fmt: skip


def command(code: str, *arguments: object, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    running = start(code, *arguments, cwd=cwd)
    try:
        out, err = running.communicate(timeout=200)
    except BaseException:
        running.kill()
        raise
    return subprocess.CompletedProcess(running.args, running.returncode, out, err)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """All rows of the parts, by path."""
    found = [row for part in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]
    return sorted(found, key=lambda row: row["path"])


def by_path(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: row["path"])


def in_the_middle(running: "subprocess.Popen[str]", folder: Path, parts: int = 1) -> None:
    """Wait until some parts are written, and the job goes on."""
    end = time.monotonic() + 120
    while len(list(folder.glob("part-*.parquet"))) < parts:
        assert running.poll() is None and time.monotonic() < end, running.communicate()[1]
        time.sleep(0.01)
    assert running.poll() is None


def workers_of(address: str) -> list[int]:
    """Processes of the cluster's first node that judge."""
    found = []
    for place in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if place.name.isdecimal() and (place / "cmdline").read_bytes().startswith(b"ray::MapWorker"):
                parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
                raylet = Path(f"/proc/{parent}/cmdline").read_bytes()
                if address.encode() in raylet and b"--head" in raylet.split(b"\0"):
                    found.append(int(place.name))
    return found


# Without a cluster


def test_what_is_judged_together_does_not_depend_on_where_a_part_begins() -> None:
    frames = [np.zeros((4, 4, 3), np.uint8)] * 11
    whole = [len(one) for one in read_ahead(frames, 4, most=3 * 4 * 4 * 3)]
    parts = [len(one) for at in (0, 4, 8) for one in read_ahead(frames[at : at + 4], 4, most=3 * 4 * 4 * 3)]
    assert whole == parts == [3, 1, 3, 1, 3]


def test_groups_are_whole_calls() -> None:
    for count in (1, 7, 8, 9, 1000, 100_000):
        groups = cluster.groups_of(range(count), 8, 2, 32)
        assert [i for group in groups for i in group] == list(range(count))
        assert all(len(group) % 8 == 0 and len(group) <= 256 for group in groups[:-1])


def write_table(path: Path, columns: dict[str, Any], rows_per_group: int = 5) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group)
    return path


def plain(paths: Sequence[Path]) -> list[str]:
    return [""] * len(paths)


def test_parquet_of_paths_and_of_bytes(tmp_path: Path, photos: Path) -> None:
    files = sorted(map(str, photos.glob("00*.png")))[:12]
    contents = [Path(one).read_bytes() for one in files]
    source = str(write_table(tmp_path / "a.parquet", {"photo": [*files, files[0]], "kind": ["x"] * 13}))
    found = read_source(source, Columns(path="photo", class_name="kind"), plain)
    assert [one.path for one in found.photos] == files and found.repeated == 1
    assert {one.class_name for one in found.photos} == {"x"}
    kept = write_table(tmp_path / "b.parquet", {"name": files, "data": [*contents[:-1], None]})
    found = read_source(str(kept), Columns(bytes="data", name="name"), plain)
    assert [one.path for one in found.photos] == files
    assert [one.file for one in found.photos] == [f"{kept.resolve()}#{i}" for i in range(12)]
    cells = Cells(2)
    order = [0, 1, 4, 6, 11, 3]
    read = [cells.read(one.cell) for i in order if (one := found.photos[i]).cell]
    assert read == [None if i == 11 else contents[i] for i in order]
    kept.unlink()
    with pytest.raises(FrameError, match="cannot be read"):
        Cells(2).read(found.photos[0].cell)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (Columns(), "give --path-column .* its columns: photo, size"),
        (Columns(path="foto"), "has no column 'foto'; did you mean 'photo'"),
        (Columns(path="size"), "column 'size' is int64, expected string"),
        (Columns(bytes="photo"), "column 'photo' is string, expected binary"),
        (Columns(path="photo", name="photo"), "--name-column names photos of --bytes-column"),
    ],
)
def test_wrong_columns_are_named(tmp_path: Path, columns: Columns, says: str) -> None:
    source = write_table(tmp_path / "a.parquet", {"photo": ["a.png"], "size": [1]})
    with pytest.raises(ConfigError, match=says):
        read_source(str(source), columns, plain)


def test_patterns_and_folders(tmp_path: Path, photos: Path) -> None:
    found = read_source(f"{photos}/**/*.png", Columns(), plain)
    assert len(found.photos) == len(list(photos.rglob("*.png")))
    assert {one.file for one in found.photos} < {one.file for one in read_source(str(photos), Columns(), plain).photos}
    with pytest.raises(FrameError, match="no photo matches"):
        read_source(f"{photos}/*.bmp", Columns(), plain)
    with pytest.raises(ConfigError, match="--path-column has no meaning"):
        read_source(str(photos), Columns(path="photo"), plain)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ConfigError, match="cannot be read as Parquet"):
        read_source(str(tmp_path / "broken.parquet"), Columns(path="photo"), plain)


def items_of(photos: Sequence[Photo]) -> list[Item]:
    return [Item(one, None) for one in photos]


def inspection(bundle: Path) -> Inspection:
    task = Inspection(str(bundle), bundle_identity(bundle), "auto", "cpu", 8)
    task.open()
    return task


def test_bytes_give_the_rows_of_files(bundle: Path, photos: Path, tmp_path: Path) -> None:
    files = [one for one in sorted(map(str, photos.glob("*.*")))[:20]]
    contents = [Path(one).read_bytes() for one in files]
    kept = write_table(tmp_path / "b.parquet", {"name": files, "data": contents})
    task = inspection(bundle)
    ours = task.judge(items_of(read_source(str(kept), Columns(bytes="data", name="name"), plain).photos))
    theirs = task.judge(items_of([Photo(one, one) for one in files]))
    assert {row["status"] for row in theirs if row} >= {"error", "invalid"}
    for one, other in zip(ours, theirs, strict=True):
        assert one is not None and other is not None
        differing = {name for name in COLUMNS if one[name] != other[name]}  # type: ignore[literal-required]
        # An empty file is named as such by the files' reader; its bytes, written aside, are too.
        assert differing <= {"file", "mtime_ns"}, (one, other)
    again = [Item(item.photo, Before(row["size"], row["sha256"])) for item, row in zip(
        items_of(read_source(str(kept), Columns(bytes="data", name="name"), plain).photos), ours, strict=True
    ) if row]  # type: ignore[arg-type]  # fmt: skip
    assert task.judge(again) == [None] * 20


def test_only_what_has_changed_is_judged_again(bundle: Path, photos: Path, tmp_path: Path) -> None:
    files = [tmp_path / one.name for one in sorted(photos.glob("00*.png"))[:20]]
    for one in files:
        shutil.copy(photos / one.name, one)
    task, listed = inspection(bundle), [Photo(str(one), str(one)) for one in files]
    rows = [row for row in task.judge(items_of(listed)) if row]
    again = [Item(one, Before(int(row["size"] or 0), row["sha256"])) for one, row in zip(listed, rows, strict=True)]
    assert task.judge(again) == [None] * 20
    shutil.copy(files[5], files[11])
    found = {i: row for i, row in enumerate(task.judge(again)) if row}
    assert list(found) == [11] and found[11]["sha256"] == rows[5]["sha256"] and found[11]["score"] is not None


def test_a_part_folder_goes_on_and_has_one_row_per_photo(bundle: Path, photos: Path, tmp_path: Path) -> None:
    files = sorted(map(str, photos.glob("*.png")))[:16]
    rows = [row for row in inspection(bundle).judge(items_of([Photo(one, one) for one in files])) if row]
    target = tmp_path / "rows"
    with PartFolder(target, "aaa") as folder, pytest.raises(ConfigError, match="another run is writing"):
        PartFolder(target, "aaa")
    for row in rows:
        row["bundle"] = "aaa"
    with PartFolder(target, "aaa") as folder:
        folder.append(rows[:8])
        folder.append(rows[8:])
    (target / "part-000009.parquet.part").write_bytes(b"cut short")
    with PartFolder(target, "aaa") as folder:
        assert len(folder.known) == 16 and not (target / "part-000009.parquet.part").exists()
        folder.append([rows[3] | {"status": "anomalous", "sha256": "0" * 16}])  # type: ignore[list-item]
    # Killed here: the later row counts, and the next end removes the earlier one.
    with PartFolder(target, "aaa") as folder:
        assert folder.known[rows[3]["file"]].status == "anomalous"
        folder.finish({"files": 16})
    found = rows_of(target)
    assert [row["path"] for row in found] == files and found[3]["status"] == "anomalous"
    assert json.loads((target / DONE).read_text())["rows"] == 16
    with pytest.raises(ConfigError, match="holds rows of bundle aaa, this one is bbb"):
        PartFolder(target, "bbb")
    with PartFolder(target, "bbb", resume=False) as folder:
        folder.append([row | {"bundle": "bbb"} for row in rows[:2]])  # type: ignore[misc]
    assert len(rows_of(target)) == 2
    (target / "others.parquet").touch()
    with pytest.raises(ConfigError, match="no inspection wrote"):
        PartFolder(target, "bbb")


class Killed(BaseException):
    """A worker's end, for a worker that is no process."""


class Killing(Task[str, str]):
    """Dies over one item."""

    batch = 4

    def __init__(self, killer: str, die: Callable[[], None]) -> None:
        self.killer, self.die = killer, die

    def open(self) -> None:
        """Nothing to load."""

    def judge(self, items: Sequence[str]) -> list[str]:
        if self.killer in items:
            self.die()
        return [one.upper() for one in items]

    def lost(self, item: str) -> str:
        return f"{item}: {LOST}"


def test_a_photo_that_ends_every_worker_gets_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die() -> None:
        raise Killed

    ledger, deaths = Ledger(), 0
    items = list("abcdefghij")
    table = pa.table({"group": [packed(0, items)]})
    while True:
        worker = Worker(Killing("f", die), None, 1, str(tmp_path))
        monkeypatch.setattr(worker, "_begin", ledger.begin)
        monkeypatch.setattr(worker, "_end", ledger.end)
        monkeypatch.setattr(worker, "_start", lambda: None)
        try:
            done = worker(table)
            break
        except Killed:
            deaths += 1
    assert pickle.loads(done.column("done")[0].as_py()) == (0, [*"ABCDE", f"f: {LOST}", *"GHIJ"])
    assert deaths == 1 + 2 * DEATHS


def test_without_ray_the_extra_is_named(bundle: Path, photos: Path, tmp_path: Path) -> None:
    code = f"import sys; sys.modules['ray'] = None\n{INSPECT}"
    done = command(code, bundle, photos, "--ray", "local", cwd=tmp_path)
    assert done.returncode == 1 and 'pip install "flowad-fast[ray]"' in done.stderr and done.stderr.count("\n") == 1
    for option in ("--workers", "--path-column"):
        done = command(INSPECT, bundle, photos, option, "1", cwd=tmp_path)
        assert done.returncode == 1 and f"{option} needs --ray" in done.stderr
    done = command(INSPECT, bundle, photos, "--ray", "local", "--overlays", "heat", cwd=tmp_path)
    assert done.returncode == 1 and "--overlays share a scale" in done.stderr


def test_classes_of_an_archive_are_given_once_and_where_there_are_some(bundle: Path, tmp_path: Path) -> None:
    conditional = make_bundle(tmp_path / "classes", invad=False)
    names = bundles.read(conditional)[1].model.classes.labels
    photo = tmp_path / "a.png"
    Image.fromarray(tiny_frames(1)[0]).save(photo)
    source = write_table(tmp_path / "a.parquet", {"photo": [str(photo)] * 2, "kind": [names[1], "no such class"]})

    def inspect(bundle: Path, **options: Any) -> None:
        settings = dict(resume=True, class_name=None, class_from_folder=False, engine="auto", device="cpu", batch=8)
        columns = Columns(path="photo", class_name=options.pop("column", None))
        workers = cluster.Workers("127.0.0.1:1")
        inspect_archive(bundle, str(source), tmp_path / "rows", workers, columns, json=True, **settings | options)

    with pytest.raises(ConfigError, match="unconditional but --class-column"):
        inspect(bundle, column="kind")
    with pytest.raises(ConfigError, match="expected one of them"):
        inspect(conditional, column="kind", class_name=names[0])
    with pytest.raises(ConfigError, match="--class-from-folder needs a folder"):
        inspect(conditional, class_from_folder=True)
    with pytest.raises(ConfigError, match="give --class or"):
        inspect(conditional)
    task = inspection(conditional)
    rows = task.judge(items_of([Photo(str(photo), "1", names[1]), Photo(str(photo), "2", "no such class")]))
    assert [row and (row["class"], row["status"]) for row in rows] == [(names[1], "good"), ("no such class", "error")]


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:1", "Ray at 127.0.0.1:1: .*refused"),
        ("ray://head:10001", "expected local, auto, or HOST:PORT"),
        ("nonsense", "expected local, auto, or HOST:PORT"),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(address: str, says: str) -> None:
    with pytest.raises(FlowADError, match=says), cluster.connected(cluster.Workers(address), by="this"):
        pass


# With a cluster, or one of the command's own


def test_a_cluster_of_its_own_gives_the_rows_of_one_process(
    bundle: Path, photos: Path, alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    target = tmp_path / "rows"
    done = command(INSPECT, bundle, photos, "--ray", "local", "--output", target, "--json")
    assert done.returncode == 0, done.stderr
    assert rows_of(target) == by_path(alone)
    summary = json.loads(done.stdout)
    assert summary["files"] == sum(summary["counts"].values()) == len(alone) and summary["from_earlier_runs"] == 0
    assert json.loads((target / DONE).read_text())["counts"] == summary["counts"]
    noise = [line for line in done.stderr.splitlines() if "inspecting" not in line]
    assert noise == [], noise


def test_an_interrupted_and_a_killed_driver_are_gone_on_with(
    nodes: Any, bundle: Path, photos: Path, alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    target, arguments = tmp_path / "rows", (bundle, photos, "--ray", nodes.address, "--json", "--output")
    running = start(INSPECT, *arguments, target)
    in_the_middle(running, target)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and "interrupted" in err
    first = len(list(target.glob("part-*.parquet")))
    assert not list(target.glob("*.part")) and not (target / DONE).exists() and rows_of(target)
    running = start(INSPECT, *arguments, target)
    in_the_middle(running, target, first + 1)
    running.kill()
    running.wait()
    kept = len(rows_of(target))
    assert 0 < kept < len(alone) and not (target / DONE).exists()
    done = command(INSPECT, *arguments, target)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["from_earlier_runs"] == kept
    assert rows_of(target) == by_path(alone)


def test_a_killed_worker_is_replaced_and_a_killed_node_done_without(
    nodes: Any, bundle: Path, photos: Path, alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    target = tmp_path / "rows"
    running = start(INSPECT, bundle, photos, "--ray", nodes.address, "--json", "--output", target)
    in_the_middle(running, target, 2)
    victims = workers_of(nodes.address)
    assert victims
    os.kill(victims[0], signal.SIGKILL)
    nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
    out, err = running.communicate(timeout=150)
    nodes.add_node(num_cpus=1, object_store_memory=100 << 20)
    assert running.returncode == 0, err
    assert rows_of(target) == by_path(alone) and json.loads(out)["files"] == len(alone)


def test_a_photo_that_kills_its_process_each_time_does_not_stop_the_job(nodes: Any) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    workers = cluster.Workers(nodes.address, 1)
    groups = [list("abcd"), list("efgh"), list("ijkl")]
    try:
        with cluster.connected(workers, by="this") as room:
            done = dict(cluster.run(Killing("g", lambda: os._exit(1)), groups, workers, room))
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert done == {0: list("ABCD"), 1: ["E", "F", f"g: {LOST}", "H"], 2: list("IJKL")}


def test_an_evaluation_is_that_of_one_process(nodes: Any, bundle: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for kind in ("train/good", "test/good", "test/bad", "ground_truth/bad"):
        (data / "bolt" / kind).mkdir(parents=True)
    mark = np.zeros((64, 64), np.uint8)
    mark[10:30, 10:30] = 255
    for i, frame in enumerate(tiny_frames(50, seed=4)):
        kind = "good" if i % 2 else "bad"
        Image.fromarray(frame).save(data / "bolt" / "test" / kind / f"{i:03}.png")
        if kind == "bad":
            Image.fromarray(mark).save(data / "bolt/ground_truth/bad" / f"{i:03}_mask.png")
    Image.fromarray(frame).save(data / "bolt/train/good/000.png")
    (data / "bolt/test/good/001.png").write_text("no photo")
    arguments = (bundle, "--data", data, "--threads", 1, "--json")
    ours, theirs = (command(EVALUATE, *arguments, *more) for more in (("--ray", nodes.address), ()))
    assert ours.returncode == theirs.returncode == 1 and ours.stderr == theirs.stderr
    assert "1 of 50 images are in no metric" in ours.stderr
    report = json.loads(ours.stdout)
    assert report == json.loads(theirs.stdout) and report["metrics"]["bolt"]["pixel_auroc"] is not None
