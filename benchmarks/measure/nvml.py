"""What the driver says about the first visible GPU, through nvidia-ml-py; None where there is no GPU."""

from typing import Any

from flowad_fast.benchmarks.record.machine import Gpu


def _handle() -> tuple[Any, Any] | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
    except pynvml.NVMLError:
        return None


def state() -> Gpu | None:
    """Name, driver, power draw and cap (W), clocks (MHz), temperature (°C) and active throttle reasons."""
    found = _handle()
    if found is None:
        return None
    lib, gpu = found
    reasons = _ask(lib, lib.nvmlDeviceGetCurrentClocksEventReasons, gpu)
    names = {
        getattr(lib, name): name.removeprefix("nvmlClocksEventReason")
        for name in dir(lib)
        if name.startswith("nvmlClocksEventReason") and isinstance(getattr(lib, name), int)
    }
    power, cap = _ask(lib, lib.nvmlDeviceGetPowerUsage, gpu), _ask(lib, lib.nvmlDeviceGetEnforcedPowerLimit, gpu)
    return Gpu(
        name=_text(_ask(lib, lib.nvmlDeviceGetName, gpu)),
        driver=_text(_ask(lib, lib.nvmlSystemGetDriverVersion)),
        power_w=None if power is None else power / 1000,
        power_cap_w=None if cap is None else cap / 1000,
        sm_clock_mhz=_ask(lib, lib.nvmlDeviceGetClockInfo, gpu, lib.NVML_CLOCK_SM),
        memory_clock_mhz=_ask(lib, lib.nvmlDeviceGetClockInfo, gpu, lib.NVML_CLOCK_MEM),
        temperature_c=_ask(lib, lib.nvmlDeviceGetTemperature, gpu, lib.NVML_TEMPERATURE_GPU),
        throttle_reasons=None
        if reasons is None
        else tuple(
            sorted(name for bit, name in names.items() if bit and reasons & bit and name not in ("None", "All"))
        ),
    )


def process_memory(pid: int) -> int | None:
    """Bytes of GPU memory that the driver accounts to process `pid`; None where it does not say (some containers)."""
    found = _handle()
    if found is None:
        return None
    lib, gpu = found
    for process in _ask(lib, lib.nvmlDeviceGetComputeRunningProcesses, gpu) or ():
        if process.pid == pid:
            return process.usedGpuMemory
    return None


def _ask(lib: Any, question: Any, *arguments: Any) -> Any:
    """An answer, or None where this GPU or driver does not support the question."""
    try:
        return question(*arguments)
    except lib.NVMLError:
        return None


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value
