"""The command line: every command and the module that holds it, imported when the command is used.

Commands import torch within their functions, so that help and errors in a recipe come at once.
"""

from cyclopts import App, Group, Parameter

import rush

GROUPS = {
    "A run, from images to report": {
        "run": "stages",
        "pretrain": "stages",
        "teach": "stages",
        "finetune": "finetune",
        "certify": "certify",
        "attack": "attack",
        "audit": "audit",
        "report": "stages",
    },
    "Any model": {"ladder": "ladder", "verdict": "verdict", "predict": "predict"},
    "Look, compare and hand over": {"info": "info", "compare": "compare", "verify": "verify", "export": "export"},
    "Before a run": {"init": "init", "recipes": "recipes", "cost": "recipes", "doctor": "doctor"},
}
COMMANDS = {name: module for group in GROUPS.values() for name, module in group.items()}

app = App(
    name="rush",
    help="Robust image classifiers: pre-trained by contrast, smoothed by noise, certified soundly, attacked honestly. "
    "Errors are one line; --traceback, with any command, shows where one was raised. -q, with any command, prints "
    "nothing but results and errors, and -v progress more often.",
    help_format="plaintext",
    version=rush.__version__,
    default_parameter=Parameter(negative_iterable=()),
    suppress_keyboard_interrupt=False,
)
for position, (title, commands) in enumerate(GROUPS.items()):
    group = Group(title, sort_key=position)
    for name, module in commands.items():
        app.command(f"rush.commands.{module}:{name}", name=name, group=group)
app.register_install_completion_command(help="Set up the completion of commands and options in this shell.")
