"""`mmforget quickstart`: the tour. Forgets two digits and shows the report."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mmforget.cli.settings import Options
from mmforget.errors import ConfigurationError, suggest

HELP = """
usage: mmforget quickstart [options]

classifier: a small vision transformer that knows the ten handwritten digits forgets the three and
then the seven with GS-LoRA++, and is compared with models that never saw them and with controls
that only pretend; about 85 seconds on two CPU cores.
diffusion: a small text-to-image pipeline that draws these digits forgets the seven with UCE, is
compared picture by picture with the original, and is attacked by learning a new word for it.
multimodal: a small language model that answers questions about pictures forgets who two persons
are with NPO, is asked in other words, without picture and after relearning, and is compared with
one that never knew them and with controls that only keep silent; about three minutes.

None of them needs a download, and each writes a report.

options:
  --family FAMILY    classifier, diffusion or multimodal (default: classifier)
  --run FOLDER       where the results go (default: runs/quickstart, or the next free number)
  --no-open          do not open the report in a browser

examples:
  mmforget quickstart
  mmforget quickstart --family diffusion --no-open
  mmforget quickstart --family multimodal
  mmforget quickstart --run /tmp/tour
"""

TOURS = {
    "classifier": (
        "classifier/gs_lora_plus_plus.yaml",
        "A vision transformer that knows ten digits forgets the three, then the seven.",
        "Quickstart: a vision transformer forgets the digits three and seven",
    ),
    "multimodal": (
        "multimodal/npo.yaml",
        "A language model that answers questions about pictures forgets who two persons are.",
        "Quickstart: a multimodal language model forgets two persons",
    ),
}
"""Families that are forgotten by a configuration: it, what is said first, title of the report."""

FAMILIES = ("classifier", "diffusion", "multimodal")
KEPT = ("zero", "one", "two", "three", "four", "five", "six", "eight", "nine", "red", "blue")
ERASE = ["digit_world", "--concept", "seven", "--synonym", "7", "--attack", "concept_inversion",
         "--pictures", "12", "--sampling-steps", "12"]  # fmt: skip
ERASE += [part for word in KEPT for part in ("--keep", word)]


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
    if given.family not in FAMILIES:
        raise ConfigurationError(
            f"the quickstart has no family '{given.family}', {suggest(given.family, FAMILIES)}"
        )
    # So small a network is fastest on one thread; read when torch is loaded.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if given.family == "diffusion":
        print("A text-to-image pipeline that draws ten digits forgets the seven.")
    else:
        print(TOURS[given.family][1])
    print("Loading torch and Lightning takes up to half a minute on a small machine.", flush=True)
    folder = given.run or _free(Path("runs/quickstart"))
    if given.family == "diffusion":
        from mmforget.cli import erase

        title = "Quickstart: a text-to-image pipeline forgets the digit seven"
        code = erase.run([*ERASE, "--run", str(folder), "--title", title, "--no-open"])
    else:
        from mmforget.cli import forget
        from mmforget.cli.listing import configs_folder

        config, _, title = TOURS[given.family]
        config = str(configs_folder() / config)
        code = forget.run(["-c", config, "--run", str(folder), "--title", title])
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
