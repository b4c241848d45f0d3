"""Check the links of a built site, offline: python scripts/check_links.py docs/_build/html

A link within the site must lead to a file of the site, and its anchor to an element there. Links to
other hosts are only checked for a host name. Each broken link is one line; then the exit code is 1.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links and the anchors of one HTML page."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src", "data") and value:
                self.links.append(value)
            elif value and (name == "id" or (tag, name) == ("a", "name")):
                self.anchors.add(value)


def check(site: Path) -> tuple[int, set[str], list[str]]:
    """Return the number of links within the site, the links to other hosts, and what is broken."""
    site = site.resolve()
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    inside, outside, broken = 0, set(), []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("mailto", "data"):
                continue
            if parts.scheme or parts.netloc:
                outside.add(link)
                web = parts.scheme in ("http", "https") and "." in (parts.hostname or "")
                problem = "" if web else "is not a web address"
            else:
                inside += 1
                problem = _problem(site, path, unquote(parts.path), unquote(parts.fragment), pages)
            if problem:
                broken.append(f"{path.relative_to(site)}: {link} {problem}")
    return inside, outside, broken


def _problem(site: Path, page: Path, to: str, anchor: str, pages: dict[Path, Page]) -> str:
    """Say what is wrong with a link within the site; an empty text if nothing is."""
    target = (site / to.lstrip("/") if to.startswith("/") else page.parent / to) if to else page
    target = target.resolve()
    if target.is_dir():
        target /= "index.html"
    if not target.is_relative_to(site):
        return "leads out of the site"
    if not target.is_file():
        return "leads to no file"
    if anchor and target in pages and anchor not in pages[target].anchors:
        return "leads to no such anchor"
    return ""


def main(argv: list[str]) -> int:
    if len(argv) != 1 or not Path(argv[0]).is_dir():
        print("check_links.py: name the folder of a built site", file=sys.stderr)
        return 2
    inside, outside, broken = check(Path(argv[0]))
    for line in broken:
        print(line, file=sys.stderr)
    for link in sorted(outside):
        print(f"not followed: {link}")
    print(f"{inside} links within the site, {len(broken)} broken; {len(outside)} other addresses")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
