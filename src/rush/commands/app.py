"""The command line: every command and the module that holds it, imported when the command is used.

Commands import torch within their functions, so that help and errors in a recipe come at once.
"""

from cyclopts import App, Parameter

import rush

COMMANDS = {
    "run": "stages",
    "pretrain": "stages",
    "teach": "stages",
    "finetune": "stages",
    "certify": "certify",
    "attack": "attack",
    "audit": "audit",
    "report": "stages",
    "ladder": "ladder",
    "verdict": "verdict",
    "predict": "predict",
    "compare": "compare",
    "cost": "recipes",
    "recipes": "recipes",
    "info": "info",
}

app = App(
    name="rush",
    help="Robust image classifiers: pre-trained by contrast, smoothed by noise, certified soundly, attacked honestly. "
    "Errors are one line; --traceback, with any command, shows where one was raised.",
    help_format="plaintext",
    version=rush.__version__,
    default_parameter=Parameter(negative_iterable=()),
    suppress_keyboard_interrupt=False,
)
for name, module in COMMANDS.items():
    app.command(f"rush.commands.{module}:{name}", name=name)
