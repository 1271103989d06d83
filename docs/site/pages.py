"""What the site adds to the pages in docs/: the C reference, the project's pages from outside of docs/, and the files
that pages link to.

Links in the pages are those of the repository, so that they work there; here they are turned into links of the site.
"""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import Any

import c_reference
from links import ROOT, local_links, resolve
from mkdocs.structure.files import File

DOCS = ROOT / "docs"
# Pages outside of docs/, by their path on the site.
OUTSIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "LICENSE": "license.md",
    "examples/README.md": "examples/index.md",
    "examples/cpp/README.md": "examples/cpp.md",
}
LANGUAGES = {".py": "python", ".h": "c", ".hpp": "cpp", ".cc": "cpp", ".cu": "cpp", ".json": "json"}


def site_path(file: Path) -> str | None:
    """Where a file of the repository is on the site; None for what the site does not show (folders)."""
    name = file.relative_to(ROOT).as_posix()
    if name == "README.md":
        return "index.md"
    if name == "cpp/include/lemo":
        return "c-reference.md"
    if name in OUTSIDE:
        return OUTSIDE[name]
    if file.is_relative_to(DOCS):
        return file.relative_to(DOCS).as_posix()
    if file.is_dir():
        readme = file / "README.md"
        return site_path(readme) if readme.exists() else None
    return f"repository/{name}.md" if file.suffix in LANGUAGES else f"repository/{name}"


def source_of(uri: str) -> Path:
    """The file of the repository behind a page of the site."""
    return next((ROOT / name for name, place in OUTSIDE.items() if place == uri), DOCS / uri)


def localized(markdown: str, page: Path, uri: str) -> str:
    """`markdown` of the file `page`, its links changed into those of the page at `uri`."""
    for link in reversed(list(local_links(markdown))):
        file, anchor = resolve(link.target, page)
        if link.target.startswith("#") or not file.is_relative_to(ROOT) or not file.exists():
            continue  # mkdocs reports what leads nowhere
        target = site_path(file)
        if target is None:
            continue
        new = posixpath.relpath(target, posixpath.dirname(uri) or ".") + (f"#{anchor}" if anchor else "")
        markdown = markdown[: link.start] + new + markdown[link.end :]
    return markdown


def content_of(file: Path) -> str:
    if file.suffix in LANGUAGES:
        name = file.relative_to(ROOT).as_posix()
        return f"# {name}\n\n````{LANGUAGES[file.suffix]}\n{file.read_text()}\n````\n"
    text = file.read_text()
    return f"# License\n\n```text\n{text}```\n" if file.name == "LICENSE" else text


def on_files(files: Any, config: Any) -> Any:
    pages = [DOCS / f.src_uri for f in files if f.is_documentation_page()]
    files.append(File.generated(config, "c-reference.md", content=c_reference.page(ROOT / "cpp" / "include" / "lemo")))
    for name, uri in OUTSIDE.items():
        if (ROOT / name).exists():
            pages.append(ROOT / name)
            files.append(File.generated(config, uri, content=content_of(ROOT / name)))
    linked = {
        resolve(link.target, page)[0]
        for page in pages
        if page.suffix == ".md"
        for link in local_links(page.read_text())
    }
    for file in sorted(linked):
        uri = site_path(file) if file.is_relative_to(ROOT) and file.is_file() else None
        if uri is not None and files.get_file_from_path(uri) is None:
            if file.suffix in LANGUAGES:
                files.append(File.generated(config, uri, content=content_of(file)))
            else:
                files.append(File.generated(config, uri, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    uri = page.file.src_uri
    if uri == "c-reference.md" or uri.startswith("repository/"):
        return markdown
    return localized(markdown, source_of(uri), uri)
