"""What keeps a server or a site running: a systemd unit of this installation, a container file of this version.

Both are printed by a command and not shipped as files, because they name what only an installation knows: the program,
the folder, the version.
"""

from __future__ import annotations

import getpass
import json
import sys
from importlib.metadata import version
from pathlib import Path


def site_unit(site_file: Path, name: str) -> str:
    """Return the systemd unit of a site: refused for good, it stays down; otherwise it comes back."""
    # Exit code 2 says what a person has to mend: a kit that does not fit, a site that was turned away.
    again = ["Restart=on-failure", "RestartSec=10", "RestartPreventExitStatus=2"]
    return _unit(f"fedloom site {name}", ("site", "run", str(site_file.absolute())), again)


def server_unit(study_file: Path, out: Path) -> str:
    """Return the systemd unit of a study's server: it goes on after a crash, and for a while without its quorum."""
    again = ["Restart=on-failure", "RestartSec=30"]
    command = ("serve", str(study_file.absolute()), "--out", str(out.absolute()))
    return _unit(
        f"fedloom study {study_file.stem}", command, again, ["StartLimitIntervalSec=3600", "StartLimitBurst=20"]
    )


def _unit(description: str, command: tuple[str, ...], again: list[str], limits: list[str] | None = None) -> str:
    program = Path(sys.executable).with_name("fedloom")
    return "\n".join(
        [
            "[Unit]",
            f"Description={_escaped(description)}",
            "Wants=network-online.target",
            "After=network-online.target",
            *(limits or []),
            "",
            "[Service]",
            f"User={getpass.getuser()}",
            f"WorkingDirectory={_escaped(str(Path.cwd()))}",
            f"ExecStart={' '.join(_quoted(word) for word in (str(program), *command))}",
            *again,
            "KillSignal=SIGINT",
            "KillMode=mixed",
            "TimeoutStopSec=600",
            "NoNewPrivileges=true",
            "PrivateTmp=true",
            "ProtectSystem=full",
            "",
            "[Install]",
            "WantedBy=multi-user.target",
        ]
    )


def site_container(site_file: Path) -> str:
    """Return the container file of a site, for its file's folder to be mounted at /fedloom."""
    return _container("site", ("site", "run", site_file.name))


def server_container(study_file: Path, port: int) -> str:
    """Return the container file of a study's server, for its file's folder to be mounted at /fedloom."""
    return _container("server", ("serve", study_file.name, "--out", f"runs/{study_file.stem}"), (port,))


def _container(role: str, command: tuple[str, ...], ports: tuple[int, ...] = ()) -> str:
    published = "".join(f" -p {port}:{port}" for port in ports)
    name, python = f"fedloom-{role}", f"{sys.version_info.major}.{sys.version_info.minor}"
    return "\n".join(
        [
            f"# A {role} of fedloom {version('fedloom')}. Build it without a context, so that no key gets into it:",
            f"#   podman build -t {name} - < Containerfile",
            "# Run it in the folder of its files, with relative paths in them:",
            f"#   podman run -d --name {name} --restart on-failure --userns keep-id{published} \\",
            f'#     -v "$PWD":/fedloom:Z {name}',
            "# Another package, such as a wheel at an address: --build-arg FEDLOOM=ADDRESS",
            f"FROM docker.io/library/python:{python}-slim",
            f'ARG FEDLOOM="fedloom[sites]=={version("fedloom")}"',
            "RUN python -m venv /opt/fedloom",
            'RUN /opt/fedloom/bin/pip install --no-cache-dir "$FEDLOOM"',
            "RUN useradd --uid 1000 --create-home fedloom",
            "USER fedloom",
            "WORKDIR /fedloom",
            'VOLUME ["/fedloom"]',
            *(f"EXPOSE {port}" for port in ports),
            "STOPSIGNAL SIGINT",
            f"ENTRYPOINT {json.dumps(['/opt/fedloom/bin/fedloom', *command])}",
        ]
    )


def _quoted(word: str) -> str:
    """Return a word of a command line as systemd reads it: `%` and `$` stand for something else there."""
    plain = word.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$").replace("%", "%%")
    return f'"{plain}"' if set(plain) & set(" \t'\"\\;#") else plain


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("%", "%%")
