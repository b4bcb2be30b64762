"""From camera to reject gate: parts in, exactly one outcome per part, in time or openly not.

`policy` decides and knows neither threads, clocks nor cameras; `runner` gives it threads; `sources` bring parts,
`sinks` take outcomes; `settings` is the file that `flowad-line` reads.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowad_fast.errors import LineStoppedError as LineStoppedError
    from flowad_fast.line.event import Alarm as Alarm
    from flowad_fast.line.event import Record as Record
    from flowad_fast.line.event import Sink as Sink
    from flowad_fast.line.health import Health as Health
    from flowad_fast.line.outcome import NoResult as NoResult
    from flowad_fast.line.runner import Line as Line
    from flowad_fast.line.settings import LineSettings as LineSettings
    from flowad_fast.line.settings import read_settings as read_settings
    from flowad_fast.line.sources import IteratorSource as IteratorSource
    from flowad_fast.line.sources import Shot as Shot
    from flowad_fast.line.sources import Source as Source

_HOMES = {
    "flowad_fast.errors": ("LineStoppedError",),
    "flowad_fast.line.event": ("Alarm", "Record", "Sink"),
    "flowad_fast.line.health": ("Health",),
    "flowad_fast.line.outcome": ("NoResult",),
    "flowad_fast.line.runner": ("Line",),
    "flowad_fast.line.settings": ("LineSettings", "read_settings"),
    "flowad_fast.line.sources": ("IteratorSource", "Shot", "Source"),
}
__all__ = [
    "Alarm",
    "Health",
    "IteratorSource",
    "Line",
    "LineSettings",
    "LineStoppedError",
    "NoResult",
    "Record",
    "Shot",
    "Sink",
    "Source",
    "read_settings",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for, so that parts of the line can be used without the rest."""
    for module, names in _HOMES.items():
        if name in names:
            from importlib import import_module

            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
