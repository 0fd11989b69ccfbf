"""The command ``vllm-quest``: one module per subcommand, imported when it runs."""

from __future__ import annotations

import sys
from importlib import import_module

from vllm_quest import __version__

COMMANDS = {
    "tune": ("vllm_quest.tune.command", "recommend a configuration within a stated loss of quality"),
    "batch": ("vllm_quest.batch.command", "answer a file of prompts, on one machine or on a Ray cluster"),
}


def main() -> int:
    """Runs the subcommand that the command line names; returns its exit status."""
    name, arguments = sys.argv[1] if len(sys.argv) > 1 else "--help", sys.argv[2:]
    if name in COMMANDS:
        module, _ = COMMANDS[name]
        return import_module(module).main(arguments)
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"vllm-quest {__version__}")
        return 0
    print(f"vllm-quest: {name!r} is not a command\n\n{_usage()}", file=sys.stderr)
    return 2


def _usage() -> str:
    lines = [f"  {name:8}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        ["usage: vllm-quest COMMAND ...", "", *lines, "", "vllm-quest COMMAND --help says more."]
    )


if __name__ == "__main__":
    sys.exit(main())
