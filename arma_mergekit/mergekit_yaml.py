"""``python -m arma_mergekit.mergekit_yaml recipe.yml out/``: mergekit-yaml with our method, without the hook.

A front door like ``__main__``: our errors end as one sentence on stderr and their exit code.
"""

from arma_mergekit.cli import run

__all__ = ["main"]


def main() -> None:
    """Run mergekit-yaml on the command line's arguments."""
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    import arma_mergekit.continual.curlora
    import arma_mergekit.method  # noqa: F401

    run(mergekit_yaml, "python -m arma_mergekit.mergekit_yaml")


if __name__ == "__main__":
    main()
