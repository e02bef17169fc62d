"""Files shipped with the package: beside it in a checkout, inside it in an installed wheel."""

from pathlib import Path

from orpo_dist.errors import UserError


def shipped(*path: str) -> Path:
    """The file with this path relative to the root of a checkout, such as `"slurm", "lib.sh"` or `"constraints.txt"`.

    Raises:
        UserError: it is in neither place.
    """
    package = Path(__file__).parents[1]
    places = [package.joinpath(*path), package.parent.joinpath(*path)]
    for place in places:
        if place.is_file():
            return place
    raise UserError(f"{path[-1]} is neither in {places[0].parent} nor in {places[1].parent}: reinstall orpo-dist.")


def accelerate_config(name: str) -> Path:
    """An accelerate config, by the name of a shipped one (`zero2`) or by path.

    Raises:
        UserError: it does not exist.
    """
    if name.endswith((".yaml", ".yml", ".json")):
        if not Path(name).is_file():
            raise UserError(f"accelerate config {name} does not exist.")
        return Path(name)
    known = sorted(path.stem for path in shipped("accelerate_configs", "ddp.yaml").parent.glob("*.yaml"))
    if name not in known:
        raise UserError(f"Unknown accelerate config {name!r}: give a file path or one of {', '.join(known)}.")
    return shipped("accelerate_configs", f"{name}.yaml")
