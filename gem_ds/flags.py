"""How the programs' help shows defaults."""

from __future__ import annotations

import argparse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag's default, unless it is None or the flag's own words tell it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "(default: " in (action.help or ""):
            return action.help
        return super()._get_help_string(action)
