"""The one file in the bundle that Flower carries to every site: names of apps, and no code (docs/decisions/0002).

Its text depends on the release alone, so a server and its sites can compare the bundle's SHA-256 before a run.
"""

from __future__ import annotations

from importlib.metadata import version

__all__ = ["RUN_CONFIG_KEYS", "bundle_text"]

RUN_CONFIG_KEYS = ("overrides", "experiment", "digest", "run", "resume")
"""What a run may be given; Flower refuses a key that its bundle does not declare."""


def bundle_text() -> str:
    """Return the bundle's `pyproject.toml` for the installed release."""
    keys = "".join(f'{key} = ""\n' for key in RUN_CONFIG_KEYS)
    return (
        f'[project]\nname = "cloister"\nversion = "{version("cloister")}"\n'
        'dependencies = ["flwr>=1.41,<1.42"]\n\n'
        '[tool.flwr.app]\npublisher = "cloister"\nfab-include = ["pyproject.toml"]\n\n'
        '[tool.flwr.app.components]\nserverapp = "server.app:app"\nclientapp = "client.app:app"\n\n'
        f"[tool.flwr.app.config]\n{keys}"
    )
