"""The reject gate: a coil of a Modbus TCP device, with a heartbeat that says whether the line is alive."""

import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from flowad_fast.errors import DeliveryError, require
from flowad_fast.line.event import Alarm, Record
from flowad_fast.line.sinks.base import SinkBase, code

if TYPE_CHECKING:
    from pymodbus.client import ModbusTcpClient
    from pymodbus.pdu import ModbusPDU

_log = logging.getLogger(__name__)
_Address = Field(ge=0, le=65535)


class ModbusSettings(SinkBase):
    """A coil, and optionally registers, of one device. Addresses are those on the wire: the first is 0.

    Outcomes are written in order: coil, outcome register, then the number register, so that a controller that sees a
    new number finds everything else in place.
    """

    promises_delivery: ClassVar[bool] = False

    kind: Literal["modbus"]
    host: str = Field(min_length=1)
    port: int = Field(default=502, ge=1, le=65535)
    device: int = Field(default=1, ge=0, le=255)
    """Unit identifier."""
    coil: int = _Address
    energised: Literal["reject", "pass"] = "reject"
    """When the coil is on: for parts that are rejected (stopping the line counts as that), or for those that pass, so
    that a dead line or a broken wire rejects."""
    pulse: float | None = Field(default=None, gt=0, le=60)
    """Seconds that the coil stays on; the next part that switches it on in that time prolongs it. None: until the next
    part switches it off."""
    max_age: float = Field(default=0.5, gt=0, le=60)
    """Seconds from a part's arrival until its outcome is too late for the gate. It is then never written: it would
    move the gate for another part."""
    outcome: int | None = Field(default=None, ge=0, le=65535)
    """Holding register of the last outcome: 1 good, 2 anomalous, 3 invalid, 4 no result; 0 before the first."""
    number: int | None = Field(default=None, ge=0, le=65535)
    """Holding register that counts outcomes, 1 to 65535 and again from 1."""
    heartbeat: int | None = Field(default=None, ge=0, le=65535)
    """Holding register that is counted up while the line is alive, 1 to 65535 and again from 1."""
    interval: float = Field(default=0.5, gt=0, le=60)
    """Seconds between heartbeats."""
    cameras: tuple[str, ...] = ()
    """Only outcomes of these cameras; all where empty."""
    timeout: float = Field(default=1, gt=0, le=60)
    """Seconds until connecting, or an answer, is given up. What the network holds back until then is withdrawn."""

    @model_validator(mode="after")
    def _apart(self) -> "ModbusSettings":
        registers = [one for one in (self.outcome, self.number, self.heartbeat) if one is not None]
        if len(registers) != len(set(registers)):
            raise ValueError("got one register for two of outcome, number and heartbeat, expected one for each")
        return self

    def open(self) -> "Modbus":
        """The sink; its heart beats from now on."""
        require("line", "pymodbus", by="the sink modbus")
        return Modbus(self)

    def check(self) -> str:
        """That the device answers and has the coil and registers; nothing is written."""
        require("line", "pymodbus", by="the sink modbus")
        device = _Device(self)
        try:
            device.call(f"reading coil {self.coil}", lambda it: it.read_coils(self.coil, device_id=self.device))
            for register in (self.outcome, self.number, self.heartbeat):
                if register is not None:
                    read = partial(_read, address=register, device=self.device)
                    device.call(f"reading register {register}", read)
        finally:
            device.close()
        return f"{self.host}:{self.port} has coil {self.coil} and the registers; nothing was written"


def _read(client: "ModbusTcpClient", address: int, device: int) -> "ModbusPDU":
    return client.read_holding_registers(address, device_id=device)


class _Device:
    """One connection, made when it is needed and let go after every failure."""

    def __init__(self, settings: ModbusSettings) -> None:
        self._settings = settings
        self._where = f"{settings.host}:{settings.port}"
        self._client: ModbusTcpClient | None = None

    def connect(self) -> "ModbusTcpClient":
        """The client, connected; DeliveryError where the device is not there."""
        from pymodbus.client import ModbusTcpClient

        settings = self._settings
        if self._client is None:
            client = ModbusTcpClient(settings.host, port=settings.port, timeout=settings.timeout, retries=0)
            if not client.connect():
                client.close()
                raise DeliveryError(f"{self._where} cannot be reached; check address, cable and that the device runs")
            # When it is let go, forget what was not sent: a cable that comes back must not bring an old outcome.
            assert client.socket is not None
            client.socket.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
            )
            self._client = client
        return self._client

    def call(self, doing: str, use: "Callable[[ModbusTcpClient], ModbusPDU]") -> None:
        """Ask the device; DeliveryError where it is not there, does not answer or refuses."""
        from pymodbus.exceptions import ModbusException

        client = self.connect()
        try:
            answer = use(client)
        except (ModbusException, OSError) as error:
            self.close()
            raise DeliveryError(f"{self._where}: {doing} failed ({error}); check that the device runs") from None
        if answer.isError():
            number = getattr(answer, "exception_code", "?")
            raise DeliveryError(
                f"{self._where}: {doing} was refused with exception {number}; check the address and the unit identifier"
            )

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


