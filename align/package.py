"""Package a run of stage one with its encoders: a model folder that opens on any machine.

    python align/package.py --run runs/mine --output packed
    python align/package.py --run runs/mine --which last --output packed
    python align/package.py --run runs/mine --vision /new/place/dinov2 --output packed

The copies are opened in a fresh process, without hub and cache, before the folder is put into its place. Weights that a module has only
as .bin become safetensors; adapters (LoRA) have to be merged before.
"""

from pathlib import Path

from align.common.errors import UsageError
from align.model.config import PackageConfig
from align.runtime.commandline import run, set_up


def main(config: PackageConfig) -> None:
    """Find the model, copy it with its encoders, try the copy."""
    from align.common.files import human_bytes
    from align.model.saving import model_folder, package

    console, output = set_up(), Path(config.output)
    if output.exists():
        raise UsageError(f"{output} is there already; give another --output")
    source = model_folder(Path(config.run), config.which)
    output.parent.mkdir(parents=True, exist_ok=True)
    package(source, output, {"vision": config.vision, "text": config.text}, config.trust_remote_code)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    console.print(
        f"{output}: {source} with both encoders, {human_bytes(size)}; SailModel.from_pretrained({str(output)!r}) opens it anywhere"
    )


if __name__ == "__main__":
    run(main, PackageConfig, "package")
