"""The part that works on the other machine: sent there as text over ssh, it needs nothing but Python 3.11 and git.

    FOLDER/repository.git     bare; receives commits, and offers what runs have left as refs/muonlab/results/<run>
           checkout           the tree that runs, its .venv, its scratch/ and its DVC cache: kept from run to run
           in-use-since.json  when the first run was begun here: the machine has been paid for since
           runs/<run>/        request.json  what was asked for
                              process.json  number and start of the process that keeps the run
                              phase.json    what it is at
                              log           all that its commands print
                              end.json      how it ended; its place on the disk is taken at the start
                              brought       there once its results are where it was started from

A request is one JSON object on standard input, an answer one marked line of JSON on standard output. A run is kept by
a process of a session of its own, which a lost connection does not reach; its commands die with it, so that ending the
one ends all.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MARK = "\x1emuonlab "
"""Begins every line of an answer: what a login shell prints before is passed over."""
OLDEST = (3, 11)
END_BYTES = 4096
LOST = "its process ended without a word (killed, or the machine was restarted)"
LINE_MOST = 1500
"""Characters of a last line that are kept with the end of a run."""
STATUS_CODES = (0, 3, 5)
"""Exit codes of a `muon study status` that has written its records: all is well, incomplete, contradictory."""
LOOK_S = 0.2
TELL_EVERY_S = 2.0
PATIENCE_S = 30.0
"""For a run to end by itself, its records written, after it was asked to."""

SOURCE: bytes = globals().get("SOURCE", b"")
"""The text of this module, which whoever sends it defines."""


class RefusedError(Exception):
    """What cannot be done here, in a sentence."""


def main() -> None:
    """Serve one request, or keep a run (`agent.py keep FOLDER`)."""
    if sys.argv[1:2] == ["keep"]:
        sys.exit(_Keeper(pathlib.Path(sys.argv[2])).keep())
    request = json.loads(sys.stdin.buffer.readline())
    try:
        if sys.version_info[:2] < OLDEST:
            found = ".".join(map(str, sys.version_info[:3]))
            raise RefusedError(f"Python {found} is at {sys.executable}; 3.11 or newer is needed (`--python PATH`)")
        _VERBS[request["verb"]](_Place(request["folder"]), request)
    except RefusedError as error:
        _tell({"refused": str(error)})
    except OSError as error:
        _tell({"refused": f"{error.filename or request['folder']} cannot be used there ({error.strerror})"})


def _tell(answer: dict[str, Any]) -> None:
    sys.stdout.write(MARK + json.dumps(answer) + "\n")
    sys.stdout.flush()


class _Place:
    """The folder of muonlab on this machine."""

    def __init__(self, folder: str) -> None:
        self.folder = pathlib.Path.home() / folder
        self.repository = self.folder / "repository.git"
        self.checkout = self.folder / "checkout"
        self.runs = self.folder / "runs"
        self.since = self.folder / "in-use-since.json"

    def run_folders(self) -> list[pathlib.Path]:
        """Of all runs, the first first: their names end with the time."""
        found = [path for path in self.runs.glob("*") if (path / "process.json").exists()]
        return sorted(found, key=lambda path: path.name.rpartition(".")[2])

    def run(self, name: str | None) -> pathlib.Path:
        """The folder of a run, the last one by default."""
        folders = [folder for folder in self.run_folders() if name in (None, folder.name)]
        if not folders:
            raise RefusedError("no run was started there yet" if name is None else f"there is no run {name!r}")
        return folders[-1]

    def python(self, request: dict[str, Any]) -> str:
        """The Python whose packages muonlab uses here."""
        return str(request["python"]) if request["prepared"] else str(self.checkout / ".venv" / "bin" / "python")

    def is_set_up(self, request: dict[str, Any]) -> bool:
        """Whether the tree's own code can run here."""
        made = bool(request["prepared"]) or (self.checkout / ".venv" / ".ready").exists()
        return made and (self.checkout / "params.yaml").exists() and shutil.which(self.python(request)) is not None

    def environment(self, python: str) -> dict[str, str]:
        """In which the tree's own code runs."""
        path = os.path.dirname(shutil.which(python) or python) + os.pathsep + os.environ.get("PATH", os.defpath)
        quiet = {"DVC_NO_ANALYTICS": "true", "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONUNBUFFERED": "1"}
        return {**os.environ, **quiet, "PATH": path, "PYTHONPATH": str(self.checkout)}