class Modbus:
    """Outcomes to a gate, which knows no alarms; safe from its own two threads.

    Attributes:
        written, missed: outcomes that the gate got, and those that were too old.
    """

    def __init__(
        self,
        settings: ModbusSettings,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the heartbeat, where there is one.

        Args:
            settings: of the device.
            now: wall clock, UTC, on which parts arrived.
            clock: monotonic, for the age of what is given again.
        """
        self._settings, self._now, self._clock = settings, now, clock
        self.written = self.missed = 0
        self._device = _Device(settings)
        self._number = self._beats = 0
        self._off_at: float | None = None
        """When the coil is to be switched off, monotonic."""
        self._seen: dict[tuple[str, str, datetime], float] = {}
        """When outcomes that are not done were given first, monotonic."""
        self._done: set[tuple[str, str, datetime]] = set()
        """Outcomes of a batch that failed that are done, and are not to move the gate once more."""
        self._lock = threading.Lock()  # one conversation with the device at a time
        self._change = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        if settings.heartbeat is not None or settings.pulse is not None:
            self._thread = threading.Thread(target=self._beat, name="modbus heartbeat", daemon=True)
            self._thread.start()

    def publish(self, events: list[Record | Alarm]) -> None:
        """Move the gate for each outcome, in order; DeliveryError on failure, after which no outcome is done twice."""
        records = [one for one in events if isinstance(one, Record)]
        if self._settings.cameras:
            records = [one for one in records if one.camera in self._settings.cameras]
        started = self._clock()
        for record in records:
            self._seen.setdefault(_key(record), started)
        for record in records:
            key = _key(record)
            if key in self._done:
                continue
            with self._lock:
                self._device.connect()  # before the age is looked at, for it may take long
                if self._late(record):
                    self.missed += 1
                    _log.warning("sink modbus: the outcome of part %r is too old for the gate", record.part)
                else:
                    self._write(record)
                    self.written += 1
            self._done.add(key)
        self._seen.clear()
        self._done.clear()

    def close(self) -> None:
        """End a pulse when it is due, stop the heartbeat, and leave the coil as it is."""
        self._closing = True
        self._change.set()
        if self._thread is not None:
            self._thread.join((self._settings.pulse or 0) + 2 * self._settings.timeout + self._settings.interval)
        with self._lock:
            self._device.close()

    def _late(self, record: Record) -> bool:
        """Whether a part is too old, on either clock; one that arrives in the future is, for the clock was set back."""
        age = (self._now() - record.arrived).total_seconds()
        waited = record.seconds + self._clock() - self._seen[_key(record)]
        return not 0 <= age <= self._settings.max_age or waited > self._settings.max_age

    def _write(self, record: Record) -> None:
        settings = self._settings
        on = (record.action == "pass") == (settings.energised == "pass")
        if settings.pulse is None:
            self._coil(on)
        elif on:
            # Before the writing too: where its answer is lost the coil may be on, and must go off all the same.
            self._off_at = self._clock() + settings.pulse
            self._coil(True)
            self._off_at = self._clock() + settings.pulse
            self._change.set()
        if settings.outcome is not None:
            self._register(settings.outcome, code(record.result))
        if settings.number is not None:
            self._register(settings.number, self._number % 65535 + 1)
        self._number += 1

    def _coil(self, on: bool) -> None:
        address, device = self._settings.coil, self._settings.device
        self._device.call(f"writing coil {address}", lambda it: it.write_coil(address, on, device_id=device))

    def _register(self, address: int, value: int) -> None:
        device = self._settings.device
        self._device.call(f"writing register {address}", lambda it: it.write_register(address, value, device_id=device))

    def _beat(self) -> None:
        """The second thread: heartbeats and the ends of pulses, tried again until they are through."""
        beats = self._settings.heartbeat is not None
        next_beat = self._clock()
        failing = False
        while not (self._closing and self._off_at is None):
            now = self._clock()
            due = min([next_beat] * beats + [at for at in (self._off_at,) if at is not None], default=now + 60)
            if due > now:
                self._change.wait(due - now)
                self._change.clear()
                continue
            try:
                with self._lock:
                    if self._off_at is not None and self._off_at <= now:
                        self._coil(False)
                        self._off_at = None
                if self._settings.heartbeat is not None and next_beat <= now:
                    next_beat = now + self._settings.interval
                    with self._lock:
                        self._register(self._settings.heartbeat, self._beats % 65535 + 1)
                    self._beats += 1
                failing = False
            except DeliveryError as error:
                if not failing:
                    _log.warning("sink modbus: %s", error)
                failing = True
                if self._closing:
                    return
                time.sleep(0.05)


def _key(record: Record) -> tuple[str, str, datetime]:
    return record.camera, record.part, record.arrived
