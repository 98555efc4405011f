"""``hvdscale doctor``: what is installed, whether it fits together, and small jobs that prove it works."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from hvdscale.runtime.inspection import Finding
    from hvdscale.runtime.settings import Setting

__all__ = ["add_parser"]

_DESCRIPTION = """\
Show what is installed and whether it fits together, then run small jobs on 2 ranks: an all-reduce in each
framework and a Keras fit on each backend, which proves that ranks end with the same weights.

The exit code is 0 only if all is well."""

_STYLES = {"ok": "green", "note": "yellow", "fail": "bold red"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``doctor`` to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="check this installation, with real jobs on 2 ranks",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")
    parser.set_defaults(handler=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from hvdscale.cli.trials import RANKS, planned_trials, run_trial
    from hvdscale.runtime.inspection import inspect, local_settings

    findings = inspect()
    settings = local_settings(RANKS)
    console = Console(highlight=False, quiet=arguments.json)
    for section, group in groupby(findings, lambda finding: finding.section):
        _show(console, section, group)
    _show_settings(console, settings)
    console.print("[bold]Trials[/] on 2 ranks")
    for trial in planned_trials():
        with console.status(trial.name):
            finding = run_trial(trial)
        findings.append(finding)
        _show(console, "", [finding])
    _show_advisories(console)
    failed = [finding for finding in findings if finding.status == "fail"]
    if arguments.json:
        print(_as_json(findings, settings, well=not failed))
    console.print(f"[bold red]{len(failed)} to mend[/]" if failed else "[bold green]All is well.[/]")
    return 1 if failed else 0


def _show(console: Console, section: str, findings: Iterable[Finding]) -> None:
    if section:
        console.print(f"[bold]{section}[/]")
    for finding in findings:
        grid = _grid()
        advice = f"\n-> {finding.advice}" if finding.advice else ""
        grid.add_row(f"[{_STYLES[finding.status]}]{finding.status}[/]", finding.name, _plain(finding.value + advice))
        console.print(grid)


def _show_settings(console: Console, settings: Sequence[Setting]) -> None:
    console.print("[bold]Settings[/] of 2 ranks under mpirun here")
    for setting in settings:
        grid = _grid()
        grid.add_row("ok", setting.name, _plain(f"{setting.value}: {setting.reason}"))
        console.print(grid)


def _show_advisories(console: Console) -> None:
    from hvdscale.runtime.inspection import ADVISORIES

    console.print("[bold]Security[/] of Horovod, open upstream")
    for advisory in ADVISORIES:
        grid = _grid()
        text = f"{advisory.hole}. Touches {', '.join(advisory.touches)}; not {', '.join(advisory.avoids)}"
        grid.add_row(f"[{_STYLES['note']}]note[/]", advisory.identifier, _plain(text))
        console.print(grid)


def _grid() -> Table:
    from rich.table import Table

    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=5, justify="right")
    grid.add_column(min_width=28, overflow="fold")
    grid.add_column(overflow="fold")
    return grid


def _plain(text: str) -> Text:
    from rich.text import Text

    return Text(text)


def _as_json(findings: Sequence[Finding], settings: Sequence[Setting], *, well: bool) -> str:
    from hvdscale.runtime.inspection import ADVISORIES

    return json.dumps(
        {
            "well": well,
            "findings": [asdict(finding) for finding in findings],
            "settings": [asdict(setting) for setting in settings],
            "advisories": [asdict(advisory) for advisory in ADVISORIES],
        },
        indent=2,
    )
