"""`python -m tests.chaos.table`: docs/chaos.md's table from results.json, between its two marks."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs/chaos.md"
BEGIN, END = "<!-- table: python -m tests.chaos.table -->\n", "<!-- end of the table -->\n"
HEADER = "| fault | what was seen | requests: sent, broken tries, lost | steps redone | seconds to recover | goal |\n"


def main() -> None:
    results = json.loads((FOLDER / "results.json").read_text())
    machine = results["machine"]
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    table = "".join([HEADER, "|---|---|---|---|---|---|\n", *map(line, results["rows"].values())])
    where = (
        f"{machine['cores']} cores of {machine['processor']}, {machine['memory_gib']} GiB, Python {machine['python']}, "
        f"Ray {machine['ray']}, torch {machine['torch']}; hosts are {machine['hosts']}."
    )
    PAGE.write_text(f"{before}{BEGIN}\n{where}\n\n{table}\n{END}{after}", encoding="utf-8")


def line(row: dict[str, Any]) -> str:
    requests = f"{row['requests']:,}, {row['broken']}, **{row['lost']}**" if "requests" in row else ""
    longest = f" (longest answer {row['longest_s']:.0f} s)" if row.get("longest_s", 0) > 5 else ""
    cells = [
        row["fault"], row["seen"] + longest, requests, str(row.get("steps_again", "")), f"{row['seconds']:.0f}",
        "met" if row["met"] else "**missed**",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    main()
