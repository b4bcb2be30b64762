"""The sink that moves the reject gate, against a Modbus TCP server that notes every write."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from line_servers import NOW, free_port, listening, record, until
from pydantic import ValidationError
from pymodbus.client import ModbusTcpClient
from pymodbus.pdu import ModbusPDU
from pymodbus.server import ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

from flowad_fast.errors import DeliveryError
from flowad_fast.line.event import Alarm, Record
from flowad_fast.line.outcome import NoResult
from flowad_fast.line.sinks.modbus import Modbus, ModbusSettings
from flowad_fast.stages.decision import Verdict

COIL, OUTCOME, NUMBER, HEARTBEAT = 2, 3, 4, 5
FUNCTIONS = {5: "coil", 6: "register"}


class Gate:
    """A device with ten coils and registers; `writes` has (what, address, value), `times` when each came."""

    def __init__(self) -> None:
        self.port = free_port()
        self.writes: list[tuple[str, int, int]] = []
        self.times: list[float] = []
        self.start()

    def start(self) -> None:
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self.thread.start()
        until(lambda: listening(self.port))

    async def _serve(self) -> None:
        bits = [SimData(0, count=10, values=False, datatype=DataType.BITS)]
        words = [SimData(0, count=10, values=0, datatype=DataType.REGISTERS)]
        self.loop = asyncio.get_running_loop()
        device = SimDevice(1, simdata=(bits, bits, words, words))
        self.server = ModbusTcpServer(device, address=("127.0.0.1", self.port), trace_pdu=self._saw)
        await self.server.serve_forever()

    def _saw(self, sending: bool, pdu: ModbusPDU) -> ModbusPDU:
        if not sending and pdu.function_code in FUNCTIONS:
            what = FUNCTIONS[pdu.function_code]
            self.times.append(time.monotonic())
            self.writes.append((what, pdu.address, int(pdu.bits[0]) if what == "coil" else pdu.registers[0]))
        return pdu

    def stop(self) -> None:
        if self.thread.is_alive():
            asyncio.run_coroutine_threadsafe(self.server.shutdown(), self.loop).result(10)
            self.thread.join(10)
            assert not self.thread.is_alive()

    def coil(self) -> list[int]:
        return [value for what, _, value in self.writes if what == "coil"]

    def register(self, address: int) -> list[int]:
        return [value for what, at, value in self.writes if what == "register" and at == address]


@pytest.fixture
def gate() -> Iterator[Gate]:
    one = Gate()
    yield one
    one.stop()


def settings(gate: Gate, **more: object) -> ModbusSettings:
    given = {"kind": "modbus", "host": "127.0.0.1", "port": gate.port, "coil": COIL, "max_age": 5, **more}
    return ModbusSettings.model_validate(given)


def fresh(part: str, result: Verdict | NoResult = Verdict.GOOD) -> Record:
    return record(part, result, datetime.now(UTC))


def test_coil_outcome_and_number_follow_the_parts(gate: Gate) -> None:
    sink = settings(gate, outcome=OUTCOME, number=NUMBER).open()
    results = [*Verdict, NoResult.LATE]
    sink.publish([Alarm("drift", NOW, "t"), *(fresh(str(one), one) for one in results)])
    sink.close()
    expected = [
        write
        for i, (on, code) in enumerate(zip((0, 1, 1, 1), (1, 2, 3, 4), strict=True))
        for write in (("coil", COIL, on), ("register", OUTCOME, code), ("register", NUMBER, i + 1))
    ]
    assert gate.writes == expected and sink.written == 4


def test_a_gate_that_only_passes_what_was_said_to_be_good(gate: Gate) -> None:
    sink = settings(gate, energised="pass").open()
    sink.publish([fresh("a"), fresh("b", Verdict.INVALID), fresh("c", NoResult.ENGINE_FAILED)])
    sink.close()
    assert gate.coil() == [1, 0, 0]


def test_a_pulse_ends_by_itself_and_the_next_reject_prolongs_it(gate: Gate) -> None:
    sink = settings(gate, pulse=0.6).open()
    sink.publish([fresh("a", Verdict.ANOMALOUS), fresh("b")])
    assert gate.coil() == [1]
    until(lambda: gate.coil() == [1, 0])
    assert 0.59 < gate.times[1] - gate.times[0] < 5
    sink.publish([fresh("c", Verdict.ANOMALOUS)])
    time.sleep(0.1)
    sink.publish([fresh("d", Verdict.ANOMALOUS)])
    until(lambda: gate.coil() == [1, 0, 1, 1, 0])
    assert gate.times[4] - gate.times[3] > 0.59
    sink.close()


def test_closing_ends_a_pulse_when_it_is_due(gate: Gate) -> None:
    sink = settings(gate, pulse=0.2).open()
    sink.publish([fresh("a", Verdict.ANOMALOUS)])
    sink.close()
    assert gate.coil() == [1, 0] and gate.times[1] - gate.times[0] > 0.19


def test_a_pulse_ends_also_when_the_device_was_away_in_between(gate: Gate) -> None:
    sink = settings(gate, pulse=0.2).open()
    sink.publish([fresh("a", Verdict.ANOMALOUS)])
    gate.stop()
    time.sleep(0.4)
    gate.start()
    until(lambda: gate.coil() == [1, 0])
    sink.close()


def test_the_heart_beats_before_the_first_part_and_after_the_device_was_away(gate: Gate) -> None:
    sink = settings(gate, heartbeat=HEARTBEAT, interval=0.05).open()
    until(lambda: gate.register(HEARTBEAT)[:3] == [1, 2, 3])
    gate.stop()
    before = len(gate.writes)
    time.sleep(0.2)
    gate.start()
    until(lambda: len(gate.writes) > before + 2)
    sink.close()
    assert gate.coil() == []
    beats, after = gate.register(HEARTBEAT), len(gate.writes)
    assert beats == sorted(beats)
    time.sleep(0.2)
    assert len(gate.writes) == after


@pytest.mark.parametrize("age", [0.6, -5.0])
def test_an_outcome_that_is_too_old_or_of_a_clock_that_was_set_back_never_moves_the_gate(
    gate: Gate, age: float
) -> None:
    sink = Modbus(settings(gate, max_age=0.5, number=NUMBER), now=lambda: NOW)
    old = record("old", Verdict.ANOMALOUS, NOW - timedelta(seconds=age))
    sink.publish([old, record("new", Verdict.GOOD, NOW - timedelta(seconds=0.1))])
    sink.close()
    assert gate.writes == [("coil", COIL, 0), ("register", NUMBER, 1)] and (sink.written, sink.missed) == (1, 1)


@pytest.mark.parametrize("wall_moves", [True, False])
def test_what_waited_for_a_dead_device_is_missed_whatever_the_wall_clock_says(gate: Gate, wall_moves: bool) -> None:
    wall, clock = [NOW], [100.0]
    sink = Modbus(settings(gate, max_age=0.5), now=lambda: wall[0], clock=lambda: clock[0])
    gate.stop()
    stale = record("stale", Verdict.ANOMALOUS, NOW)
    for _ in range(2):
        with pytest.raises(DeliveryError, match="cannot be reached; check address"):
            sink.publish([stale])
    gate.start()
    clock[0] += 1
    if wall_moves:
        wall[0] += timedelta(seconds=1)
    sink.publish([stale])
    sink.close()
    assert gate.writes == [] and sink.missed == 1


def test_an_outcome_that_becomes_too_old_while_connecting_is_not_written(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall, clock = [NOW], [100.0]
    sink = Modbus(settings(gate, max_age=0.5), now=lambda: wall[0], clock=lambda: clock[0])
    real = ModbusTcpClient.connect

    def slow(client: ModbusTcpClient) -> bool:
        clock[0] += 0.6
        wall[0] += timedelta(seconds=0.6)
        return bool(real(client))

    monkeypatch.setattr(ModbusTcpClient, "connect", slow)
    sink.publish([record("a", Verdict.ANOMALOUS, NOW)])
    sink.publish([record("b", Verdict.GOOD, wall[0])])
    sink.close()
    assert gate.writes == [("coil", COIL, 0)] and (sink.written, sink.missed) == (1, 1)


def test_a_device_that_hangs_is_given_up_and_what_it_did_not_read_is_withdrawn() -> None:
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        given = {"kind": "modbus", "host": "127.0.0.1", "port": hanging.getsockname()[1], "coil": 0, "timeout": 0.2}
        sink = ModbusSettings.model_validate({**given, "max_age": 5}).open()
        with pytest.raises(DeliveryError, match="writing coil 0 failed .*check that the device runs"):
            sink.publish([fresh("a", Verdict.ANOMALOUS)])
        connection, _ = hanging.accept()
        with connection, pytest.raises(ConnectionResetError):  # not the end of a connection that still delivers
            while connection.recv(100):
                pass
        sink.close()


def test_a_batch_that_fails_in_the_middle_moves_the_gate_once_for_each_part(gate: Gate) -> None:
    sink = settings(gate, number=NUMBER).open()
    a, b, c = fresh("a", Verdict.ANOMALOUS), fresh("b"), fresh("c", Verdict.ANOMALOUS)
    real = sink._write

    def fails(one: Record) -> None:
        if one is b:
            gate.stop()
        real(one)

    sink._write = fails  # type: ignore[method-assign]
    with pytest.raises(DeliveryError):
        sink.publish([a, b, c])
    sink._write = real  # type: ignore[method-assign]
    gate.start()
    sink.publish([a, b, c])
    sink.close()
    assert gate.coil() == [1, 0, 1] and gate.register(NUMBER) == [1, 2, 3] and sink.written == 3


def test_only_the_gates_own_cameras_move_it(gate: Gate) -> None:
    sink = settings(gate, cameras=("d",)).open()
    sink.publish([fresh("a", Verdict.ANOMALOUS)])
    sink.close()
    assert gate.writes == []


def test_check_moves_nothing_and_names_what_would_fail(gate: Gate) -> None:
    assert "nothing was written" in settings(gate, outcome=OUTCOME, heartbeat=HEARTBEAT, pulse=1).check()
    with pytest.raises(DeliveryError, match="reading coil 99 was refused with exception 2; check the address"):
        settings(gate, coil=99).check()
    with pytest.raises(DeliveryError, match="reading register 99 was refused"):
        settings(gate, number=99).check()
    assert gate.writes == []
    gate.stop()
    with pytest.raises(DeliveryError, match="cannot be reached"):
        settings(gate).check()
    with pytest.raises(ValidationError, match="got one register for two"):
        settings(gate, number=1, heartbeat=1)
