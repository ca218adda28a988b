"""A small folder of drawn sprites, so that scenes can be tested without the embedded graphics."""

import json

from PIL import Image, ImageDraw

NAMES = {
    "animal": ["ant", "bee", "cat", "dog", "elk", "owl"],
    "food": ["apple", "bun", "carrot", "date", "ice lolly", "olive"],
    "vehicle": ["bus", "canoe", "van", "tram", "raft", "unicycle"],
    "object": ["anvil", "bell", "cup and spoon", "desk", "hourglass", "umbrella"],
    "place": ["inn", "farm with a barn"],
    "person": ["acrobat", "one-armed pirate"],
}


def make_sprites(folder):
    """Write 28 PNGs of 72 px (squares, discs, bars, rings in different colors, off center) and their table; return the folder."""
    (folder / "72x72").mkdir(parents=True)
    table = []
    for number, (group, name) in enumerate((group, name) for group, names in NAMES.items() for name in names):
        image = Image.new("RGBA", (72, 72), (0, 0, 0, 0))
        draw = ImageDraw.Draw(image)
        color = (37 * number % 256, 91 * number % 256, 173 * number % 256, 255)
        if number % 4 == 0:
            draw.rectangle((4, 10, 60, 66), fill=color)
        elif number % 4 == 1:
            draw.ellipse((8, 8, 70, 70), fill=color)
        elif number % 4 == 2:
            draw.rectangle((30, 2, 44, 70), fill=color)
        else:
            draw.ellipse((6, 20, 66, 60), outline=color, width=9)
        image.save(folder / "72x72" / f"{number:x}.png")
        table.append({"id": f"{number:x}", "file": f"72x72/{number:x}.png", "group": group, "name": name})
    (folder / "sprites.json").write_text(json.dumps(table))
    return folder
