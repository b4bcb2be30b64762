"""The database sink on SQLite and on a PostgreSQL server of its own."""

import math
import os
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta, timezone
from pathlib import Path

import pytest
from line_servers import NOW, free_port, listening, program, record
from pydantic import ValidationError

from flowad_fast.errors import ConfigError, DeliveryError
from flowad_fast.line.event import Alarm
from flowad_fast.line.outcome import NoResult
from flowad_fast.line.sinks.base import Secret
from flowad_fast.line.sinks.database import Database, DatabaseSettings
from flowad_fast.stages.regions import Region

REGION = Region((1, 2, 3, 4), 5.5, math.inf, ((1, 2), (3, 4)), "minor")
PASSWORD = "sesame, open"


class Postgres:
    """A private cluster in a folder, by a user who is not root."""

    def __init__(self, folder: Path) -> None:
        versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
        self.initdb = program("initdb", "postgresql", *versions)
        self.ctl = program("pg_ctl", "postgresql", *versions)
        self.folder, self.port, self.user = folder, free_port(), None
        if os.geteuid() == 0:
            self.user = "postgres"
            shutil.chown(folder, self.user)
        (folder / "password").write_text(PASSWORD)
        (folder / "password").chmod(0o644)
        self.run(
            self.initdb, "-D", folder / "data", "-A", "scram-sha-256", "-U", "line", "--pwfile", folder / "password"
        )

    def run(self, *command: str | Path) -> None:
        done = subprocess.run(command, user=self.user, cwd=self.folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        options = f"-p {self.port} -h 127.0.0.1 -k {self.folder} -c fsync=off -c timezone=Asia/Tokyo"
        command = (self.ctl, "-D", self.folder / "data", "-w", "-l", self.folder / "log", "-o", options, "start")
        subprocess.run(command, user=self.user, cwd=self.folder, check=True, timeout=60, stdout=subprocess.DEVNULL)

    def stop(self) -> None:
        self.run(self.ctl, "-D", self.folder / "data", "-w", "-m", "immediate", "stop")

    def emptied(self) -> DatabaseSettings:
        sink = Database(self.settings())
        with sink._make().begin() as connection:
            sink._tables.metadata.drop_all(connection)
        return self.settings()

    def settings(self, **more: object) -> DatabaseSettings:
        url = f"postgresql://line@127.0.0.1:{self.port}/postgres"
        secret = Secret(file=self.folder / "password")
        return DatabaseSettings.model_validate(
            {"kind": "database", "url": url, "password": secret, "timeout": 5, **more}
        )


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    folder = Path(tempfile.mkdtemp(prefix="flowad-postgres-"))
    try:
        server = Postgres(folder)
        server.start()
        try:
            yield server
        finally:
            if listening(server.port):
                server.stop()
    finally:
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> DatabaseSettings:
    if request.param == "sqlite":
        return DatabaseSettings(kind="database", url=f"sqlite:///{tmp_path}/new/line.sqlite")
    server: Postgres = request.getfixturevalue("postgres")
    return server.emptied()


def test_every_field_comes_back_by_the_parts_id(settings: DatabaseSettings) -> None:
    sink = settings.open()
    tokyo = NOW.astimezone(timezone(timedelta(hours=9)))
    full = replace(
        record("p'; drop table flowad_outcomes; --é\u2028", NoResult.LATE, tokyo), score=-math.inf, regions=(REGION,)
    )
    empty = replace(record("q"), score=None, threshold=None, bundle="", timings={}, reason="none")
    sink.publish([full, Alarm("drift", NOW, "t", True, {"p": math.inf}), empty])
    assert sink.trace(full.part) == (full,) and sink.trace("q") == (empty,) and sink.trace("r") == ()
    assert sink.counts() == (2, 1)
    sink.close()
    assert sink.trace("q") == (empty,)
    sink.close()


def test_text_that_a_database_cannot_hold_is_kept_readable(settings: DatabaseSettings) -> None:
    sink = settings.open()
    sink.publish([replace(record("a\0b"), reason="\udcff", timings={"\0": 1.0})])
    (found,) = sink.trace("a\0b")
    assert (found.part, found.reason, found.timings) == ("a\\x00b", "\\udcff", {"\\x00": 1.0})
    sink.close()


def test_an_event_that_is_given_again_is_there_once(settings: DatabaseSettings) -> None:
    sink = settings.open()
    events = [record("a"), Alarm("drift", NOW, "t"), record("a", arrived=NOW + timedelta(seconds=1))]
    sink.publish(events[:2])
    sink.publish(events)
    sink.close()
    assert sink.counts() == (2, 1)
    assert [one.arrived for one in sink.trace("a")] == [NOW, NOW + timedelta(seconds=1)]
    sink.close()


def test_a_batch_is_there_as_a_whole_or_not_at_all(settings: DatabaseSettings) -> None:
    sink = settings.open()
    sink.publish([record("a")])
    with sink._connected().begin() as connection:
        connection.exec_driver_sql("alter table flowad_alarms rename to elsewhere")
    with pytest.raises(DeliveryError, match="flowad_alarms") as caught:
        sink.publish([record("b"), Alarm("drift", NOW, "t")])
    assert "\n" not in str(caught.value) and PASSWORD not in str(caught.value)
    assert sink.trace("b") == ()
    with sink._connected().begin() as connection:
        connection.exec_driver_sql("alter table elsewhere rename to flowad_alarms")
    sink.publish([record("b"), Alarm("drift", NOW, "t")])
    assert sink.counts() == (2, 1)
    sink.close()


def test_tables_of_another_version_are_refused(settings: DatabaseSettings) -> None:
    assert settings.check().endswith("has 0 outcomes and 0 alarms")
    sink = settings.open()
    with sink._connected().begin() as connection:
        connection.execute(sink._tables.schema.update().values(version=7))
    sink.close()
    expected = "has tables of schema version 7, expected 2; give this line a database of its own"
    with pytest.raises(ConfigError, match=expected):
        settings.check()
    with pytest.raises(ConfigError, match=expected):
        sink.publish([record("a")])


def test_sqlite_readers_and_the_line_do_not_wait_for_each_other(tmp_path: Path) -> None:
    sink = DatabaseSettings(kind="database", url=f"sqlite:///{tmp_path}/line.sqlite", timeout=0.2).open()
    sink.publish([record("a")])
    reader = sqlite3.connect(tmp_path / "line.sqlite", isolation_level=None)
    reader.execute("begin")
    assert reader.execute("select count(*) from flowad_outcomes").fetchone() == (1,)
    sink.publish([record("b")])
    assert reader.execute("pragma journal_mode").fetchone() == ("wal",)
    reader.execute("rollback")
    reader.execute("begin immediate")
    with pytest.raises(DeliveryError, match="database is locked"):
        sink.publish([record("c")])
    reader.execute("rollback")
    sink.publish([record("c")])
    assert sink.counts() == (3, 0)
    reader.close()
    sink.close()


def test_postgresql_may_be_down_at_the_start_and_die_in_between(postgres: Postgres) -> None:
    settings = postgres.emptied()
    sink = settings.open()
    sink.publish([record("before")])
    postgres.stop()
    for _ in range(2):
        with pytest.raises(DeliveryError, match="check that the database runs"):
            sink.publish([record("during")])
    later = settings.open()
    with pytest.raises(DeliveryError, match="check that the database runs"):
        later.publish([record("later")])
    postgres.start()
    sink.publish([record("during")])
    later.publish([record("later")])
    postgres.stop()
    postgres.start()
    sink.publish([record("after a restart that nobody saw")])
    assert all(len(sink.trace(part)) == 1 for part in ("before", "during", "later"))
    sink.close()
    later.close()


def test_a_wrong_password_is_an_error_and_no_password_is_ever_shown(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINE_PASSWORD", "wrong-one")
    settings = postgres.settings(password=Secret(env="LINE_PASSWORD"))
    with pytest.raises(DeliveryError, match="password authentication failed") as caught:
        settings.check()
    assert "wrong-one" not in str(caught.value) + repr(settings)
    monkeypatch.delenv("LINE_PASSWORD")
    with pytest.raises(ConfigError, match="LINE_PASSWORD is not set"):
        settings.check()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://a@b/c", "expected sqlite:///<path> or postgresql://"),
        ("sqlite://", "expected a path"),
        ("postgresql://line:secret@host/db", "has a password; put it into a file"),
    ],
)
def test_other_databases_and_passwords_in_settings_are_refused(url: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DatabaseSettings(kind="database", url=url)
