"""The units and the proxy of deploy/ as they are shipped, but for their paths and ports."""

import os
import re
import shlex
import shutil
import ssl
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from deploy.credentials import make_certificates, make_node_key, public_half
from simulations.processes import free_port, stop_family, tool
from simulations.superlink import PROJECT, QUIET

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class Machine:
    """A directory in place of a machine's root, and ports that are free in place of the shipped ones."""

    def __init__(self, root):
        self.etc, self.state = root / "etc", root / "state"
        self.state.mkdir()
        self.link, self.gate, self.node = free_port(), free_port(), free_port()
        self.files = make_certificates(self.etc, [])
        self.key = make_node_key(self.etc)
        self.started = []

    def here(self, text):
        places = {"/etc/smi-fed": self.etc, "/var/lib/smi-fed": self.state, "/opt/smi-fed/.venv/bin": Path(tool(""))}
        ports = {"127.0.0.1:8000": f"127.0.0.1:{self.link}", "--port 8000": f"--port {self.link}"}
        for old, new in {**places, **ports, "8443": self.gate}.items():
            text = text.replace(old, str(new))
        return text

    def start(self, unit, environment_file="", *more):
        """The command of a unit, in its environment."""
        text = self.here((PROJECT / "deploy" / "systemd" / unit).read_text().replace("\\\n", " "))
        words = [*re.findall(r"^Environment=(.*)", text, re.MULTILINE), environment_file]
        own = dict(word.split("=", 1) for line in words for word in shlex.split(line, comments=True))
        (line,) = re.findall(r"^ExecStart=(.*)", text, re.MULTILINE)
        command = [re.sub(r"^\$\{(\w+)\}$", lambda name: own[name[1]], word) for word in shlex.split(line)]
        assert {word for word in command if "smi-fed" in word and str(self.etc.parent) not in word} == set()
        with self.log(unit).open("w") as log:
            env = {**os.environ, **own, "FLWR_DISABLE_UPDATE_CHECK": "1"}
            process = subprocess.Popen([*command, *more], cwd=self.state, env=env, stdout=log, stderr=log)
        self.started.append(process)

    def log(self, name):
        return self.state / f"{name}.log"

    def proxy(self, nginx):
        config = self.state / "nginx.conf"
        paths = "".join(f"{kind}_temp_path {self.state}/{kind};" for kind in ("fastcgi", "uwsgi", "scgi", "proxy"))
        server = self.here((PROJECT / "deploy" / "nginx.conf").read_text())
        head = f"daemon off; master_process off; pid {self.state}/pid; error_log stderr; events {{}}"
        paths += f"client_body_temp_path {self.state}/body; access_log off;"
        config.write_text(f"{head}\nhttp {{ {paths}\n{server} }}")
        self.started.append(subprocess.Popen([nginx, "-c", config, "-e", "stderr", "-p", self.state]))

    def ask(self, port, path, **content):
        trust = ssl.create_default_context(cafile=self.files.authority)
        return httpx.post(f"https://localhost:{port}{path}", verify=trust, **content).status_code

    def wait(self, there):
        deadline = time.monotonic() + 90
        while not there():
            assert time.monotonic() < deadline, [log.read_text() for log in self.state.glob("*.log")]
            time.sleep(0.2)

    def answers(self, port):
        def there():
            try:
                return bool(self.ask(port, "/health"))
            except httpx.HTTPError:
                return False

        self.wait(there)


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    yield machine
    for process in machine.started:
        stop_family(process, machine.state)


def flwr(machine, *command):
    config = (
        f'[superlink.mine]\naddress = "127.0.0.1:{machine.link}"\nroot-certificates = "{machine.files.authority}"\n'
    )
    (machine.state / "config.toml").write_text(config)
    env = {**os.environ, **QUIET, "FLWR_HOME": str(machine.state)}
    return subprocess.run([tool("flwr"), *command, "mine"], env=env, check=True, capture_output=True, text=True).stdout


def test_a_node_comes_through_the_gate_and_nobody_else(machine):
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    machine.start("smi-fed-superlink.service")
    machine.answers(machine.link)
    flwr(machine, "supernode", "register", str(public_half(machine.key)))
    if nginx is None:
        machine.gate = machine.link
    else:
        machine.proxy(nginx)
        machine.answers(machine.gate)
    settings = (PROJECT / "deploy" / "systemd" / "node.env").read_text()
    settings = settings.replace("superlink.example.org:8443", f"localhost:{machine.gate}")
    machine.start("smi-fed-supernode.service", settings, "--port", str(machine.node))
    log = machine.log("smi-fed-supernode.service")
    machine.wait(lambda: "SuperNode ID: " in log.read_text())
    assert "online" in flwr(machine, "supernode", "list")
    if nginx is None:
        pytest.skip("units are checked; without nginx the gate is not")
    inside = {path: machine.ask(machine.link, path) for path in ("/v1/control/list-runs", "/v1/runtime/acquire-task")}
    assert 403 not in inside.values()
    for path in (*inside, "/health", "/docs", "/v1/fleet/../control/list-runs", "/v1/fleet/%2e%2e/control/list-runs"):
        assert machine.ask(machine.gate, path) == 403, path
    piece = {"content": bytes(6 * 2**20)}  # more than one piece of weights
    assert machine.ask(machine.gate, "/v1/fleet/push-object", **piece) == machine.ask(
        machine.link, "/v1/fleet/push-object", **piece
    )
