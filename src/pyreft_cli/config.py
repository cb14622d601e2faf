"""Settings from a YAML file, as the options of a command would give them."""

from pathlib import Path
from typing import Any

import typer


def read_config(path: Path | None) -> dict[str, Any]:
    """The settings of a file by their names; none without a file."""
    if path is None:
        return {}
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be read: {error.strerror}.", param_hint="--config") from None
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"{path} is not valid YAML: {error}", param_hint="--config") from None
    if not isinstance(settings, dict):
        raise typer.BadParameter(f"{path} should hold 'name: value' lines.", param_hint="--config")
    return {str(name).replace("-", "_"): value for name, value in settings.items()}
