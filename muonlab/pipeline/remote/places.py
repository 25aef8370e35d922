"""Which rented machines there are, under which names, and by which key each is known again.

    .muonlab/remotes.yaml    name -> address, price and pinned host key; git does not see it
             known_hosts     the pinned keys as ssh reads them, made from that file

A machine that is rented for hours is no part of a study, so nothing of it is committed (docs/adr/0016-remote.md). A
host key is taken over once, when a person has compared its fingerprint; ssh then refuses any other.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml
from pydantic import Field, ValidationError, field_validator

from muonlab.pipeline.answer import Answer, Facts
from muonlab.pipeline.layout import Layout
from muonlab.registry.errors import UsageError, explain, explains, unknown_name
from muonlab.registry.files import write_atomically
from muonlab.registry.yamlfile import read_yaml
from muonlab.reporting.wording import money

FOLDER = ".muonlab"
FILE = f"{FOLDER}/remotes.yaml"
RESERVED = ("local", "ray")
"""Names that `--on` gives another meaning, or may."""
CONNECT_S = 10
"""The longest that a machine may take to answer."""
OF_EVERY_CONNECTION = {
    # Who answers is decided by the pinned key alone, and shown no question.
    "GlobalKnownHostsFile": "/dev/null", "KnownHostsCommand": "none", "VerifyHostKeyDNS": "no",
    "NoHostAuthenticationForLocalhost": "no", "CheckHostIP": "no", "UpdateHostKeys": "no", "BatchMode": "yes",
    # A connection that is shared was checked by whoever opened it, against other keys.
    "ControlMaster": "no", "ControlPath": "none",
    # It carries one command of ours, and nothing else.
    "RemoteCommand": "none", "PermitLocalCommand": "no", "ClearAllForwardings": "yes", "ForwardAgent": "no",
    "ForwardX11": "no",
    "ConnectTimeout": str(CONNECT_S), "LogLevel": "INFO",
}  # fmt: skip
"""Options of ssh that no configuration of a user's changes."""


@explains
class Remote(Facts):
    """A machine that is reached over SSH."""

    name: str
    user: str
    host: str
    port: int = Field(default=22, ge=1, le=65535)
    host_key: str
    """Its type and its base64, as in known_hosts."""
    key_file: str | None = None
    """Private key to log in with; null for those that ssh tries by itself (its agent, its configuration)."""
    price_usd_per_hour: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    folder: str = "muonlab-pod"
    """Where everything lies there, from the user's home."""
    python: str = "python3"
    prepared: bool = False
    """That Python has the packages: no .venv is made there."""

    @field_validator("host_key")
    @classmethod
    def _is_key(cls, value: str) -> str:
        fingerprint(value)
        return value

    @property
    def address(self) -> str:
        """`user@host`, with the port where it is not 22."""
        return f"{self.user}@{self.host}" + (f" port {self.port}" if self.port != 22 else "")

    def spent(self, seconds: float) -> str:
        """What so many seconds of the machine cost, for a reader."""
        if self.price_usd_per_hour == 0:
            return "no price was given for it"
        cost = seconds / 3600 * self.price_usd_per_hour
        return f"{money(cost)} at {hourly(self.price_usd_per_hour)}"


def hourly(price_usd: float) -> str:
    """The price of an hour, for a reader."""
    return f"{money(price_usd)} an hour" if price_usd else "no price given"


def fingerprint(host_key: str) -> str:
    """`SHA256:...` of a host key, as ssh shows it. Raises ValueError for what is no key."""
    kind, _, encoded = host_key.partition(" ")
    try:
        blob = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        blob = b""
    if not blob or kind.encode() not in blob[:64]:
        raise ValueError("it should be a host key, its type and its base64.")
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


class RemoteRow(Facts):
    """One machine of the list."""

    name: str
    address: str
    host_key: str
    """Fingerprint of the pinned key."""
    price_usd_per_hour: float
    folder: str
    python: str


class RemoteList(Answer):
    """The machines that `muon remote add` has named."""

    remotes: list[RemoteRow]

    def lines(self) -> Iterator[str]:
        """Two lines a machine."""
        if not self.remotes:
            yield "No machine is named yet; `muon remote add NAME user@host` names one."
        for its in self.remotes:
            yield f"{its.name}  {its.address}, {hourly(its.price_usd_per_hour)}"
            yield f"    host key {its.host_key}; {its.python}; everything in {its.folder}"


