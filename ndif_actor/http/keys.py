"""What handlers find in the application."""

from __future__ import annotations

from aiohttp import web

from ndif_actor.config import ServerConfig
from ndif_actor.coordinator.coordinator import Coordinator
from ndif_actor.http.auth import Authenticator
from ndif_actor.http.body import Uploads

CONFIG = web.AppKey("config", ServerConfig)
COORDINATOR = web.AppKey("coordinator", Coordinator)
AUTHENTICATOR = web.AppKey("authenticator", Authenticator)
UPLOADS = web.AppKey("uploads", Uploads)
OPENAPI = web.AppKey("openapi", bytes)
