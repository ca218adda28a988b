"""Small pictures and tars."""

import io
import tarfile

from PIL import Image


def jpeg(number, side=24):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (number * 40 % 256, 90, 200)).save(buffer, format="JPEG")
    return buffer.getvalue()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
