"""One concern, one module, one class: each layer wraps any ASGI application."""
