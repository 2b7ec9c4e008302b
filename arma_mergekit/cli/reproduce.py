"""`arma reproduce arma.lock.json out/`: the same merge again."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["command"]

DIFFERS = 1


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("lock", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace the model that is in OUT, as a whole.")
@click.option("--quiet", is_flag=True, help="Print differences and errors only.")
def command(lock: Path, out: Path, overwrite: bool, quiet: bool) -> int:
    """Merge again what LOCK (arma.lock.json) describes, into the directory OUT, and compare.

    Exit code 0: every file has the same bytes, whatever the versions and platform; 1: one does not, and every
    difference is listed with its grade: result, input (why), environment (harmless).
    """
    from arma_mergekit.cli.merge import run_merge
    from arma_mergekit.errors import CheckpointError
    from arma_mergekit.executor import merge_with_mergekit
    from arma_mergekit.merge import LOCK, compare_locks, pinned, read_lock

    file = lock / LOCK if lock.is_dir() else lock
    old = read_lock(file)
    path = Path(str(old.get("recipe_file", file)))
    if all(said["sha256"] is None for said in old["output"]["files"].values()):
        raise CheckpointError(
            f"{file} has no digests to compare with (--no-digests); use arma verify on the directory."
        )
    size = old["output"].get("shard_size")
    if old["executor"] == "arma":
        new = run_merge(pinned(old), path, out, True, overwrite=overwrite, shard_size=size)
    else:
        new = merge_with_mergekit(pinned(old), path, out, overwrite=overwrite, shard_size=size)
    found = compare_locks(old, new)
    for mismatch in found:
        if not quiet or mismatch.grade != "environment":
            click.echo(f"  {mismatch.grade}: {mismatch.sentence}")
    differs = any(mismatch.grade == "result" for mismatch in found)
    click.echo(f"{out}: {'not reproduced' if differs else 'reproduced to the byte'}.")
    return DIFFERS if differs else 0