def _read(path: pathlib.Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def _write(path: pathlib.Path, content: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content), encoding="utf-8")
    os.replace(part, path)


# What is seen of a machine and of its runs


def _hello(place: _Place, request: dict[str, Any]) -> None:
    there = next(path for path in (place.folder, *place.folder.parents) if path.is_dir())
    folders = place.run_folders()
    _tell(
        {
            "python": f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}",
            "git": _first_line(["git", "--version"]),
            "make": _first_line(["make", "--version"]),
            "gpu": _first_line(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]),
            "cores": os.cpu_count(),
            "folder": str(place.folder),
            "free_gb": shutil.disk_usage(there).free / 1e9,
            "set_up": place.is_set_up(request),
            "in_use_seconds": time.time() - _read(place.since)["since"] if place.since.exists() else None,
            "last_run": _state(folders[-1]) if folders else None,
        }
    )


def _first_line(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    said = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False).stdout.decode()
    return said.strip().partition("\n")[0]


def _runs(place: _Place, request: dict[str, Any]) -> None:
    _tell({"runs": [_state(folder) for folder in place.run_folders()]})


def _state(folder: pathlib.Path) -> dict[str, Any]:
    """Where a run stands."""
    request, process = _read(folder / "request.json"), _read(folder / "process.json")
    # Asked before the end is read, which whoever keeps the run writes last.
    lives = _lives(process)
    try:
        end = json.loads((folder / "end.json").read_text(encoding="utf-8"))
    except ValueError:  # blank until then, or just being written
        end = None
    lost = end is None and not lives
    return {
        **{key: request[key] for key in ("run", "study", "commit", "arguments", "price_usd_per_hour")},
        "phase": "ended" if end or lost else _read(folder / "phase.json")["phase"],
        "lives": end is None and lives,
        "code": end["code"] if end else None,
        "why": LOST if lost else None,
        **({"why": end["why"]} if end else {}),
        "seconds": end["seconds"] if end else _last_sign(folder, lives) - request["at"],
        "results": end["results"] if end else None,
        "uncommitted": end.get("uncommitted") if end else LOST if lost else None,
        "brought": (folder / "brought").exists(),
        "log_bytes": (folder / "log").stat().st_size,
    }


def _last_sign(folder: pathlib.Path, lives: bool) -> float:
    return time.time() if lives else (folder / "log").stat().st_mtime


def _identity(pid: int) -> dict[str, Any] | None:
    """What tells a process from a later one with the same number: when it began, in ticks since the machine did."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
    return None if state in "ZX" else {"pid": pid, "began_ticks": int(fields[18]), "boot": boot}


def _lives(process: dict[str, Any]) -> bool:
    known = {key: process[key] for key in ("pid", "began_ticks", "boot")}
    return _identity(process["pid"]) == known


def _session(leader: int) -> list[dict[str, Any]]:
    """The processes of a session."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(path.name)) == leader and (member := _identity(int(path.name))) is not None:
                found.append(member)
        except ProcessLookupError:
            continue
    return found


# Starting, following and stopping


def _prepare(place: _Place, request: dict[str, Any]) -> None:
    """Make what a commit is pushed to."""
    if shutil.which("git") is None:
        raise RefusedError("git is not installed there (on Debian: `apt-get install git`)")
    if not request["prepared"] and shutil.which("make") is None:
        raise RefusedError("make is not installed there (on Debian: `apt-get install make`)")
    place.runs.mkdir(parents=True, exist_ok=True)
    if not (place.repository / "HEAD").exists():
        _git(place.folder, "init", "--quiet", "--bare", str(place.repository))
    _tell({"repository": str(place.repository)})


def _git(folder: pathlib.Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=False)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise RefusedError(f"`git {arguments[0]}` failed there: {said[-1] if said else f'exit {done.returncode}'}")
    return done.stdout.decode().strip()


