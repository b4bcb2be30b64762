"""Where parts come from: one file per source, each with its settings; `SourceSettings` is their union."""

from typing import Annotated

from pydantic import Field

from flowad_fast.line.sources.base import EndOfSource as EndOfSource
from flowad_fast.line.sources.base import Shot as Shot
from flowad_fast.line.sources.base import Source as Source
from flowad_fast.line.sources.folder import FolderSettings
from flowad_fast.line.sources.gige import GigeSettings
from flowad_fast.line.sources.iterator import IteratorSource as IteratorSource
from flowad_fast.line.sources.recorded import RecordedSettings
from flowad_fast.line.sources.video import VideoSettings

SourceSettings = Annotated[
    FolderSettings | GigeSettings | RecordedSettings | VideoSettings, Field(discriminator="kind")
]
"""Settings of any source, for fields of other settings."""
