"""Pure expert-parallel inference of Hugging Face Mixture-of-Experts models on DeepSpeed.

Importing the package is cheap: nothing here imports torch, reads the environment or starts a
process group.
"""

__all__ = ["__version__"]
__version__ = "0.1.0"
