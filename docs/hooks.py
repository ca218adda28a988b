"""mkdocs hooks: the site's first page is README.md, so that there is one text; its links to docs/ become the site's own."""

from pathlib import Path
from typing import Any


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Return README.md for the first page, and every other page as it is."""
    if page.file.src_uri != "index.md":
        return markdown
    return (Path(config.docs_dir).parent / "README.md").read_text().replace("](docs/", "](")
