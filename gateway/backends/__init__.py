"""The outside world: Redis, Qdrant, and what stands in for them in memory."""