def _start(place: _Place, request: dict[str, Any]) -> None:
    """Start a run, unless one lives or has results that were not brought home yet: then say which."""
    with (place.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two that start at once, the second finds the first one's run
        if folders := place.run_folders():
            last = _settled(folders[-1])  # the tree is laid out anew for the next run
            same = all(last[key] == request[key] for key in ("study", "commit", "arguments"))
            if last["lives"] or (same and last["results"] and not last["brought"]):
                _tell({"there_is": last, "same": same})
                return
        now = time.time()
        run = f"{request['study']}.{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}-{os.getpid()}"
        folder = place.runs / run
        folder.mkdir()
        (folder / "end.json").write_text(" " * END_BYTES, encoding="utf-8")
        (folder / "agent.py").write_bytes(SOURCE)
        _write(folder / "request.json", {**request, "run": run, "at": now})
        _write(folder / "phase.json", {"phase": "starting"})
        if not place.since.exists():
            _write(place.since, {"since": now})
        with (folder / "log").open("ab") as log:
            keeper = subprocess.Popen(
                [sys.executable, str(folder / "agent.py"), "keep", str(folder)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder, start_new_session=True,
            )  # fmt: skip
        while not (folder / "process.json").exists():
            if keeper.poll() is not None:
                said = (folder / "log").read_text(encoding="utf-8").strip().rpartition("\n")[2]
                raise RefusedError(f"the run could not be started there: {said}")
            time.sleep(LOOK_S)
        _tell({"started": _state(folder)})


def _follow(place: _Place, request: dict[str, Any]) -> None:
    """Tell a run's log from an offset on, and where it stands, until it has ended."""
    folder, offset, told = place.run(request["run"]), int(request["offset"]), 0.0
    _end_with_connection(lambda: os._exit(0))
    while True:
        state = _state(folder)
        with (folder / "log").open("rb") as log:
            log.seek(offset)
            text = log.read(1 << 16)
        if state["lives"]:
            text = text[: text.rfind(b"\n") + 1]
        if text:
            offset += len(text)
            _tell({"log": text.decode(errors="replace"), "offset": offset})
        elif not state["lives"]:
            _tell({"state": state})
            return
        if time.monotonic() - told > TELL_EVERY_S:
            told = time.monotonic()
            _tell({"state": state})  # also the sign of life that finds a lost connection
        time.sleep(0 if text else LOOK_S)


def _end_with_connection(end: Callable[[], object]) -> None:
    """Call `end` when standard input closes, which is held open by whoever asks for as long as they listen."""

    def watch() -> None:
        while os.read(0, 1):  # not by sys.stdin, whose lock a thread must not hold when Python ends
            pass
        end()

    threading.Thread(target=watch, daemon=True).start()


def _stop(place: _Place, request: dict[str, Any]) -> None:
    """End the run that lives; its keeper first ends its commands and lets them write their records."""
    folder = place.run(request["run"])
    process = _read(folder / "process.json")
    lived = _lives(process)
    if lived:
        os.kill(process["pid"], signal.SIGTERM)
        deadline = time.monotonic() + request["patience_s"]
        while _lives(process) and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        if _lives(process):
            # No other session can have this number while its first process lives.
            for member in [process, *_session(process["pid"])]:
                if _lives(member):
                    os.kill(member["pid"], signal.SIGKILL)
            while _lives(process):
                time.sleep(LOOK_S)
    since = _read(place.since)["since"]
    _tell({"stopped": _state(folder), "lived": lived, "in_use_seconds": time.time() - since})


def _settle(place: _Place, request: dict[str, Any]) -> None:
    """Commit what the last run has left uncommitted, and tell where it stands."""
    folder = place.run(request["run"])
    with (place.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # no other run may begin in its tree meanwhile
        last = folder == place.run_folders()[-1]
        _tell({"state": _settled(folder) if last else _state(folder)})


def _settled(folder: pathlib.Path) -> dict[str, Any]:
    state = _state(folder)
    if state["uncommitted"]:
        _Keeper(folder).settle(state)
        return _state(folder)
    return state


def _brought(place: _Place, request: dict[str, Any]) -> None:
    (place.run(request["run"]) / "brought").touch()
    _tell({})


# Commands and files of the tree there


def _muon(place: _Place, request: dict[str, Any]) -> None:
    """Run a `muon` command in the tree, passing on what it prints; it ends with the connection."""
    python = place.python(request)
    if not place.is_set_up(request):
        raise RefusedError("nothing is set up there yet; `muon study run STUDY --on NAME` does it")
    process = subprocess.Popen(
        [python, "-m", "muonlab.cli", *request["arguments"]],
        cwd=place.checkout, env=place.environment(python), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    _end_with_connection(process.terminate)

    def pass_on(stream: Any, name: str) -> None:
        for line in stream:
            _tell({name: line.decode(errors="replace")})

    others = threading.Thread(target=pass_on, args=(process.stderr, "err"))
    others.start()
    pass_on(process.stdout, "out")
    others.join()
    _tell({"code": process.wait()})


def _send(place: _Place, request: dict[str, Any]) -> None:
    """Send objects of DVC's cache and waiting bundles, those that there are, as one stream of tar."""
    python = place.python(request)
    cache = place.checkout / ".dvc" / "cache"
    if request["objects"]:
        asked = subprocess.run(
            [python, "-m", "dvc", "cache", "dir"],
            cwd=place.checkout, env=place.environment(python), stdout=subprocess.PIPE, check=False,
        )  # fmt: skip
        cache = pathlib.Path(asked.stdout.decode().strip() or cache)
    found: list[tuple[pathlib.Path, str]] = []
    for md5 in request["objects"]:
        if re.fullmatch(r"[0-9a-f]{32}", md5):
            found.append((cache / "files" / "md5" / md5[:2] / md5[2:], f"objects/{md5}"))
    for digest in request["bundles"]:
        if re.fullmatch(r"[0-9a-f]{64}", digest):
            folder = place.checkout / "scratch" / digest / "bundle"
            found.extend((path, f"bundles/{digest}/{path.name}") for path in sorted(folder.glob("*")))
    _tell({"tar": True})
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as tar:
        for path, name in found:
            if path.is_file():
                tar.add(str(path), arcname=name, recursive=False)
    sys.stdout.buffer.flush()


_VERBS = {
    "hello": _hello, "runs": _runs, "prepare": _prepare, "start": _start, "follow": _follow, "stop": _stop,
    "settle": _settle, "brought": _brought, "muon": _muon, "send": _send,
}  # fmt: skip


# Keeping a run


class _StoppedError(Exception):
    """The run is to end now: with which code, and why."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code, self.why = code, why


class _Keeper:
    """Takes a run from its commit to its results, within its limit of cost."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.request = _read(folder / "request.json")
        self.place = _Place(self.request["folder"])
        self.began = time.monotonic()
        self.last_line = self.refusal = ""
        self.asked_to_stop = False
        self.within_limits = True

    def keep(self) -> int:
        """Set up, run, commit what came out, and write down how it ended."""
        signal.signal(signal.SIGTERM, self._note_stop)
        _write(self.folder / "process.json", _identity(os.getpid()) or {})
        code, why = 3, None
        try:
            self._set_up()
            study = self.request["study"]
            code = self._muon("running", "study", "run", study, *self.request["arguments"])
            why = (self.refusal or self.last_line) if code != 0 else None
        except _StoppedError as stop:
            code, why = stop.code, stop.why
        except RefusedError as error:
            why = str(error)
        except OSError as error:
            why = f"{error.filename or self.folder} cannot be used ({error.strerror})"
        left = self._left(whole=code == 0)
        self._write_end({"code": code, "why": (why or "")[:LINE_MOST] or None, **left, "seconds": self._seconds()})
        return code

    def settle(self, state: dict[str, Any]) -> None:
        """Commit what a run has left that could not do so itself, and write it down with how it ended."""
        self._write_end({**{key: state[key] for key in ("code", "why", "seconds")}, **self._left(whole=False)})

    def _seconds(self) -> float:
        return time.monotonic() - self.began

    def _left(self, *, whole: bool) -> dict[str, Any]:
        """Commit what came out; return the `results`, or why what there may be is `uncommitted`."""
        self.within_limits = False  # it takes seconds, and what was paid for is to be kept
        try:
            return {"results": self._commit(whole=whole), "uncommitted": None}
        except (RefusedError, OSError) as error:
            self._log(f"the results cannot be committed there: {error}\n".encode())
            return {"results": None, "uncommitted": str(error)[:LINE_MOST]}

    def _note_stop(self, number: int, frame: object) -> None:
        self.asked_to_stop = True

    def _set_up(self) -> None:
        """Lay the commit out, and make .venv or find it made."""
        commit = self.request["commit"]
        _git(self.place.folder, "init", "--quiet", str(self.place.checkout))
        _git(self.place.checkout, "fetch", "--quiet", str(self.place.repository), f"refs/muonlab/sent/{commit}")
        # What an earlier run has left is in its results, and its attempts are in scratch/.
        _git(self.place.checkout, "checkout", "--quiet", "--force", "--detach", commit)
        for key in ("name", "email"):
            _git(self.place.checkout, "config", f"user.{key}", self.request[key])
        if not self.request["prepared"]:
            made = ["make", "--no-print-directory", "setup", f"PYTHON={self.request['python']}"]
            if (code := self._command("setting up .venv", made, self.place.checkout)) != 0:
                raise RefusedError(f"`make setup` failed with {code}: {self.last_line}")

    def _muon(self, phase: str, *arguments: str) -> int:
        python = self.place.python(self.request)
        return self._command(phase, [python, "-m", "muonlab.cli", *arguments], self.place.checkout, python)

    def _commit(self, *, whole: bool) -> str | None:
        """Commit ledger, lock files and reports and offer the commit; return its hash, None where nothing is new.

        Raises RefusedError or OSError where that fails.
        """
        place, request = self.place, self.request
        if not place.is_set_up(request) or not (place.checkout / ".git").exists():
            return None
        # Its child is a commit that could not be offered, which is made anew.
        if request["commit"] not in _git(place.checkout, "rev-list", "--parents", "--max-count=1", "HEAD").split():
            return None
        _git(place.checkout, "reset", "--quiet", "--soft", request["commit"])
        if not whole:  # brings the attempts that were cut off into the ledger
            code = self._muon("recording", "study", "status", request["study"])
            if code not in STATUS_CODES:
                raise RefusedError(f"`muon study status` failed with {code}: {self.refusal or self.last_line}")
        if (code := self._muon("committing", "commit", f"Results of {request['run']}")) != 0:
            raise RefusedError(f"`muon commit` failed with {code}: {self.refusal or self.last_line}")
        made = _git(place.checkout, "rev-parse", "HEAD")
        if made == request["commit"]:
            return None
        _git(place.checkout, "push", "--quiet", str(place.repository), f"HEAD:refs/muonlab/results/{request['run']}")
        return made

    def _command(self, phase: str, command: list[str], cwd: pathlib.Path, python: str | None = None) -> int:
        """Run a command to its end, into the log; raises _StoppedError after ending it at a limit or when asked to."""
        _write(self.folder / "phase.json", {"phase": phase})
        self.last_line = self.refusal = ""
        process = subprocess.Popen(
            command, cwd=cwd, env=self.place.environment(python or sys.executable), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0, preexec_fn=_die_with_keeper,
        )  # fmt: skip
        reader = threading.Thread(target=self._read_out, args=(process.stdout,))
        reader.start()
        try:
            while process.poll() is None:
                if self.within_limits:
                    self._refuse_to_go_on()
                time.sleep(LOOK_S)
        except _StoppedError:
            _end_group(process)
            raise
        finally:
            reader.join(timeout=PATIENCE_S)
        return process.wait()

    def _read_out(self, stream: Any) -> None:
        for line in stream:
            self._log(line)

    def _log(self, line: bytes) -> None:
        if text := line.decode(errors="replace").strip():
            self.last_line = text
            if text.startswith("muon: "):
                self.refusal = text.removeprefix("muon: ")
        try:
            with (self.folder / "log").open("ab") as log:
                log.write(line)
        except OSError:  # the disk is full: the last line is kept with the end
            pass

    def _refuse_to_go_on(self) -> None:
        if self.asked_to_stop:
            raise _StoppedError(130, "it was stopped by `muon remote stop`")
        price, limit = self.request["price_usd_per_hour"], self.request["max_cost_usd"]
        spent = self._seconds() / 3600 * price
        if limit is not None and spent >= limit:
            raise _StoppedError(
                4, f"the machine has cost ${spent:.2f} since set-up began, and --max-cost is ${limit:.2f}; what was "
                "trained is kept, and the same command with a higher limit goes on from there"
            )  # fmt: skip

    def _write_end(self, end: dict[str, Any]) -> None:
        text = json.dumps(end).ljust(END_BYTES)
        with (self.folder / "end.json").open("r+", encoding="utf-8") as file:
            file.write(text)


def _die_with_keeper() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of <linux/prctl.h>
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored by what a shell starts in the background


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a command and what it started, as Ctrl-C would, which lets it write its records; then by force."""
    for number, patience_s in ((signal.SIGINT, PATIENCE_S), (signal.SIGTERM, 5.0), (signal.SIGKILL, PATIENCE_S)):
        if process.poll() is None:
            os.killpg(process.pid, number)
            deadline = time.monotonic() + patience_s
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(LOOK_S)


if __name__ == "__main__":
    main()
