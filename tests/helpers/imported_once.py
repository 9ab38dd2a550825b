"""Imports what ranks need, once for all processes that are forked from the one that does it."""

import importlib
import os

# What launch.py and ranks.py set too; libraries read it when they are imported.
os.environ.update(
    DS_ACCELERATOR="cpu",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TORCH_CPP_LOG_LEVEL="ERROR",
)

for _name in (
    "ds_moe_ep.infer_job",
    "ds_moe_ep.checkpoint.convert",
    "ds_moe_ep.bench.command",
    "transformers.models.olmoe",
    "transformers.models.qwen3_moe",
):
    importlib.import_module(_name)
