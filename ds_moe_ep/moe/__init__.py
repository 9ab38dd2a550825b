"""The expert-parallel MoE layer, its dispatchers, and the readable reference they must equal."""

__all__: list[str] = []
