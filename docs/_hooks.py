"""What `mkdocs build` does beyond its plugins: links out of docs/ lead to the repository."""

import pathlib
import posixpath
import re

_LINK = re.compile(r"(?<=\]\()(?:\.\./)+[^)#\s]+")


def on_page_markdown(markdown: str, page, config, **_) -> str:
    """Point links to files of the repository that are no pages at the repository's address."""
    root = pathlib.Path(config.config_file_path).parent
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def absolute(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[0]))
        if path.startswith("docs/") or not (root / path).exists():
            return match[0]
        kind = "tree" if (root / path).is_dir() else "blob"
        return f"{config.repo_url}/{kind}/main/{path}"

    return _LINK.sub(absolute, markdown)
