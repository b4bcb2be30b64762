"""Every outcome and alarm in a database: SQLite by default, or PostgreSQL."""

import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, field_validator

from flowad_fast.errors import ConfigError, DeliveryError, require
from flowad_fast.files import make_folder
from flowad_fast.line.event import Alarm, Record
from flowad_fast.line.sinks.base import Secret, SinkBase
from flowad_fast.line.sinks.rows import Json, digest, from_row, to_row

if TYPE_CHECKING:
    import sqlalchemy as sa

SCHEMA = 2
"""Version of the tables; a database with another one is refused."""
_DRIVERS = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg"}


class DatabaseSettings(SinkBase):
    """The tables `flowad_outcomes` and `flowad_alarms` of a database; they are made where they are missing."""

    promises_delivery: ClassVar[bool] = True

    kind: Literal["database"]
    url: str = "sqlite:///outcomes.sqlite"
    """`sqlite:///<path>` or `postgresql://<user>@<host>:<port>/<database>`, without a password."""
    password: Secret | None = None
    timeout: float = Field(default=10, gt=0, le=600)
    """Seconds until connecting, or waiting for another writer, is given up."""

    @field_validator("url")
    @classmethod
    def _known(cls, url: str) -> str:
        scheme, separator, rest = url.partition("://")
        if scheme not in _DRIVERS or not separator:
            raise ValueError("expected sqlite:///<path> or postgresql://<user>@<host>/<database>")
        if scheme == "sqlite" and not rest.removeprefix("/"):
            raise ValueError("expected a path after sqlite:///, a database in memory would be lost")
        if scheme == "postgresql" and ":" in rest.partition("@")[0] and "@" in rest:
            raise ValueError("has a password; put it into a file or an environment variable, and name that in password")
        return url

    def open(self) -> "Database":
        """The sink."""
        require("line", "sqlalchemy", by="the sink database")
        if self.url.startswith("postgresql"):
            require("line", "psycopg", by="the sink database")
        return Database(self)

    def check(self) -> str:
        """That the tables are there or can be made."""
        database = self.open()
        try:
            outcomes, alarms = database.counts()
        finally:
            database.close()
        return f"{self.url} has {outcomes} outcomes and {alarms} alarms"


class _Tables(NamedTuple):
    metadata: "sa.MetaData"
    schema: "sa.Table"
    outcomes: "sa.Table"
    alarms: "sa.Table"


def _tables() -> _Tables:
    import sqlalchemy as sa

    metadata, when = sa.MetaData(), sa.DateTime(timezone=True)
    number = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # SQLite counts up in an Integer only

    def key() -> tuple[sa.Column[int], sa.Column[str]]:
        """The digest tells whether an event is there already: it is given again when an answer was lost."""
        return sa.Column("id", number, primary_key=True), sa.Column(
            "digest", sa.String(64), nullable=False, unique=True
        )

    return _Tables(
        metadata,
        sa.Table("flowad_schema", metadata, sa.Column("version", sa.Integer, nullable=False)),
        sa.Table(
            "flowad_outcomes",
            metadata,
            *key(),
            sa.Column("part", sa.Text, nullable=False, index=True),
            sa.Column("camera", sa.Text, nullable=False),
            sa.Column("result", sa.String(16), nullable=False),
            sa.Column("action", sa.String(16), nullable=False),
            sa.Column("arrived", when, nullable=False, index=True),
            sa.Column("seconds", sa.Double, nullable=False),
            sa.Column("score", sa.Double),
            sa.Column("threshold", sa.Double),
            sa.Column("reason", sa.Text, nullable=False),
            sa.Column("bundle", sa.Text, nullable=False),
            sa.Column("timings", sa.JSON, nullable=False),
            sa.Column("regions", sa.JSON, nullable=False),
            sa.Column("stamp", sa.BigInteger),
        ),
        sa.Table(
            "flowad_alarms",
            metadata,
            *key(),
            sa.Column("kind", sa.Text, nullable=False),
            sa.Column("at", when, nullable=False, index=True),
            sa.Column("text", sa.Text, nullable=False),
            sa.Column("over", sa.Boolean, nullable=False),
            sa.Column("figures", sa.JSON, nullable=False),
        ),
    )


