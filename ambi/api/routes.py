"""Every route, from the tables of the nouns."""

from __future__ import annotations

from ambi.api import (
    checkpoints,
    containers,
    events,
    images,
    logs,
    networks,
    ours,
    registry,
    stats,
    streams,
    system,
    trees,
    volumes,
)
from ambi.api.router import Router

ROUTER = Router(
    system.ROUTES,
    containers.ROUTES,
    checkpoints.ROUTES,
    streams.ROUTES,
    logs.ROUTES,
    stats.ROUTES,
    trees.ROUTES,
    images.ROUTES,
    registry.ROUTES,
    events.ROUTES,
    networks.ROUTES,
    volumes.ROUTES,
    ours.ROUTES,
)
