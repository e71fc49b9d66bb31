from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spiralrope_cli.commands import completion
from spiralrope_cli.commands.options import option

WHERE, SHOW = "Where from and to", "What to show"

EXAMPLES = """
Examples:

  spiralrope fetch --list                      what there is, and what is here

  spiralrope fetch dit-xl2                     DiT-XL/2 after 7M steps

  spiralrope fetch deit-s vae-mse inception    several at once

  spiralrope fetch deit-b --out weights        with a copy in weights/

  spiralrope fetch dit-s2 --offline            only if it is here

  HF_ENDPOINT=https://mirror.example spiralrope fetch deit-s
"""

Names = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME",
        help="What to fetch; --list shows the names.",
        autocompletion=completion.published,
    ),
]
ShowList = Annotated[
    bool,
    option("--list", panel=SHOW, metavar=" ", text="Show all names and what is here."),
]
AsJson = Annotated[
    bool, option("--json", panel=SHOW, metavar=" ", text="The result as JSON on stdout.")
]
Copy = Annotated[
    Path | None,
    option(
        "--out", panel=WHERE, metavar="FOLDER", text="Folder for a copy under the file's own name."
    ),
]
Revision = Annotated[
    str | None,
    option("--revision", panel=WHERE, text="Branch, tag or commit on the Hub."),
]
Offline = Annotated[
    bool,
    option("--offline", panel=WHERE, metavar=" ", text="Take what is here and ask nobody."),
]


def fetch(
    names: Names = None,
    show_list: ShowList = False,
    json: AsJson = False,
    out: Copy = None,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Fetch published weights, the VAEs, Inception's weights or reference batches.

    Prints the path of each. What is here is not fetched again, but checked.

    HF_ENDPOINT, HF_TOKEN and HF_HOME are those of huggingface_hub.
    """
    from spiralrope_cli.core.jobs import fetch as job

    if show_list:
        if names:
            raise typer.BadParameter(
                "it shows all that is published; leave NAME out", param_hint="--list"
            )
        job.show_list(as_json=json)
        return
    job.fetch_all(names or [], revision=revision, offline=offline, out=out, as_json=json)
