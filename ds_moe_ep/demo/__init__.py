"""The bundled model: a small trained OLMoE, its book, and prompts in the style of that book.

Owns copying the finished model to a user's folder, without importing torch. How the model was made
is `ds_moe_ep.demo.train`; its figures are in the README beside this file.
"""

import filecmp
import os
import shutil
from pathlib import Path

from ds_moe_ep.errors import CheckpointError

__all__ = ["MODEL_DIR", "write_demo_model"]

MODEL_DIR = Path(__file__).with_name("model")


def write_demo_model(out: Path) -> None:
    """Writes the bundled model to `out` as an ordinary Hugging Face directory, whole or not at all.

    Args:
        out: The folder to make, with its parents. It may exist if it is empty; if it holds this
            very model already, perhaps among other files, it is left as it is.

    Raises:
        CheckpointError: `out` holds something else, or cannot be written.
    """
    out = out.resolve()
    difference = _difference(out)
    if difference is None:
        return
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(
            f"{out} exists and is not the bundled model ({difference}): nothing was written. "
            f"Choose another folder, such as {out}-demo, or remove this one first."
        )
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()  # not copytree: the mode is that of any new folder
        for file in MODEL_DIR.iterdir():
            shutil.copyfile(file, partial / file.name)
        partial.replace(out)
    except OSError as error:
        if _difference(out) is not None:  # else another process wrote the same model meanwhile
            raise CheckpointError(f"cannot write the bundled model to {out}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _difference(folder: Path) -> str | None:
    """Names the first file that `folder` lacks or has otherwise than the bundled model, if any."""
    for file in sorted(MODEL_DIR.iterdir()):
        copy = folder / file.name
        if not copy.is_file():
            return f"no {file.name}"
        if not filecmp.cmp(file, copy, shallow=False):
            return f"another {file.name}"
    return None
