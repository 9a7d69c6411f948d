"""Which layers of a generator are trained."""

from __future__ import annotations

from typing import Any

from mmforget.errors import ConfigurationError, suggest


def trained_groups(model: Any, choice: str) -> list[str]:
    """Groups of layers that are trained.

    Args:
        model: the generator.
        choice: ``all``; ``mapping`` or ``synthesis`` of a style-based network; ``no_to_image`` for
            all but the last step to the picture; or group names, separated by commas.

    Raises:
        ConfigurationError: the network has no such groups.
    """
    groups = list(model.layer_groups())
    mapping = [name for name in groups if name.startswith("mapping")]
    to_image = [name for name in groups if "to_image" in name]
    if choice == "all":
        return groups
    if choice in ("mapping", "synthesis") and not mapping:
        raise ConfigurationError(
            f"`train_layers` is '{choice}', but this generator has no mapping network; its groups "
            f"are {', '.join(groups)}"
        )
    named = {
        "mapping": mapping,
        "synthesis": [name for name in groups if name not in mapping],
        "no_to_image": [name for name in groups if name not in to_image],
    }
    if choice in named:
        return named[choice]
    wanted = [part.strip() for part in choice.split(",") if part.strip()]
    for name in wanted:
        if name not in groups:
            raise ConfigurationError(
                f"`train_layers` has '{name}', {suggest(name, (*named, 'all', *groups))}"
            )
    if not wanted:
        raise ConfigurationError(f"`train_layers` is '{choice}'; name at least one group")
    return wanted