class Database:
    """A batch is committed as a whole, or `publish` raises; what is there already is left as it is.

    A NaN becomes NULL in SQLite; zero characters of text, which PostgreSQL cannot hold, become an escape in text.
    Safe from many threads.
    """

    def __init__(self, settings: DatabaseSettings) -> None:
        """Nothing is connected yet."""
        self._settings = settings
        self._tables = _tables()
        self._engine: sa.Engine | None = None
        self._lock = threading.Lock()

    def publish(self, events: list[Record | Alarm]) -> None:
        """Commit the events; DeliveryError or ConfigError on failure."""
        from sqlalchemy.dialects import postgresql, sqlite
        from sqlalchemy.exc import SQLAlchemyError

        insert = sqlite.insert if self._settings.url.startswith("sqlite") else postgresql.insert
        try:
            with self._connected().begin() as connection:
                for kind, table in ((Record, self._tables.outcomes), (Alarm, self._tables.alarms)):
                    if rows := [_columns(event) for event in events if isinstance(event, kind)]:
                        connection.execute(insert(table).on_conflict_do_nothing(index_elements=["digest"]), rows)
        except SQLAlchemyError as error:
            raise self._failure(error) from None

    def trace(self, part: str) -> tuple[Record, ...]:
        """All outcomes of a part, in the order in which they came, without pictures; DeliveryError on failure."""
        import sqlalchemy as sa

        table = self._tables.outcomes
        query = sa.select(table).where(table.c.part == _text(part)).order_by(table.c.id)
        try:
            with self._connected().connect() as connection:
                found = connection.execute(query).mappings().all()
        except sa.exc.SQLAlchemyError as error:
            raise self._failure(error) from None
        return tuple(map(_record, found))

    def counts(self) -> tuple[int, int]:
        """How many outcomes and alarms there are; DeliveryError on failure."""
        import sqlalchemy as sa

        try:
            with self._connected().connect() as connection:
                outcomes, alarms = (
                    connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
                    for table in (self._tables.outcomes, self._tables.alarms)
                )
        except sa.exc.SQLAlchemyError as error:
            raise self._failure(error) from None
        return outcomes, alarms

    def close(self) -> None:
        """Let go of connections."""
        with self._lock:
            if self._engine is not None:
                self._engine.dispose()
                self._engine = None

    def _connected(self) -> "sa.Engine":
        with self._lock:
            if self._engine is None:
                engine = self._make()
                try:
                    self._prepare(engine)
                except BaseException:
                    engine.dispose()
                    raise
                self._engine = engine
            return self._engine

    def _make(self) -> "sa.Engine":
        import sqlalchemy as sa

        settings = self._settings
        url = sa.make_url(settings.url)
        if url.get_backend_name() == "sqlite":
            assert url.database is not None
            make_folder(Path(url.database).parent)
            engine = sa.create_engine(url, connect_args={"timeout": settings.timeout}, hide_parameters=True)

            @sa.event.listens_for(engine, "connect")
            def _durable(connection: Any, _: object) -> None:
                cursor = connection.cursor()
                cursor.execute("PRAGMA journal_mode=WAL")  # readers never wait for the line, nor it for them
                cursor.execute("PRAGMA synchronous=FULL")  # what was committed survives a power cut
                cursor.close()

            return engine
        if settings.password is not None:
            url = url.set(password=settings.password.read())
        arguments = {"connect_timeout": max(1, round(settings.timeout)), "application_name": "flowad-line"}
        return sa.create_engine(
            url.set(drivername=_DRIVERS["postgresql"]),
            connect_args=arguments,
            pool_pre_ping=True,  # after a restart of the server the first use connects again
            hide_parameters=True,
        )

    def _prepare(self, engine: "sa.Engine") -> None:
        import sqlalchemy as sa

        tables = self._tables
        with engine.begin() as connection:
            if not sa.inspect(connection).has_table(tables.schema.name):
                tables.metadata.create_all(connection, checkfirst=False)
                connection.execute(sa.insert(tables.schema).values(version=SCHEMA))
            versions = connection.scalars(sa.select(tables.schema.c.version)).all()
        if versions != [SCHEMA]:
            got = ", ".join(map(str, versions)) or "none"
            raise ConfigError(
                f"{self._settings.url} has tables of schema version {got}, expected {SCHEMA}; give this line a "
                "database of its own, or run the version of flowad-fast that made them"
            )

    def _failure(self, error: Exception) -> DeliveryError:
        lines = str(getattr(error, "orig", None) or error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        return DeliveryError(
            f"{self._settings.url}: {reason}; check that the database runs, its address and password, and its disk"
        )


def _text(value: str) -> str:
    return value.replace("\0", "\\x00")


def _clean(value: Json) -> Json:
    match value:
        case str():
            return _text(value)
        case list():
            return [_clean(one) for one in value]
        case dict():
            return {_text(key): _clean(one) for key, one in value.items()}
        case _:
            return value


def _columns(event: Record | Alarm) -> dict[str, Any]:
    row = to_row(event)
    columns: dict[str, Any] = {key: _clean(value) for key, value in row.items() if key != "event"}
    if isinstance(event, Record):
        times: dict[str, datetime] = {"arrived": event.arrived}
        columns |= {key: getattr(event, key) for key in ("seconds", "score", "threshold")}
        columns |= {key: float(columns[key]) for key in ("score", "threshold") if columns[key] is not None}
    else:
        times = {"at": event.at}
    return columns | {key: when.astimezone(UTC) for key, when in times.items()} | {"digest": digest(row)}


def _record(found: "sa.RowMapping") -> Record:
    row: dict[str, Any] = {key: value for key, value in found.items() if key not in ("id", "digest")}
    arrived: datetime = row["arrived"]
    # SQLite gives back what was stored, UTC, without saying so; PostgreSQL in the time zone of the session.
    row["arrived"] = arrived.replace(tzinfo=UTC) if arrived.tzinfo is None else arrived.astimezone(UTC)
    event = from_row({"event": "record", **row})
    assert isinstance(event, Record)
    return event
