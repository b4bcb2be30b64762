"""Where records and alarms go: one file per sink, each with its settings; `rows` turns events into JSON and back.

`SinkSettings` is the union of all settings, told apart by `kind`. A sink's library is imported when it is opened.
"""

from typing import Annotated

from pydantic import Field

from flowad_fast.line.sinks.base import SinkBase as SinkBase
from flowad_fast.line.sinks.database import DatabaseSettings
from flowad_fast.line.sinks.jsonl import JsonLinesSettings
from flowad_fast.line.sinks.modbus import ModbusSettings
from flowad_fast.line.sinks.mqtt import MqttSettings
from flowad_fast.line.sinks.opcua import OpcUaSettings
from flowad_fast.line.sinks.pictures import PicturesSettings
from flowad_fast.line.sinks.webhook import WebhookSettings

SinkSettings = Annotated[
    JsonLinesSettings
    | DatabaseSettings
    | ModbusSettings
    | MqttSettings
    | OpcUaSettings
    | PicturesSettings
    | WebhookSettings,
    Field(discriminator="kind"),
]
"""Settings of any sink, for fields of other settings."""
