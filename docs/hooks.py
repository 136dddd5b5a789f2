"""Hook of mkdocs: links from a page to files outside docs/ lead to the repository."""

from __future__ import annotations

import posixpath
import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return the page's Markdown with links that leave docs/ as absolute URLs of the main branch."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def absolute(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link.group(1)))
        return link.group(0) if path.startswith("docs/") else f"]({config.repo_url}/blob/main/{path}{link.group(2)})"

    return re.sub(r"\]\((\.\.?/[^)#\s]+)((?:#[^)\s]*)?)\)", absolute, markdown)
