"""Forwarding: ProxyApp and what it alone needs."""
