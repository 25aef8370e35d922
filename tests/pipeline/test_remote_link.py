"""What a link and the agent at its other end promise, shown with a real sshd and a tree that trains nothing.

The tree that runs there has a `muonlab.cli` of a few lines: what is tried is what becomes of a run, not training.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_remote_over_ssh import SSHD, Pod, make_key, pod, wait_until

from muonlab.pipeline.layout import Layout
from muonlab.pipeline.remote import agent
from muonlab.pipeline.remote.link import Link, UnreachableError
from muonlab.pipeline.remote.places import Remote, add_remote, offered_key
from muonlab.pipeline.remote.runs import follow_run
from muonlab.registry.errors import UsageError

__all__ = ["pod"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SSHD and shutil.which("ssh")), reason="needs sshd and ssh (Debian's openssh-server)"),
]
USER = getpass.getuser()
TREE = """
import pathlib, subprocess, sys, time
arguments = sys.argv[1:]
if arguments[:2] == ["study", "run"]:
    pathlib.Path("trained").touch()
    time.sleep(600)
if arguments[:2] == ["study", "status"]:
    pathlib.Path("ledger").write_text("a row" + chr(10))
    sys.exit(3)
if arguments[0] == "commit":
    subprocess.run(["git", "add", "ledger"], check=True)
    sys.exit(subprocess.run(["git", "commit", "--quiet", "--message", arguments[1]]).returncode)
"""


def linked(pod: Pod, tmp_path: Path, **options: Any) -> Link:
    """To a machine whose key is pinned."""
    layout = Layout(root=tmp_path / "ours", main=tmp_path / "ours")
    layout.main.mkdir(exist_ok=True)
    key = (pod.home / "host.pub").read_text().rsplit(maxsplit=1)[0]
    remote = Remote.model_validate(
        {"name": "pod", "user": USER, "host": "127.0.0.1", "port": pod.port, "host_key": key, "prepared": True,
         "key_file": str(pod.home / "user"), "folder": str(pod.home / "pod"), "python": sys.executable, **options}
    )  # fmt: skip
    add_remote(layout, remote)
    return Link(layout, remote)


def test_a_connection_that_is_cut_in_mid_line_is_one_that_was_lost(pod: Pod, tmp_path: Path) -> None:
    cut = pod.home / "cut"
    begun = (agent.MARK + '{"pyth').replace("\x1e", r"\036")
    # Its parent is the part of sshd that has this connection, and has passed on by then what was said.
    cut.write_text(f"#!/bin/sh\nprintf '{begun}'\nsleep 2\nkill -9 $PPID\n")
    cut.chmod(0o755)
    with pytest.raises(UnreachableError, match="cannot be reached"):
        linked(pod, tmp_path, python=str(cut)).ask("hello")


def test_the_pinned_key_alone_decides_whatever_ssh_is_configured_to(
    pod: Pod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = tmp_path / "configuration"
    configuration.write_text(
        "NoHostAuthenticationForLocalhost yes\nVerifyHostKeyDNS yes\nStrictHostKeyChecking no\nRemoteCommand true\n"
        f"KnownHostsCommand /bin/sed 's/^/muonlab-pod /' {pod.home}/host.pub\n"
        f"LocalForward {pod.home}/none/socket 127.0.0.1:1\nExitOnForwardFailure yes\n"
    )
    wrapper = tmp_path / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {configuration} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}")

    link = linked(pod, tmp_path)
    assert link.ask("hello")["folder"] == str(pod.home / "pod")
    assert offered_key(USER, "127.0.0.1", pod.port) == link.remote.host_key
    pod.stop()
    make_key(pod.home / "host")
    pod.start()
    with pytest.raises(UsageError, match="another host key than before answers there"):
        link.ask("hello")


def test_what_a_run_trained_that_was_killed_is_committed_when_it_is_asked_for_again(pod: Pod, tmp_path: Path) -> None:
    link = linked(pod, tmp_path)
    ours = link.layout.main

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ours, check=True, capture_output=True, text=True).stdout.strip()

    (ours / "muonlab").mkdir()
    (ours / "muonlab" / "__init__.py").touch()
    (ours / "muonlab" / "cli.py").write_text(TREE)
    (ours / "params.yaml").touch()
    git("init", "--quiet")
    git("add", "muonlab", "params.yaml")
    git("-c", "user.name=n", "-c", "user.email=n@example.org", "commit", "--quiet", "--message", "toy")
    commit = git("rev-parse", "HEAD")

    there = link.ask("prepare")["repository"]
    link.git("push", "--quiet", "URL", f"{commit}:refs/muonlab/sent/{commit}", path=there)
    asked: dict[str, Any] = {
        "study": "toy", "commit": commit, "arguments": [], "max_cost_usd": None, "price_usd_per_hour": 0.0,
        "name": "n", "email": "n@example.org",
    }  # fmt: skip
    run = link.ask("start", **asked)["started"]["run"]
    wait_until((pod.checkout / "trained").exists)
    keeper = agent._read(pod.runs()[0] / "process.json")
    os.kill(keeper["pid"], signal.SIGKILL)
    wait_until(lambda: not agent._lives(keeper))

    # As a full disk does, git refuses: the reason is told, and nothing is said to be home.
    hook = pod.checkout / ".git" / "hooks" / "pre-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\necho muon: no space >&2\nexit 1\n")
    hook.chmod(0o755)
    ended = follow_run(link.layout, link.remote, None, say=print)
    assert ended.exit_code == 3
    assert "lies there uncommitted (`muon commit` failed with 1: no space)" in ended.brought[0]
    assert "before you end the machine" in ended.brought[0]

    hook.unlink()
    found = link.ask("start", **asked)
    assert found["same"]
    assert found["there_is"]["run"] == run
    assert found["there_is"]["uncommitted"] is None
    assert not found["there_is"]["brought"]
    assert found["there_is"]["why"] == agent.LOST
    results = found["there_is"]["results"]
    shown = subprocess.run(
        ["git", "show", "--format=%P", "--name-only", f"refs/muonlab/results/{run}"],
        cwd=there, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert shown.stdout.split() == [commit, "ledger"]
    assert link.ask("settle", run=run)["state"]["results"] == results
