"""The expert-parallel MoE layer, its dispatchers, and the slow readable reference they are tested against."""

__all__: list[str] = []
