"""`python -m mmforget` is the same as `mmforget`."""

from mmforget.cli.main import run

run()
