"""The gateway as an ASGI application, for those who bring their own server: ``uvicorn gateway.main:app``."""

import sys

from gateway.app import create_app
from gateway.settings import Settings, SettingsError

# gunicorn starts a worker that exited with 2 again and again; 4 is its own word for an application that can't be loaded
MISTAKEN = 4 if "gunicorn" in sys.modules else 2

try:
    app = create_app(Settings.from_environment())
except SettingsError as mistakes:
    sys.stderr.write(f"{mistakes}\n")
    raise SystemExit(MISTAKEN) from None
