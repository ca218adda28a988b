"""Checks every file of feature stores against the hashes that were committed. Reads only."""

from collections.abc import Callable
from pathlib import Path

from align.common.errors import DamagedError, DataError, UsageError
from align.common.files import hash_file, human_bytes
from align.common.folders import COMMIT, WORK, damage, read_sealed
from align.features.store import read_commit, read_header, sealed_files


def find_stores(folder: Path) -> list[Path]:
    """Return the stores in `folder`, or `folder` itself if it is one, also if files of them are missing; UsageError if there are none."""
    marks = ("store.json", "commits", "shards")
    found = [place for place in (folder, *sorted(folder.glob("*"))) if any((place / mark).exists() for mark in marks)]
    if not found:
        raise UsageError(f"{folder} holds no feature store; give the --output that align/encode.py wrote")
    return found


def verify_stores(folder: Path, say: Callable[[str], object]) -> None:
    """Verify each store in `folder`, and `say` which are as committed. DamagedError lists the problems of all others."""
    problems = []
    for store in find_stores(folder):
        try:
            say(f"{store}: every byte as committed ({human_bytes(verify_store(store))})")
        except DamagedError as error:
            problems.append(str(error))
    if problems:
        raise DamagedError("; ".join(problems))


def verify_store(folder: Path) -> int:
    """Return the bytes of a complete store after comparing every file with its hash. DamagedError lists what differs and what to do."""
    problems, expected = _sealed(folder)
    try:
        shards = read_header(folder).shards
    except (DamagedError, UsageError, DataError) as error:
        problems.append(f"{error} [restore {folder}/store.json from a copy; without one delete {folder} and encode again]")
        shards = len(list((folder / "commits").glob("*.json")))
    for shard in range(shards):
        path = folder / "commits" / f"{shard:06d}.json"
        again = f"[delete {path} and run the same align/encode.py command again]"
        if not path.is_file():
            problems.append(f"shard {shard} is not committed [run the same align/encode.py command again]")
            continue
        try:
            files = read_commit(path)["xxh3"]
        except DamagedError as error:
            problems.append(str(error))
            files = {f"{shard:06d}.{suffix}": None for suffix in ("safetensors", "parquet", "rejects.parquet")}
        for name, digest in files.items():
            expected.add(f"shards/{name}")
            if digest and (problem := damage(folder / "shards" / name, digest)):
                problems.append(f"{problem} {again}")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    for name in files.keys() - expected - {COMMIT}:
        if name.split("/")[0] != WORK:
            problems.append(f"{folder / name} was not committed [delete it]")
    if problems:
        raise DamagedError(f"{folder}: {len(problems)} problem(s): {'; '.join(sorted(problems))}")
    return sum(path.stat().st_size for path in files.values())


def _sealed(folder: Path) -> tuple[list[str], set[str]]:
    """Return the problems of all files that COMMIT.json lists, and the names of those files."""
    path, problems = folder / COMMIT, list[str]()
    again = f"[delete {path} and run the same align/encode.py command again]"
    try:
        files = dict(read_sealed(path)["files"]) if path.is_file() else None
    except (DamagedError, LookupError, TypeError, ValueError) as error:
        files, problems = None, [f"{path} is damaged ({error}) {again}"]
    if files is None:
        missing = f"{path} is missing: the store is not complete, or of an older version [run the same align/encode.py command again]"
        return problems or [missing], set(sealed_files(folder))
    for name, digest in files.items():
        place = folder / name
        if not place.is_file():
            if name.startswith("../"):
                continue  # the store was moved without its plan
            problems.append(f"{place.resolve()} is missing {_advice(folder, name)}")
        elif hash_file(place) != digest:
            problems.append(f"{place.resolve()} does not have the content that was committed {_advice(folder, name)}")
    return problems, set(files)


def _advice(folder: Path, name: str) -> str:
    """Return what to do about a damaged file."""
    if name == "store.json":
        return f"[restore it from a copy; without one delete {folder} and encode again]"
    return f"[delete {(folder / name).resolve()} and run the same align/encode.py command again]"
