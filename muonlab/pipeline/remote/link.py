"""To another machine by the system's ssh: requests to the agent there, and git's own traffic.

Every connection is refused unless the machine shows the pinned host key, and asks nobody anything: no password, no
passphrase, no new key. What is secret stays in key files and ssh's agent; a command line has addresses, the constant
text that reads the agent, and its length.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from muonlab.pipeline.layout import Layout
from muonlab.pipeline.remote import agent
from muonlab.pipeline.remote.places import OF_EVERY_CONNECTION, Remote, alias, fingerprint, known_hosts
from muonlab.registry.errors import CellsFailedError, UsageError

READ_AGENT = (
    "import sys; s = sys.stdin.buffer.read(int(sys.argv[1])); "
    "exec(compile(s, 'agent.py', 'exec'), {'__name__': '__main__', 'SOURCE': s})"
)
LOST_AFTER = 3
"""Signs of life, one every 10 s, that may stay out before a connection counts as lost."""
NOT_FOUND = (126, 127)
"""Exit codes of a shell for a command that is not there."""


class UnreachableError(UsageError):
    """No connection, or it was lost: trying again may help."""


class Link:
    """How one machine is reached."""

    def __init__(self, layout: Layout, remote: Remote) -> None:
        self.layout, self.remote = layout, remote

    def ask(self, verb: str, **request: Any) -> dict[str, Any]:
        """The answer to a request that has one. Raises as `answers` does."""
        answers = list(self.answers(verb, **request))
        if not answers:
            raise UsageError(
                f"{self.remote.name}: what answers there is not a Python that was given a program; does its account "
                "run commands that are asked for over ssh?"
            )
        return answers[-1]

    def answers(self, verb: str, **request: Any) -> Iterator[dict[str, Any]]:
        """The answers to a request, as they come; whoever stops listening ends the connection.

        Raises UnreachableError where there is no connection or it is lost, and UsageError for what is refused.
        """
        with self._asked(verb, request) as stream:
            for line in stream:
                if (answer := _answer(line)) is not None:
                    if "refused" in answer:
                        raise UsageError(f"{self.remote.name}: {answer['refused']}.")
                    yield answer

    def bring(self, into: Path, **request: Any) -> None:
        """Lay the files that the agent sends into a folder. Raises as `answers` does, and for a stream that is cut."""
        with self._asked("send", request) as stream:
            for line in stream:
                if (answer := _answer(line)) is None:
                    continue
                if "refused" in answer:
                    raise UsageError(f"{self.remote.name}: {answer['refused']}.")
                try:
                    with tarfile.open(fileobj=stream, mode="r|") as tar:
                        tar.extractall(into, filter="data")
                except (tarfile.TarError, EOFError) as error:
                    raise UnreachableError(
                        f"{self.remote.name}: the files that come from there were cut off ({error}); the same command "
                        "brings the rest."
                    ) from None
                stream.read()
                return

    @contextlib.contextmanager
    def _asked(self, verb: str, request: dict[str, Any]) -> Iterator[IO[bytes]]:
        source = Path(agent.__file__).read_bytes()
        its = self.remote
        asked = {"folder": its.folder, "python": its.python, "prepared": its.prepared, **request, "verb": verb}
        command = f"{shlex.quote(its.python)} -c {shlex.quote(READ_AGENT)} {len(source)}"
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(
                ["ssh", *self.options(), "-T", f"{its.user}@{its.host}", command],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
            )  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                # The input stays open: its end tells the agent that nobody listens any more.
                with contextlib.suppress(BrokenPipeError):  # said below, with the reason
                    process.stdin.write(source + json.dumps(asked).encode() + b"\n")
                    process.stdin.flush()
                yield process.stdout
                _close(process)
                if process.wait() != 0:
                    said.seek(0)
                    raise self._failure(process.returncode, said.read().decode(errors="replace"))
            finally:
                _close(process)
                process.stdout.close()
                if process.poll() is None:
                    process.terminate()
                process.wait()

    def options(self) -> list[str]:
        """For ssh. They come before, and so win over, a user's configuration."""
        its = self.remote
        chosen = {
            **OF_EVERY_CONNECTION,
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": f'"{known_hosts(self.layout)}"',
            "HostKeyAlias": alias(its.name),
            "ServerAliveInterval": "10",
            "ServerAliveCountMax": str(LOST_AFTER),
            "Port": str(its.port),
        }
        key = ["-i", its.key_file, "-oIdentitiesOnly=yes"] if its.key_file is not None else []
        return [*(f"-o{name}={value}" for name, value in chosen.items()), *key]

    def _failure(self, code: int, said: str) -> UsageError:
        its = self.remote
        if code == 255:
            return ssh_failure(f"{its.name} ({its.address})", said, pinned=its.host_key)
        if code in NOT_FOUND:
            return UsageError(
                f"{its.name}: there is no {its.python} there; install Python 3.11 or newer, or name the one to use by "
                f"`muon remote add {its.name} ... --python PATH`."
            )
        return UsageError(f"{its.name}: the agent there ended with {code}: {_last(said)}")

    # Git

    def git(self, *arguments: str, path: str) -> str:
        """Run a git command that talks to the repository at `path` there; `URL` among its arguments names that.

        Raises UnreachableError or UsageError where git fails.
        """
        its = self.remote
        host = f"[{its.host}]" if ":" in its.host else its.host
        url = f"ssh://{its.user}@{host}:{its.port}{path}"
        done = subprocess.run(
            ["git", *(url if argument == "URL" else argument for argument in arguments)],
            cwd=self.layout.main, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
            env={**os.environ, "GIT_SSH_COMMAND": shlex.join(["ssh", *self.options()]), "GIT_SSH_VARIANT": "ssh",
                 "GIT_TERMINAL_PROMPT": "0"},
        )  # fmt: skip
        if done.returncode == 0:
            return done.stdout
        said = done.stdout + done.stderr
        if "No space left on device" in said or "quota exceeded" in said.lower():
            raise CellsFailedError(f"{its.name}: the disk there is full ({path}); free space there and start again.")
        if re.search(r"(?m)^(ssh: |Connection |kex_|.*Host key verification failed|.*Permission denied \()", said):
            raise ssh_failure(f"{its.name} ({its.address})", said, pinned=its.host_key)
        raise UsageError(f"{its.name}: `git {arguments[0]}` failed: {_last(said)}")


