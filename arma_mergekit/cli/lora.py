"""`arma lora BASE+ADAPTER --out DIR`: a CURLoRA adapter as the LoRA adapter that does the same."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["command"]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of the LoRA adapter.")
def command(model: str, out: Path) -> None:
    """Write the CURLoRA adapter of MODEL, which is BASE+ADAPTER, as a LoRA adapter, for whatever serves LoRA.

    Nothing is lost: W + alpha C U R has rank r. It becomes larger, r (in + out) numbers a matrix instead of r^2 + 2 r.
    """
    from arma_mergekit.cli.tune import quiet_libraries

    quiet_libraries()
    from arma_mergekit.checkpoint import ModelReference, open_model
    from arma_mergekit.continual.curlora import save_as_lora
    from arma_mergekit.errors import RunError
    from arma_mergekit.finetune import load_adapted

    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out} is not empty; name another directory.")
    save_as_lora(out, load_adapted(open_model(model), "curlora"))
    click.echo(f"{out}: a LoRA adapter. In a recipe: `model: {ModelReference.parse(model).model}+{out}`.")
