"""A name on the hub that gave nothing: why, and what helps, in one line of ours."""

from __future__ import annotations

import socket

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from fedloom.data.hub_refusal import hub_refusal


def told(error: BaseException) -> str:
    return hub_refusal("model.base", "a folder or a name on the hub", "someone/model", error)


def caused(error: Exception, *causes: Exception) -> Exception:
    """Return an error that was caused by others, as libraries chain them."""
    last = error
    for cause in causes:
        last.__cause__ = cause
        last = cause
    return error


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_without_a_network_the_ways_out_are_named() -> None:
    unknown = socket.gaierror(-2, "Name or service not known")
    error = caused(OSError("We couldn't connect\nRead more"), LocalEntryNotFoundError("An error happened"), unknown)
    assert told(error) == (
        "model.base: expected a folder or a name on the hub, got 'someone/model', which is not on this machine and was "
        "not fetched: the hub does not answer (Name or service not known); check the name and the connection, name a "
        "folder, or set HF_HOME to a cache that has it and HF_HUB_OFFLINE=1"
    )


def test_where_nobody_is_asked_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = told(caused(LocalEntryNotFoundError("outgoing traffic\nmore"), OfflineModeIsEnabled("offline")))
    assert "HF_HUB_OFFLINE is set, so nobody was asked" in line
    assert line.endswith("name a folder, set HF_HOME to a cache that has it, or unset HF_HUB_OFFLINE")


def test_another_error_keeps_its_first_line() -> None:
    assert "not fetched: no room; check the name" in told(OSError("\n no room\nleft"))
    assert "not fetched: ValueError; check" in told(ValueError())


def test_a_chain_without_an_end_ends() -> None:
    first, second = ValueError("first"), ValueError("second")
    caused(first, second, first)
    assert "not fetched: first" in told(first)
