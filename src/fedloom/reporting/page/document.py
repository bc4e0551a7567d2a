"""A whole page of HTML: styles and script inside it, nothing fetched, light and dark."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from fedloom.reporting.svg import element
from fedloom.run_folder import durable

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(title: str, body: str) -> str:
    """Return a page that is readable without network, and in print."""
    head = element(
        "head",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        element("title", text=title),
        f"<style>{_asset('report.css')}</style>",
    )
    script = f"<script>{_asset('report.js')}</script>"
    return f'<!doctype html>\n<html lang="en">{head}{element("body", body, script)}</html>\n'


def write_page(html: str, out: Path) -> None:
    """Write a page.

    Raises:
        RunError: it cannot be written.
    """
    with durable.explained(str(out), "choose another place for the page"):
        out.parent.mkdir(parents=True, exist_ok=True)
        durable.write_bytes(out, html.encode())


def beginning(title: str) -> str:
    """Return how every page begins whose title begins so."""
    return page(title, "").partition("</title>")[0]


def _asset(name: str) -> str:
    return resources.files("fedloom.reporting.page").joinpath(name).read_text(encoding="utf-8")


def scheme_button() -> str:
    """Return the button that changes between light and dark."""
    return element("button", text="Light / dark", type="button", id="scheme")
