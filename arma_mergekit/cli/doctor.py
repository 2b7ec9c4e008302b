"""``arma doctor``: does mergekit see ``merge_method: arma``, and if not, why not.

The verdict is what a new interpreter says, started where `mergekit-yaml` is; the other checks explain it.
"""

from __future__ import annotations

import json
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import click

__all__ = ["Check", "command"]

# From 3.15 on Python reads <name>.start, and then ignores the import line of <name>.pth (PEP 829).
START_FILE = "arma_mergekit.start" if sys.version_info >= (3, 15) else "arma_mergekit.pth"
WITHOUT = "run `python -m arma_mergekit.mergekit_yaml`, or `import arma_mergekit.method` before merging"
PROBE = """
import json, sys, warnings
hook = any(type(finder).__module__ == "arma_mergekit.plugin" for finder in sys.meta_path)
seen = {"hook": hook, "owner": None, "error": ""}
warnings.simplefilter("ignore")
try:
    from mergekit.merge_methods.registry import get
    seen["owner"] = type(get("arma")).__module__
except Exception as error:
    seen["error"] = f"{type(error).__name__}: {error}"
    try:
        import arma_mergekit.method  # the hook only warns, so ask for the reason
    except Exception as error:
        seen["error"] = f"{type(error).__name__}: {error}"
print(json.dumps(seen))
"""


@dataclass(frozen=True)
class Check:
    """One line of the report: ``state`` is ok, note (worth knowing) or bad."""

    state: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.state:<5} {self.text}" + (f" {self.remedy}" if self.remedy else "")


def probe() -> dict[str, Any]:
    """What a new interpreter sees: hook (None if it broke), owner (module of the method), error (text)."""
    scripts = sysconfig.get_path("scripts")
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, cwd=scripts, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"hook": None, "owner": None, "error": last}
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def verdict(seen: dict[str, Any]) -> Check:
    """The answer, from what `probe` returned."""
    if seen["owner"] == "arma_mergekit.method":
        return Check("ok", "mergekit sees merge_method: arma.")
    if seen["owner"]:
        text = f"merge_method: arma is {seen['owner']}'s, registered before this package's could be."
        return Check("bad", text, f"Uninstall one of the two, or {WITHOUT}.")
    if seen["hook"] is False:
        text = f"mergekit does not see merge_method: arma, because Python did not run {START_FILE}."
        return Check("bad", text, f"Install with pip into {sys.prefix}, or {WITHOUT}.")
    return Check(
        "bad", f"mergekit does not see merge_method: arma, because of {seen['error']}.", "Fix that first."
    )


def mergekit_version(version: str | None) -> Check:
    """Whether mergekit is there, in a version this package was tested with."""
    if version is None:
        return Check(
            "bad", f"mergekit is not installed in {sys.prefix}.", "pip install 'mergekit>=0.1.5,<0.2'"
        )
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    if (0, 1, 5) <= numbers < (0, 2):
        return Check("ok", f"mergekit {version}.")
    return Check("note", f"mergekit {version} was never tested with.", "pip install 'mergekit>=0.1.5,<0.2'")


def start_file(directories: Sequence[str]) -> Check:
    """Whether the file that installs the hook is where Python looks for such files."""
    for directory in directories:
        if Path(directory, START_FILE).is_file():
            return Check("ok", f"{START_FILE} in {directory}.")
    return Check("note", f"No {START_FILE} where Python reads such files: {', '.join(directories)}.")


def script(found: str | None, scripts: str) -> Check:
    """Whether the `mergekit-yaml` that a shell would start belongs to this interpreter."""
    if found is None:
        return Check("note", "No mergekit-yaml on PATH.", f"Start {scripts}/mergekit-yaml.")
    if Path(found).parent.resolve() == Path(scripts).resolve():
        return Check("ok", f"{found} belongs to this interpreter.")
    return Check(
        "note", f"{found} is another interpreter's than {sys.executable}.", f"Start {scripts}/mergekit-yaml."
    )


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, None if there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def examine() -> list[Check]:
    """All checks, the verdict last."""
    user = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    return [
        Check("ok", f"Python {sys.version.split()[0]} at {sys.executable}."),
        mergekit_version(installed_version("mergekit")),
        start_file([*site.getsitepackages(), *user]),
        script(shutil.which("mergekit-yaml"), sysconfig.get_path("scripts")),
        verdict(probe()),
    ]


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON.")
def command(as_json: bool) -> int:
    """Tell whether mergekit sees `merge_method: arma`, and why not. Exit code 0 if it does, else 1."""
    checks = examine()
    sees = checks[-1].state == "ok"
    if as_json:
        click.echo(json.dumps({"sees": sees, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        click.echo("\n".join(map(str, checks)))
    return 0 if sees else 1
