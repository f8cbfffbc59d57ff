"""The playground at "/": a few files, no build, no foreign hosts. They hold no secrets, so they are open; what the page
asks needs a key like anything else."""

from __future__ import annotations

from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

_FILES = {"/": "index.html", "/page/page.css": "page.css", "/page/page.js": "page.js", "/page/tree.js": "tree.js"}
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    # Nothing from elsewhere, nothing inside another page.
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: web.Application) -> list[web.AbstractRoute]:
    """Serve the files; answers their routes."""
    return [app.router.add_get(path, _handler(Path(__file__).with_name(name))) for path, name in _FILES.items()]


def _handler(path: Path) -> Handler:
    body = path.read_bytes()

    async def page(request: web.Request) -> web.Response:
        return web.Response(body=body, content_type=_KINDS[path.suffix], charset="utf-8", headers=_HEADERS)

    return page
