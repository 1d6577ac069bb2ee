"""What jsonargparse says is wrong with a setting, in words for people; habits of LightningCLI's users, and what works
here. parser.py puts the lines together."""

import re

# jsonargparse lists a reason for each type that a value may have: any wrong value has the first ones, and a class that
# is meant for one type has the others for the other types
EVERY_TYPES = "Expected a (<class|path but|typing)|Does not validate|Not a valid subclass|a class path|a dict "
OTHER_TYPES = "Import path|Expected a dot|unknown"
OF_MODEL = "is a setting of the model here"
IN_PYTHON = "in a plain Trainer, see docs/in-your-own-code.md"
# what people write who know LightningCLI, as jsonargparse reports it, and what works here
HABITS = {
    r"unrecognized arguments: (fit|train)\b": "leave the word {0} out: lit_cifar.fit trains, then tests once",
    r"unrecognized arguments: (test|predict)\b": (
        "lit_cifar.fit trains; the other command is python -m lit_cifar.{0} --ckpt_path FILE"
    ),
    r"unrecognized arguments: validate\b": "lit_cifar.fit validates as it trains, with --data.num_val 5000",
    r"(?:unrecognized arguments: --|[Oo]ption ')ckpt_path\b": (
        "--ckpt_path is a flag of lit_cifar.test; lit_cifar.fit goes on with a run by --resume FILE"
    ),
    r"(?:unrecognized arguments: --|(?<!accept )(?:[Oo]ption|[Kk]ey) ')(optimizer\b[\w.]*)": (
        f"'{{0}}' {OF_MODEL}: --model.optimizer torch.optim.AdamW; in YAML, put optimizer: under model:"
    ),
    r"(?:unrecognized arguments: --|(?<!accept )(?:[Oo]ption|[Kk]ey) ')(lr_scheduler\b[\w.]*)": (
        f"'{{0}}' {OF_MODEL}: --model.scheduler torch.optim.lr_scheduler.StepLR --model.scheduler.step_size 10; "
        "in YAML, put scheduler: under model:"
    ),
    r"unrecognized arguments: --data\.(?:class_path|init_args)|Group 'data' .*'(?:class_path|init_args)"
    r"|Parser key \"data\":\s+Unable to load": (
        "data takes no class: images of your own are --data_dir FOLDER; a data module of your own goes with "
        f"LitClassifier {IN_PYTHON}"
    ),
    r"Parser key \"trainer\":\s+Unable to load": f"--trainer takes no class: use LitClassifier {IN_PYTHON}",
    r'Parser key "(trainer\.\w+)":[^"]*Expected an instantiatable class, but \S+\.(\w+) is abstract[^"]*NestedArg': (
        "--{0}: its settings come after its class: --{0} My{1} --{0}.SETTING VALUE"
    ),
}


def habit(message: str) -> str | None:
    """What works here in place of what LightningCLI would have taken; None if a message is about something else."""
    for pattern, line in HABITS.items():
        if found := re.search(pattern, message):
            return line.format(*found.groups())
    return None


def gist(message: str) -> str:
    """The reason that matters among those that jsonargparse lists for a value, in one line; other messages stay."""
    _, *items = re.split(r"\n\s*- ", re.split(r"\n\s*Given value type:", message)[0])
    told = [" ".join(item.split()) for item in items if not re.match(EVERY_TYPES, item)]
    told.sort(key=lambda item: bool(re.match(OTHER_TYPES, item)))
    if found := re.search(r"Not a valid subclass of \w+\. Got value: (True|False|None|[-\d.]+)\s", message):
        told = told or [f"Expected a dot import path string: {found[1]}"]  # in a list
    if not told:
        return message
    reason = re.sub(r"^Problem with given class_path '(.*?)': ", r"\1: ", told[0])
    reason = re.sub(r"^Type .* expects a function or a callable class: ", "", reason)
    reason = re.sub(r"^Expected '(.*)' to be (.*) <class '(\w+)'>\..*", r"\1 is not declared as \2 \3", reason)
    return re.sub(
        r"^Expected a dot import path string: ?(.*)", r"there is no class \1: name it as package.Class", reason
    )


def in_words(message: str) -> str:
    """A message with what is wrong with a number, for people."""
    message = re.sub(
        r"Not of type \w+: (?:invalid literal for (int)|could not convert string to (float)).*'(.*)'$",
        r"expected \1\2, got \3",
        message,
    )
    return re.sub(
        r"Not of type \w+: (.*) (?:does not conform to restriction (.*)|not an? \w+)$",
        lambda found: f"expected {bounds_of(found[2]) if found[2] else 'a number'}, got {found[1]}",
        message,
    )


def bounds_of(restriction: str) -> str:
    """A restriction as jsonargparse writes it, v>=0 and v<=1, for people."""
    words = {">=": "at least", ">": "above", "<=": "at most", "<": "below"}
    return "a number " + re.sub(r"v(>=|>|<=|<)", lambda sign: f"{words[sign[1]]} ", restriction)


def plain(types: str) -> str:
    """Types as jsonargparse names them, for people."""
    types = re.sub(r"<class '([^']*)'>|typing.Literal\[(.*?)\]", r"\1\2", types)
    return types.replace("'", "").replace("NoneType", "null")
