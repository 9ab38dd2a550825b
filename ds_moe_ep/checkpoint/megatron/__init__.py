"""Converts Hugging Face checkpoints to Megatron's torch_dist format and back, without Megatron."""
