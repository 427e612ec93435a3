"""Print the oldest version of each direct dependency that pyproject.toml allows, as a pip constraints file.

torch is the exception: it keeps the pin of constraints.txt, the only one that is a CPU build everywhere. So does
Triton, whose version torch's CUDA builds name exactly.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)>=(?P<floor>[\w.]+)(?:;(?P<marker>.*))?")


def floors(pyproject: str, constraints: str) -> list[str]:
    """One `name==floor` line for each requirement, of all extras too; torch's and Triton's are `constraints`'."""
    project = tomllib.loads(pyproject)["project"]
    lines = []
    for requirement in [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]:
        match = REQUIREMENT.fullmatch(requirement)
        if match is None:
            raise ValueError(
                f"pyproject.toml: {requirement!r} is not of the form name>=version; its floor is not known"
            )
        if match["name"] in ("torch", "triton"):
            lines += [line for line in constraints.splitlines() if line.startswith(f"{match['name']}==")]
        elif match["marker"] is None:
            lines.append(f"{match['name']}=={match['floor']}")
    return lines


if __name__ == "__main__":
    print("\n".join(floors((ROOT / "pyproject.toml").read_text(), (ROOT / "constraints.txt").read_text())))
