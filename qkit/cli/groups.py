"""The commands in groups, in the order of a job, each with an example for its help; imported when they are asked for."""

from collections.abc import Iterator, Mapping
from pkgutil import resolve_name
from typing import Any, Final

import typer
from typer.core import TyperGroup

from qkit.startup import interruptible, uncollected

#: By group, its commands, each with an example: one or two lines of at most 76 letters.
GROUPS: Final = {
    "prepare": {
        "recipes": 'qkit recipes --for "cuda, 24 GB, 8B"',
        "plan": "qkit plan model/ -r int4-g64",
        "calibrate": "qkit calibrate model/ stats/ --data text.txt",
        "smooth": "qkit smooth model/ smoothed/ --stats stats/",
        "quantize": "qkit quantize model/ quantized/ -r int4-g64",
    },
    "train": {
        "train": 'qkit train model/ trained/ -r int4-g64 --data "*.jsonl"',
        "teach": "qkit teach teacher/ top.logits --data text.txt",
        "merge": "qkit merge model/ adapter/ merged/ -r int4-g64",
        "mlx-lora": "qkit mlx-lora model/ out/ -r int4-g64 --data data/ --iters 600",
    },
    "measure": {
        "eval": "qkit eval model/ quantized/ --teacher model/ --data text.txt",
        "compare": "qkit compare model/ --qat trained/ --data text.txt --out report/",
        "diff": "qkit diff model/ quantized/ --picture errors.png",
    },
    "exchange": {
        "inspect": "qkit inspect quantized/",
        "verify": "qkit verify quantized/",
        "export": "qkit export quantized/ model.gguf --to gguf",
        "import": "qkit import awq/ artifact/",
    },
    "machine": {
        "backends": "qkit backends --probe",
        "parity": "qkit parity int4-g64 --backend torchao",
        "warmup": "qkit warmup quantized/ --device cuda",
        "demo": "qkit demo --recipe int2-g64",
    },
}

#: Functions that are not called as their command and its module are.
FUNCTIONS: Final = {"eval": "eval:eval_", "import": "import_:import_", "mlx-lora": "mlx_lora:mlx_lora"}
#: For mlx-lora, which gives options on to another command.
PASSED_ON: Final = {"allow_extra_args": True, "ignore_unknown_options": True}


class Commands(Mapping[str, Any]):
    """The commands by name. The module of each is imported when it is first asked for: all of them take 0.2 s."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            if name not in set(self):
                raise KeyError(name)
            alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
            settings = PASSED_ON if name == "mlx-lora" else {}
            with interruptible(), uncollected():
                function = resolve_name(f"qkit.cli.{FUNCTIONS.get(name, f'{name}:{name}')}")
            alone.command(name, epilog=example_of(name), context_settings=settings)(function)
            self._made[name] = typer.main.get_command(alone)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return (name for commands in GROUPS.values() for name in commands)

    def __len__(self) -> int:
        return sum(map(len, GROUPS.values()))


def example_of(name: str) -> str:
    """The end of a command's help: its example, on a line that is not wrapped."""
    (line,) = (commands[name] for commands in GROUPS.values() if name in commands)
    return f"\b\nExample:\n  {line}"


class Grouped(TyperGroup):
    """The application, whose help lists the commands by group, each with its first sentence in full."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = Commands()  # type: ignore[assignment]  # nobody adds commands

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes a section for each group."""
        for group, names in GROUPS.items():
            with formatter.section(group.capitalize()):
                known = [(name, self.get_command(ctx, name)) for name in names]
                formatter.write_dl([(name, _first_sentence(one.help or "")) for name, one in known if one])


def _first_sentence(text: str) -> str:
    """The text up to the end of its first sentence, or to its first semicolon, on one line."""
    line = " ".join(text.split("\n\n")[0].split())
    return line.partition(". ")[0].partition(";")[0].rstrip(".") + "."
