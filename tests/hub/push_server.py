"""Runs `fat5convert`: {"arguments": [...], "load": bool}.

Without `load`, a folder is taken to load: a test of its own sees to that.
"""

from fork_server import serve

import fat5convert.publish.preflight as preflight
import fat5convert.publish.push
from fat5convert.cli import main


def run(request: dict) -> None:
    """Be the command."""
    if not request["load"]:
        preflight.check_loading = lambda *args, **kwargs: None
    main(request["arguments"], prog_name="fat5convert")


if __name__ == "__main__":
    assert fat5convert.publish.push
    serve(run)
