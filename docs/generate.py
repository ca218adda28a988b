"""Write what the pages take from the code: docs/map.md, the tables of exit codes and reject codes, the planned GPU hours.

python docs/generate.py            # write (`make docs` does, before it builds the site)
python docs/generate.py --check    # exit code 1 and the names of the pages if one is not current
"""

import ast
import sys
from collections import defaultdict
from pathlib import Path

from planned import short_table, tables

from align.common import errors
from align.common.reject_codes import CONVERSATION_CODES, FEATURE_CODES, SAMPLE_CODES

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PACKAGES = {"align": "stage one", "mllm": "stage two", "eval": "measurement"}


def docstring(path: Path) -> str:
    """Return a file's docstring; DataError if it has none, since the map would have a hole."""
    found = ast.get_docstring(ast.parse(path.read_text()))
    if not found:
        raise errors.DataError(f"{path} has no docstring; write what the file is for in its first line")
    return found


def first_sentence(text: str) -> str:
    """Return the first paragraph in one line."""
    return " ".join(text.split("\n\n")[0].split())


def map_page() -> str:
    """Return docs/map.md: every file of the packages with its first docstring line, by folder with the folder's docstring."""
    lines = [
        "# Map",
        "",
        "Every file with the first line of its docstring, written by `make docs`. Entries (files that you run) stand at the top of each",
        "package. Packages import in one direction, `eval -> mllm -> align`; the arrows between folders are a table in",
        "`tests/test_house_rules.py`.",
        "",
    ]
    for package, stage in PACKAGES.items():
        folders = defaultdict(list)
        for path in sorted((ROOT / package).rglob("*.py")):
            folders[path.parent].append(path)
        lines += [f"## {package}: {stage}", "", first_sentence(docstring(ROOT / package / "__init__.py")), ""]
        for folder, files in sorted(folders.items()):
            inner = folder != ROOT / package
            if inner:
                name = folder.relative_to(ROOT)
                lines += [f"### {name}", "", " ".join(docstring(folder / "__init__.py").split()), ""]
            lines += ["| file | what it is for |" if inner else "| entry | what it does |", "|---|---|"]
            shown = [path for path in files if path.name != "__init__.py"]
            lines += [f"| `{path.name}` | {first_sentence(docstring(path))} |" for path in shown] + [""]
    lines += ["## Other folders", "", "| folder | what it holds |", "|---|---|"]
    lines += [f"| `{folder}` | {holds} |" for folder, holds in OTHERS.items()]
    return "\n".join(lines) + "\n"


OTHERS = {
    "align/recipes/": "one YAML file for each run of stage one; its header holds the commands and the expected result",
    "mllm/recipes/": "the same for stage two",
    "mllm/zero/": "DeepSpeed settings: `zero2`, `zero3`, `zero3_offload`",
    "eval/results/published_numbers.yaml": "numbers from papers, with their source; the report shows them in columns marked as published",
    "eval/harness/tasks/": "task files for lmms-eval",
    "eval/page/templates/": "HTML templates of the report",
    "scripts/": "the quickstart, one script for each experiment of the [log](LOG.md), and one for the [cases](cases.md)",
    "tests/": "mirrors the packages; helpers in `tests/support/`",
    "docs/": "these pages, [decisions](decisions.md), the [log](LOG.md), `docs/bench/` (benchmarks and their results)",
}


def exit_codes() -> str:
    """Return the table of exit codes, from the classes of align/common/errors.py."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.KitError)]
    rows = {kind.exit_code: (kind.__name__, first_sentence(kind.__doc__ or "")) for kind in kinds if kind is not errors.KitError}
    unforeseen = "An error that no check foresaw, perhaps a bug. The line names a file with the traceback."
    rows |= {0: ("", "Done."), 1: ("", unforeseen), 130: ("", "Interrupted (Ctrl-C).")}
    lines = ["| exit code | error | meaning |", "|---|---|---|"]
    return "\n".join(lines + [f"| {code} | {f'`{name}`' if name else ''} | {meaning} |" for code, (name, meaning) in sorted(rows.items())])


def reject_codes() -> str:
    """Return the table of reject codes, from the registry."""
    groups = {"samples": SAMPLE_CODES, "features": FEATURE_CODES, "conversations": CONVERSATION_CODES}
    rows = [f"| `{code}` | {of} | {meaning} |" for of, codes in groups.items() for code, meaning in codes.items()]
    return "\n".join(["| code | of | meaning |", "|---|---|---|", *rows])


BLOCKS = {
    DOCS / "errors.md": {"exit-codes": exit_codes, "reject-codes": reject_codes},
    DOCS / "recipes.md": {"planned": tables},
    ROOT / "README.md": {"planned": short_table},
}


def pages() -> dict[Path, str]:
    """Return what every generated page should hold; blocks stand between `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""
    found = {DOCS / "map.md": map_page()}
    for page, blocks in BLOCKS.items():
        text = page.read_text()
        for name, make in blocks.items():
            before, found_begin, rest = text.partition(f"<!-- {name}:begin -->\n")
            _, found_end, after = rest.partition(f"<!-- {name}:end -->")
            assert found_begin and found_end, f"{page} has no block {name}"
            text = f"{before}{found_begin}{make()}\n{found_end}{after}"
        found[page] = text
    return found


def main() -> None:
    """Write the pages, or with --check name those that are not current."""
    stale = {path: text for path, text in pages().items() if not path.is_file() or path.read_text() != text}
    if "--check" in sys.argv:
        if stale:
            raise SystemExit(f"not current: {', '.join(str(path.relative_to(ROOT)) for path in stale)}; run `make docs` and commit them")
        return
    for path, text in stale.items():
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
