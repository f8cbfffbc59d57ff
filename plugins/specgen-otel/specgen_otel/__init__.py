"""OpenTelemetry: what the engine does for each request, as a span and as histograms."""

from __future__ import annotations

from specgen_otel.observer import Telemetry

__all__ = ["Telemetry", "plugin"]

plugin = Telemetry()
"""What the entry point names. It speaks to whatever providers the application has set, and to none costs nothing."""
