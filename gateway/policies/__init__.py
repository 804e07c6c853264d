"""Decisions only: no await, no input or output, no clock, no ASGI."""
