"""Process groups and the collectives that expert parallelism needs."""

__all__: list[str] = []
