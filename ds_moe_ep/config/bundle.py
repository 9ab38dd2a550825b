"""Writes the folder of `ds-moe-ep config`: every generated file, or the reason why there is none.

What stands in a file is decided by the module of its format.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ds_moe_ep.config.accelerate import ACCELERATE_YAML, accelerate_yaml
from ds_moe_ep.config.deepspeed import (
    DS_INFERENCE_JSON,
    DS_TRAIN_AUTOEP_JSON,
    autoep_config,
    dtype_name,
    inference_config,
    require_pure_ep,
)
from ds_moe_ep.config.megatron import MEGATRON_ARGS, MegatronOptions, megatron_args
from ds_moe_ep.config.plan_file import (
    PLACEMENT_CSV,
    PLAN_JSON,
    make_plan_file,
    placement_csv,
    to_json,
)
from ds_moe_ep.config.scripts import RUN_SBATCH, RUN_SH, run_sbatch, run_sh
from ds_moe_ep.config.strict import read_json
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.hostfile import Cluster
from ds_moe_ep.model_spec import ModelSpec
from ds_moe_ep.plan import ParallelPlan, check_plan

__all__ = ["HOSTFILE", "BundleReport", "write_bundle"]

HOSTFILE = "hostfile"


@dataclass(frozen=True)
class BundleReport:
    """What was done to a folder.

    Attributes:
        out: the folder.
        written: names of the files written, sorted.
        not_written: name of each file that this model or plan has none of, and why. A file of that
            name from an earlier run was removed.
    """

    out: Path
    written: tuple[str, ...]
    not_written: Mapping[str, str]


def write_bundle(
    model: Path,
    cluster: Cluster,
    plan: ParallelPlan,
    spec: ModelSpec,
    out: Path,
    *,
    dtype: str | None = None,
    megatron: MegatronOptions | None = None,
    monitor: Mapping[str, Any] | None = None,
) -> BundleReport:
    """Write all files for running a model under a plan.

    The same input gives the same bytes. Files of other names in the folder are left alone.
    plan.json comes last and its old version goes first, so a folder that has one is whole.

    Args:
        model: the model directory or bare config.json, as the user named it.
        cluster: the GPUs.
        plan: sizes that fill the cluster.
        spec: what `read_model_spec(model)` returned.
        out: the folder, made if it is not there.
        dtype: type of the weights at run time; by default the model's own.
        megatron: how Megatron is to compute the model; by default, by Transformer Engine.
        monitor: sections for DeepSpeed's monitor, by name; they go into both of its files.

    Raises:
        ConfigError: if the model has no experts or the folder cannot be written. Nothing was then
            written, or the folder has no plan.json.
        PlanError: if the plan does not fit the cluster or the model.
    """
    check_plan(plan, cluster, spec)
    _check_hosts(cluster)
    if not spec.is_moe:
        require_pure_ep(plan, spec)
    if dtype is not None:
        spec = replace(spec, dtype=dtype_name(dtype))
    texts: dict[str, str] = {}
    not_written: dict[str, str] = {}
    makers = _makers(model, cluster, plan, spec, megatron or MegatronOptions(), monitor or {})
    for name, make in makers.items():
        try:
            texts[name] = make()
        except ConfigError as error:
            not_written[name] = str(error)
    try:
        _replace_files(out, texts, obsolete=not_written)
    except OSError as error:
        raise ConfigError(
            f"--out {out}: cannot be written ({error.strerror}: {error.filename}). Name a folder "
            f"that can be written."
        ) from None
    return BundleReport(out, tuple(sorted(texts)), not_written)


def _makers(
    model: Path,
    cluster: Cluster,
    plan: ParallelPlan,
    spec: ModelSpec,
    megatron: MegatronOptions,
    monitor: Mapping[str, Any],
) -> dict[str, Callable[[], str]]:
    """Return how each file is made; what raises ConfigError says why there is none."""

    def for_infer(make: Callable[[], str]) -> Callable[[], str]:
        # What starts launch/infer.py is of no use where that refuses the plan.
        def checked() -> str:
            require_pure_ep(plan, spec)
            return make()

        return checked

    return {
        DS_INFERENCE_JSON: lambda: to_json({**inference_config(plan, spec), **monitor}),
        DS_TRAIN_AUTOEP_JSON: lambda: to_json({**autoep_config(plan, spec), **monitor}),
        ACCELERATE_YAML: for_infer(lambda: accelerate_yaml(cluster)),
        MEGATRON_ARGS: lambda: megatron_args(plan, spec, _config_json(model), megatron),
        HOSTFILE: cluster.to_hostfile,
        PLACEMENT_CSV: lambda: placement_csv(plan, spec, cluster),
        PLAN_JSON: lambda: to_json(make_plan_file(plan, spec, cluster).model_dump()),
        RUN_SH: for_infer(lambda: run_sh(model, cluster)),
        RUN_SBATCH: for_infer(lambda: run_sbatch(model, cluster)),
    }


def _check_hosts(cluster: Cluster) -> None:
    """Refuse host names that a hostfile cannot hold or ssh would take for an option.

    Raises:
        ConfigError: naming the host.
    """
    for host in cluster.hosts:
        if not re.fullmatch(r"[^\s#-]\S*", host.name) or not host.name.isprintable():
            raise ConfigError(
                f"host {host.name!r} of {cluster.source} cannot stand in a hostfile. Use a name "
                f"without spaces that does not start with - or #."
            )


def _config_json(model: Path) -> dict[str, Any]:
    return read_json(model / "config.json" if model.is_dir() else model)


def _replace_files(out: Path, texts: Mapping[str, str], *, obsolete: Iterable[str]) -> None:
    """Put files in the place of their old versions, each in one step."""
    out.mkdir(parents=True, exist_ok=True)
    staged = {name: out / f".{name}.{os.getpid()}.tmp" for name in texts}
    try:
        for name, text in texts.items():
            staged[name].write_text(text, encoding="utf-8", newline="\n")
            if name == RUN_SH:
                mode = staged[name].stat().st_mode
                staged[name].chmod(mode | (mode & 0o444) >> 2)  # by those who may read it
        for name in (PLAN_JSON, *obsolete):
            (out / name).unlink(missing_ok=True)
        for name in sorted(texts, key=PLAN_JSON.__eq__):
            staged[name].replace(out / name)
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)
