"""Run the install lines of the documentation and of the container files in an empty environment.

python scripts/try_install.py            # builds a wheel of this tree and installs it, extra `sites` included

The lines are taken from where they are printed or written; only the program, the package's address and the versions
(`constraints.txt`) are substituted. Then each role's own command must start from there.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from fedloom.sites.service_files import server_container, site_container

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = ("docs/sites/index.md",)
PLACE = "/opt/fedloom"


def container_lines(text: str) -> tuple[list[str], list[str]]:
    """Return a container file's RUN lines about packages, and the words of its entry point."""
    instructions = [line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    runs = [value for name, value in instructions if name == "RUN" and PLACE in value]
    (entry,) = (value for name, value in instructions if name == "ENTRYPOINT")
    return runs, json.loads(entry)


def written_lines(page: str) -> list[str]:
    """Return the lines of a page that install fedloom."""
    return re.findall(r"^pip install .*fedloom.*$", (ROOT / page).read_text("utf-8"), re.MULTILINE)


def run(line: str, place: Path, wheel: Path) -> None:
    """Run a line in the shell, in the environment at ``place``."""
    line = line.replace(PLACE, str(place)).replace("'fedloom[sites]'", '"$FEDLOOM"')
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    own = {"FEDLOOM": f"fedloom[sites] @ {wheel.as_uri()}", "PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
    print(f"$ {line}", flush=True)
    subprocess.run(["sh", "-ec", line], check=True, env={**os.environ, **own, "PATH": path}, stdin=subprocess.DEVNULL)


def main() -> None:
    """Build, install, start."""
    with tempfile.TemporaryDirectory() as folder:
        place, build = Path(folder) / "fedloom", Path(folder) / "build"
        subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", build, ROOT], check=True)
        (wheel,) = build.glob("fedloom-*.whl")
        site, server = site_container(Path("site.toml")), server_container(Path("study.toml"), 8002)
        (runs, site_entry), (server_runs, server_entry) = container_lines(site), container_lines(server)
        assert runs == server_runs, "both roles are installed alike"
        written = [line for page in WRITTEN for line in written_lines(page)]
        assert written, "the pages say how to install"
        for line in (*runs, *written):
            run(line, place, wheel)
        for entry in (site_entry, server_entry):
            program, *words = entry
            command = words[:2] if words[0] == "site" else words[:1]
            run(shlex.join([program, *command, "--help"]) + " > /dev/null", place, wheel)
        installed = f"{place}/bin/python -c 'import nvflare, grpc, cryptography, fedloom.sites.members'"
        run(installed, place, wheel)
    print("installed and started from an empty environment")


if __name__ == "__main__":
    main()