def _answer(line: bytes) -> dict[str, Any] | None:
    text = line.decode(errors="replace")
    # A line without an end was cut off with its connection, which ssh's exit code tells.
    if not (text.startswith(agent.MARK) and text.endswith("\n")):
        return None
    found: dict[str, Any] = json.loads(text.removeprefix(agent.MARK))
    return found


def _close(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def _last(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing."


def ssh_failure(whom: str, said: str, *, pinned: str | None) -> UsageError:
    """Why ssh has no connection, in a sentence, from what it printed."""
    if "Host key verification failed" in said:
        shown = re.search(r"SHA256:[A-Za-z0-9+/]+", said)
        was = "" if pinned is None else f" {fingerprint(pinned)} is pinned and"
        return UsageError(
            f"{whom}: another host key than before answers there:{was} {shown[0] if shown else 'another'} was shown, "
            "so that nothing was sent; if the machine was made anew, compare that with what its provider shows and pin "
            "it by `muon remote add`."
        )
    if "Permission denied" in said:
        return UsageError(
            f"{whom}: it lets none of our keys in; put your public key there, or name the private one by --key-file (a "
            "passphrase is given to `ssh-add` before)."
        )
    reasons = re.findall(r"(?m)^(?:ssh: |kex_exchange_identification: |client_loop: )?(.*\S)\s*$", said)
    told = [line for line in reasons if not line.startswith(("Warning: ", "fatal: ", "and the repository", "Please"))]
    why = told[-1].rstrip(".") if told else "it said nothing"
    return UnreachableError(f"{whom}: cannot be reached ({why}); is it running, and are address and port right?")
