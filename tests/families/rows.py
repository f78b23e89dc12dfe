"""Prints rows of the gate: `python tests/families/rows.py [NAME] [--recipe int4]`, by the beginning of a family's name."""

import argparse
import json
import time
import traceback
import warnings

import torch
import transformers
from catalogue import FAMILIES
from gate import RECIPES, row

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[""])
    parser.add_argument("--recipe", choices=RECIPES, action="append")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name in FAMILIES:
        if not name.startswith(tuple(arguments.names)):
            continue
        for recipe in arguments.recipe or RECIPES:
            begin = time.time()
            try:
                cells = {reader: cell for reader, cell in row(name, recipe).items() if cell not in ("equal", "none")}
            except Exception:
                cells = {"the gate": traceback.format_exc()}
            print(f"{name} | {recipe} | {time.time() - begin:.1f} s | {json.dumps(cells)}", flush=True)