def list_remotes(layout: Layout) -> RemoteList:
    """What is known of every machine here; connects to none."""
    return RemoteList(
        remotes=[
            RemoteRow(
                name=its.name,
                address=its.address,
                host_key=fingerprint(its.host_key),
                price_usd_per_hour=its.price_usd_per_hour,
                folder=its.folder,
                python=its.python + (", as it is" if its.prepared else ", and a .venv made with it"),
            )
            for its in read_remotes(layout).values()
        ]
    )


def read_remotes(layout: Layout) -> dict[str, Remote]:
    """The machines by name. Raises UsageError for a file that cannot be read."""
    path = layout.main / FILE
    if not path.exists():
        return {}
    found = {}
    for name, content in read_yaml(path, where=FILE).items():
        try:
            found[name] = Remote.model_validate({"name": name, **content})
        except ValidationError as error:
            raise explain(error, FILE, prefix=name) from None
        except TypeError:
            raise UsageError(f"{FILE}: {name}: found {content!r}; it should be a mapping of keys to values.") from None
    return found


def find_remote(layout: Layout, name: str) -> Remote:
    """The machine of that name. Raises UsageError where there is none."""
    known = read_remotes(layout)
    if name not in known:
        if not known:
            raise UsageError(f"{name!r}: no machine is named yet; `muon remote add {name} user@host` does it.")
        raise unknown_name(FILE, "remote", name, known)
    return known[name]


def add_remote(layout: Layout, remote: Remote) -> None:
    """Write a machine down; it takes the place of one with its name."""
    _write(layout, {**read_remotes(layout), remote.name: remote})


def remove_remote(layout: Layout, name: str) -> None:
    """Forget a machine; nothing there is touched. Raises UsageError where there is none."""
    gone = find_remote(layout, name)
    _write(layout, {key: its for key, its in read_remotes(layout).items() if key != gone.name})


def _write(layout: Layout, remotes: dict[str, Remote]) -> None:
    (layout.main / FOLDER).mkdir(exist_ok=True)
    content = {name: its.model_dump(exclude={"name"}) for name, its in remotes.items()}
    write_atomically(layout.main / FILE, yaml.safe_dump(content, sort_keys=False))
    known_hosts(layout).write_text(
        "".join(f"{alias(its.name)} {its.host_key}\n" for its in remotes.values()), encoding="utf-8"
    )


def known_hosts(layout: Layout) -> Path:
    """The pinned keys as ssh reads them."""
    return layout.main / FOLDER / "known_hosts"


def alias(name: str) -> str:
    """Under which name ssh looks for a machine's key: addresses of rented machines are given again."""
    return f"muonlab-{name}"


def check_name(name: str) -> str:
    """Raises UsageError for a name that `--on` could not take."""
    if name in RESERVED:
        raise UsageError(f"muon remote add: the name {name!r} has a meaning of its own for `--on`; choose another.")
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,39}", name):
        raise UsageError(
            f"muon remote add: found the name {name!r}; it should be up to 40 lower-case letters, digits and hyphens."
        )
    return name


def split_address(address: str) -> tuple[str, str]:
    """User and host of `user@host`. Raises UsageError for anything else."""
    user, separator, host = address.rpartition("@")
    # A first hyphen would make it an option of ssh.
    plain = all(re.fullmatch(r"[A-Za-z0-9_\[][A-Za-z0-9_.:\[\]-]*", part) for part in (user, host))
    if not (separator and plain):
        raise UsageError(f"muon remote add: found {address!r}; it should be user@host, such as root@203.0.113.7.")
    return user, host.strip("[]")


def offered_key(user: str, host: str, port: int) -> str:
    """The host key that answers at an address now: nothing vouches for it, and no credentials are shown to it.

    ssh itself asks, so that its configuration (a jump host, an alias) holds. Raises UsageError where none answers.
    """
    from muonlab.pipeline.remote.link import ssh_failure

    with tempfile.TemporaryDirectory() as folder:
        seen = Path(folder) / "known_hosts"
        options = {
            **OF_EVERY_CONNECTION, "StrictHostKeyChecking": "accept-new", "UserKnownHostsFile": str(seen),
            "HashKnownHosts": "no", "HostKeyAlias": "it", "PreferredAuthentications": "none", "Port": str(port),
        }  # fmt: skip
        asked = subprocess.run(
            ["ssh", *(f"-o{key}={value}" for key, value in options.items()), "-T", f"{user}@{host}", "true"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        lines = seen.read_text(encoding="utf-8").splitlines() if seen.exists() else []
    if not lines:
        raise ssh_failure(f"{user}@{host} port {port}", asked.stderr, pinned=None)
    return lines[0].partition(" ")[2]
