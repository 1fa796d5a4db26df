"""Language models that differ in their mixers, trained on one text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from householder.models.causal_lm_config import ALIASES
from householder.nn import ATTENTIONS, MIXERS
from householder.train.config import MIXER_TITLES, takes_several
from householder.train.errors import ConfigError
from householder.train.settings import check_names, differences, field_types
from householder.train.text.config import TextConfig

SETTINGS = (*(name for name in field_types(TextConfig) if name != "pattern"), "mixer", "text")
"""The names of the settings from which a comparison is made."""


@dataclass(frozen=True)
class TextComparison:
    """Settings of models that differ in their mixers.

    Attributes:
        configs: of each model.
        text: files and folders of text; none for Python's standard library.

    Examples:
        >>> settings = {"mixer": ["delta", "delta_product"], "num_householder": [2, 3]}
        >>> [run_name(config) for config in TextComparison.from_settings(settings).configs]
        ['delta-net', 'delta-product-N2', 'delta-product-N3']
    """

    configs: tuple[TextConfig, ...]
    text: tuple[str, ...] = ()

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> TextComparison:
        """Make it from settings by name.

        Args:
            settings: fields of `TextConfig` but `pattern`; `mixer`, the mixers by any of their
                names; `num_householder`, a list for those that take several reflections per token;
                `text`.

        Raises:
            ConfigError: a setting is unknown or cannot be.
        """
        check_names(settings, SETTINGS, "settings")
        shared = dict(settings)
        mixers = [ALIASES.get(name, name) for name in shared.pop("mixer")]
        numbers = shared.pop("num_householder")
        for mixer in mixers:
            if mixer not in (*MIXERS, *ATTENTIONS):
                raise ConfigError(
                    f"`mixer` must be one of {', '.join((*MIXERS, *ATTENTIONS))}, got {mixer!r}; "
                    "pick from them"
                )
        text = tuple(shared.pop("text", ()))
        runs = [
            (mixer, number)
            for mixer in mixers
            for number in (numbers if takes_several(mixer) else [1])
        ]
        if not runs or len(set(runs)) != len(runs):
            raise ConfigError(
                f"`mixer` and `num_householder` must list different ones, got {mixers}, {numbers}; "
                "give each once"
            )
        configs = [TextConfig(pattern=m, num_householder=n, **shared) for m, n in runs]
        return cls(tuple(configs), text)

    def settings(self) -> dict[str, Any]:
        """Return the settings from which `from_settings` makes the same."""
        shared = self.configs[0].to_dict()
        del shared["pattern"]
        numbers = [c.num_householder for c in self.configs if takes_several(c.pattern)] or [1]
        return {
            "mixer": list(dict.fromkeys(config.pattern for config in self.configs)),
            **shared,
            "num_householder": list(dict.fromkeys(numbers)),
            **({"text": list(self.text)} if self.text else {}),
        }

    def differences(self, requested: TextComparison) -> dict[str, tuple[Any, Any]]:
        """Return what differs in another one: by name, the value here and the value there."""
        different: dict[str, tuple[Any, Any]] = {
            **differences(self.configs[0], requested.configs[0])
        }
        names = [[run_name(config) for config in each.configs] for each in (self, requested)]
        if names[0] != names[1]:
            different["mixer"] = names[0], names[1]
        if self.text != requested.text:
            different["text"] = self.text, requested.text
        return different


def run_name(config: TextConfig) -> str:
    """Return the name of a model's folder: `delta-net`, `delta-product-N2`."""
    number = f"-N{config.num_householder}" if takes_several(config.pattern) else ""
    return config.pattern.replace("_", "-") + number


def run_title(config: TextConfig) -> str:
    """Return what the publications call a model: `DeltaProduct, N = 2`."""
    number = f", N = {config.num_householder}" if takes_several(config.pattern) else ""
    return MIXER_TITLES[config.pattern] + number
