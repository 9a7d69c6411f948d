"""`mmforget quickstart`: the tour. Forgets two digits and shows the report."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mmforget.cli.settings import Options
from mmforget.errors import ConfigurationError, suggest

HELP = """
usage: mmforget quickstart [options]

Takes a small vision transformer that knows the ten handwritten digits, lets it forget the three and
then the seven with GS-LoRA++, compares it with models that never saw them and with controls that
only pretend, and writes a report. Needs no download; about 85 seconds on two CPU cores.

options:
  --family FAMILY    family of models to show (default and so far only one: classifier)
  --run FOLDER       where the results go (default: runs/quickstart, or the next free number)
  --no-open          do not open the report in a browser

examples:
  mmforget quickstart
  mmforget quickstart --no-open
  mmforget quickstart --run /tmp/tour
"""

CONFIGS = {"classifier": "classifier/gs_lora_plus_plus.yaml"}


def run(args: list[str]) -> int:
    """Run the tour.

    Raises:
        ConfigurationError: an unknown option or family.
    """
    parser = Options("quickstart")
    parser.add_argument("--family", default="classifier")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--no-open", action="store_true")
    given = parser.parse_args(args)
    if given.family not in CONFIGS:
        raise ConfigurationError(
            f"the quickstart has no family '{given.family}', {suggest(given.family, CONFIGS)}"
        )
    # So small a network is fastest on one thread; read when torch is loaded.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print("A vision transformer that knows ten digits forgets the three, then the seven.")
    print("Loading torch and Lightning takes up to half a minute on a small machine.", flush=True)
    from mmforget.cli import forget
    from mmforget.cli.listing import configs_folder

    folder = given.run or _free(Path("runs/quickstart"))
    config = configs_folder() / CONFIGS[given.family]
    title = "Quickstart: a vision transformer forgets the digits three and seven"
    code = forget.run(["-c", str(config), "--run", str(folder), "--title", title])
    if not given.no_open and sys.stdout.isatty():
        import webbrowser

        webbrowser.open((folder / "report.html").resolve().as_uri())
    return code


def _free(folder: Path) -> Path:
    """The folder, or the same with the next number: the tour never replaces anything."""
    number, candidate = 1, folder
    while candidate.exists() or candidate.with_name(f".{candidate.name}.partial").exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate
