"""What this package does with Megatron itself: checks of arguments, layers, stand-ins for CPUs."""
