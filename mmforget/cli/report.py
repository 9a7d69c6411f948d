"""`mmforget report`: results of one or several runs as one page."""

from __future__ import annotations

from pathlib import Path

from mmforget.audit.results import Results
from mmforget.cli.settings import Options
from mmforget.errors import ConfigurationError

HELP = """
usage: mmforget report RUN... [--out FOLDER]

Writes report.html, one file with everything in it, and report.md. With several runs, the page
compares them. RUN is a run folder or a results.json.

options:
  --out FOLDER   where to write (default: the run folder; needed for several runs)

examples:
  mmforget report runs/sevens
  mmforget report runs/sevens runs/sevens-ssd --out comparison
  mmforget report results.json --out page
"""


def run(args: list[str]) -> int:
    """Write the report.

    Raises:
        ConfigurationError: several runs, but no folder for the page.
        MissingFileError: a run without results.
    """
    parser = Options("report")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", metavar="FOLDER")
    given = parser.parse_args(args)
    results = [Results.load(run) for run in given.runs]
    if given.out is None and len(results) > 1:
        raise ConfigurationError(
            "`mmforget report` of several runs needs `--out FOLDER`, where the page is written"
        )
    first = Path(given.runs[0])
    folder = Path(given.out) if given.out else (first if first.is_dir() else first.parent)

    from mmforget.report.write import write_report

    page = write_report(results, folder)
    for result in results:
        print(f"{result.title}: {result.verdict.sentence}")
    print(f"report: {page}")
    return 0
