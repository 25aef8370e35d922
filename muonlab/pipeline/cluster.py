"""A Ray cluster as the place where cells are trained: `muon study run --on ray`.

    driver (this process)                         node of the cluster
    lists the missing cells                       `ray start` in its own checkout
    one slot for every K GPUs of each node  --->  detached actor, pinned to the node, holding K GPUs
    reserves a fence, gives the job         --->  a child process trains behind the fence (K ranks under torchrun)
    hears progress every second             <---  start.json, progress.json
    fetches files, checks hashes, promotes  <---  bundle and record

A slot outlives its driver; one that is started again finds it by name, and what had ended meanwhile by its fence. What
a worker or a node takes down with it is tried again, a bounded number of times (`muonlab.pipeline.pool`); what an
attempt has recorded itself (divergence, lack of memory, wrong input) is not. Without a token in front of it, a cluster
runs anybody's code: it is refused.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import shutil
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from muonlab.pipeline import cluster_node
from muonlab.pipeline.attempts import AttemptProgress, CellScratch, Purpose
from muonlab.pipeline.fences import Fence, Seen, fences_of, promote, record_lost, reserve
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.pool import Job, Worker
from muonlab.pipeline.processes import difference, dirty_text
from muonlab.registry.cell import Cell
from muonlab.registry.errors import CellsFailedError, MuonlabError, UsageError
from muonlab.registry.study import Study
from muonlab.reporting.wording import count, listed

DEFAULT_ADDRESS = "127.0.0.1:6379"
NAMESPACE = "muonlab"
ANSWER_S = 5.0
"""A cluster that does not answer for so long is not reachable."""
SURVEY_S = 120.0
FIND_S = 60.0
"""A slot of an earlier driver that gives no answer for so long is ended: what it trains would be trained twice."""
LOOK_S = 1.0
JOINED_EVERY_S = 3.0
PATIENCE_S = 15.0
"""A slot without its GPUs for so long waits for other jobs of the cluster, perhaps for ever: others are asked for."""
SAY_WAITING_S = 60.0
NOBODY_LEFT_S = 120.0
"""With no node left for so long, the run ends; what was trained is kept."""
MOST_FAILED_STARTS = 3
"""Slots that could not start on a node; then it takes no part."""
OUT_OF_MEMORY = "out of memory: Ray ended it, since its node ran low"
PART_BYTES = 16 * 2**20
STOP_S = 15.0


class Node(NamedTuple):
    """A node that can hold a cell."""

    id: str
    gpus: int
    name: str
    """What a person is shown: the host, and where several nodes have that name, the beginning of their identity."""


class Cluster:
    """A connected cluster. Close it: it holds GPUs."""

    slot_class = cluster_node.Slot

    def __init__(self, layout: Layout, study: Study, kinds: list[str], address: str, gpus_per_cell: int,
                 say: Callable[[str], None]) -> None:  # fmt: skip
        """Connect, and look at every node. Raises UsageError for what cannot work: an address where no cluster
        answers, one without a token, other versions or code, more GPUs a cell than a node has, a dirty tree."""
        self.layout, self.study, self.kinds, self.devices, self.say = layout, study, kinds, gpus_per_cell, say
        self.address = address
        if (dirt := dirty_text(difference(layout.root))) is not None:
            raise UsageError(
                f"--on ray: {dirt.partition(';')[0]}; nodes train the commit that is checked out: commit first."
            )
        self._held = contextlib.ExitStack()
        # Ray tells of a dead node in twenty lines on standard output, which is for the answer; `say` tells it in one.
        self._held.enter_context(contextlib.redirect_stdout(io.StringIO()))
        try:
            self.ray = _connect(address)
        except BaseException:
            self._held.close()
            raise
        self.owner = f"{hashlib.sha256(f'{socket.gethostname()}{layout.main}'.encode()).hexdigest()[:12]}.{study.slug}."
        self.nodes: dict[str, Node] = {}
        self.refused: set[str] = set()
        self.failed_starts: Counter[str] = Counter()
        self.taken: Counter[str] = Counter()
        """Digest -> the highest number of an attempt that some node has seen."""
        self.slots: list[Slot] = []
        self._at_work: dict[str, tuple[Slot, Job]] = {}
        """Digest -> what an earlier driver has left at work, and nobody has taken up."""
        self._gathered = False
        self._looked = self._nobody_since = 0.0
        try:
            # Once: a node that joins later must be as this checkout was when the run began.
            self._here = cluster_node.facts_of(layout, kinds)
            self._refuse_too_many_gpus()
            self._survey(self._unknown(), [], refuse=True)
        except BaseException:
            self.close()
            raise

    # What runs where

    def gather(self, cells: Iterable[Cell]) -> None:
        """Take over what earlier attempts at these cells have left, here and on the nodes, unless they still run.

        The first time, raises UsageError where a node has not the data of this machine; once cells are trained, such a
        node takes no further part.
        """
        names = {cell.digest: cell.key for cell in cells}
        self._find_slots(names)
        found = self._survey(list(self.nodes.values()), list(names), refuse=not self._gathered)
        self._gathered = True
        for node_id, fences in found.items():
            for digest, listed_fences in fences.items():
                for number, text, ended in listed_fences:
                    self.taken[digest] = max(self.taken[digest], number)
                    if ended and text is not None and digest not in self._at_work:
                        self._bring_home(node_id, digest, number, text)
        for digest, name in names.items():
            if digest in self._at_work:
                continue
            for fence in fences_of(self.layout, digest):
                with CellScratch(self.layout, digest).locked(name):
                    self._settle(fence, name)

    def _settle(self, fence: Fence, name: str) -> None:
        record = promote(self.layout, fence)
        if record is not None:
            self.say(f"muon: {name}: attempt {fence.number}, {record.status} on the cluster, is taken over.")
        elif record_lost(self.layout, fence, "its node or its process was lost while no driver ran") is not None:
            self.say(f"muon: {name}: attempt {fence.number} on the cluster ended without a word.")

    def _bring_home(self, node_id: str, digest: str, number: int, text: str) -> None:
        fence = Fence(self.layout, digest, number)
        if fence.job() not in (None, text):  # of another driver
            return
        if fence.record() is None:
            fence.folder.mkdir(parents=True, exist_ok=True)
            (fence.folder / "job.json").write_text(text, encoding="utf-8")
            try:
                self.fetch(node_id, fence)
            except self.ray.exceptions.RayError as error:
                self.say(
                    f"muon: cell {digest[:12]}: attempt {number} has ended on the cluster, and could not be fetched "
                    f"({_first_line(error)}); the next run asks for it again."
                )

    def fetch(self, node_id: str, fence: Fence) -> None:
        """Copy an attempt's files from the node to the same place here, whole or not at all."""
        on_node = functools.partial(self._on_node, node_id)
        arriving = fence.folder / "arriving"
        shutil.rmtree(arriving, ignore_errors=True)
        for name, size in on_node(cluster_node.list_files, fence.digest, fence.number):
            target = arriving / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                for offset in range(0, size, PART_BYTES):
                    file.write(on_node(cluster_node.read_file, fence.digest, fence.number, name, offset, PART_BYTES))
        if (arriving / "scratch").exists():
            os.replace(arriving / "scratch", fence.layout.scratch)
        on_node(cluster_node.drop, fence.digest, fence.number)

    def _on_node(self, node_id: str, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.ray.get(self._task(node_id, function).remote(*arguments), timeout=SURVEY_S)

    def _task(self, node_id: str, function: Callable[..., Any]) -> Any:
        return self.ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=_pinned(node_id))

    def _find_slots(self, names: dict[str, str]) -> None:
        """Slots of an earlier driver of this study: those at one of these cells are kept, the others end."""
        known = {slot.name for slot in self.slots}
        named = [name for name in self.ray.util.list_named_actors(all_namespaces=False)
                 if name.startswith(self.owner) and name not in known]  # fmt: skip
        self._at_work.clear()
        for name, (actor, at_work) in self._ask_slots(named).items():
            node = self.nodes.get(name.removeprefix(self.owner).partition(".")[0])
            if at_work is not None and node is not None:
                text, number = at_work
                content = json.loads(text)
                job = Job(Cell.model_validate(content["cell"]), Purpose(**content["purpose"]))
                fence = Fence(self.layout, job.cell.digest, number)
                if job.cell.digest in names and fence.job() == text:
                    self._at_work[job.cell.digest] = Slot(self, node, name, actor, fence), job
                    continue
            self.ray.kill(actor)

    def _ask_slots(self, names: list[str]) -> dict[str, tuple[Any, tuple[str, int] | None]]:
        """Name of a slot that lives -> its actor, and what it is at; nothing where it has not said so for long."""
        errors = self.ray.exceptions
        found: dict[str, tuple[Any, tuple[str, int] | None]] = {}
        silent: dict[str, Any] = {}
        deadline = time.monotonic() + FIND_S
        while names:
            asked = {}
            for name in names:
                with contextlib.suppress(ValueError):  # it is dead
                    silent[name] = self.ray.get_actor(name)
                    asked[name] = silent[name].at_work.remote()
            if asked:
                self.ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_S)
            names = []
            for name, answer in asked.items():
                try:
                    found[name] = silent[name], self.ray.get(answer, timeout=LOOK_S)
                except errors.ActorDiedError:
                    pass
                except errors.RayError:  # busy, or cut off: it may train
                    names.append(name)
            if names and time.monotonic() > deadline:
                self.say(
                    f"muon: {count(len(names), 'slot')} of an earlier run gave no answer for {FIND_S:.0f} s: ended; "
                    "what one of them trained is tried again."
                )
                return found | {name: (silent[name], None) for name in names}
            if names:
                time.sleep(LOOK_S)
        return found

    def found(self, jobs: Sequence[Job]) -> Sequence[Worker]:
        """Slots that an earlier driver left at one of these jobs."""
        found = []
        for job in jobs:
            if job.cell.digest in self._at_work:
                slot, _ = self._at_work.pop(job.cell.digest)
                slot.take_up(job)
                self.say(f"muon: {job.name} is being trained on {slot.node} already, by attempt {slot.number}.")
                self.slots.append(slot)
                found.append(slot)
        return found

    def recruit(self, crew: Sequence[Worker], jobs: int) -> Sequence[Worker]:
        """Slots that have got their GPUs since; those of nodes that have joined are asked for."""
        now = time.monotonic()
        if now - self._looked >= JOINED_EVERY_S:
            self._looked = now
            self._survey(self._unknown(), [], refuse=False)
            self._refuse_to_wait(now)
        for slot in self.slots:
            if slot.failure is not None:
                self._note_failed_start(slot, slot.failure)
        self.slots = [slot for slot in self.slots if not slot.gone]
        ready = [slot for slot in self.slots if slot.is_ready()]
        at_hand = [slot for slot in ready if slot in crew]
        added = [slot for slot in ready if slot not in crew][: max(0, jobs - len(at_hand))]
        if len(at_hand) + len(added) < jobs:
            self._ask_for_slots(jobs, now)
            return added
        for slot in self.slots:
            if slot not in at_hand and slot not in added and slot.failure is None:  # nobody needs it any more
                slot.stop()
        self.slots = [slot for slot in self.slots if not slot.gone or slot.failure is not None]
        return added

    def _ask_for_slots(self, jobs: int, now: float) -> None:
        """Ask for the slots that lack: of one node after the other, and where some wait for long, of every node."""
        counting = [slot for slot in self.slots if slot.greeting is None or now - slot.asked_at < PATIENCE_S]
        lacking = jobs - len(counting)
        late = len(counting) < len(self.slots)
        held = Counter(slot.at.id for slot in self.slots)
        for node in self.nodes.values():
            asked = max(0, min(node.gpus // self.devices - held[node.id], lacking))
            self.slots += [self._new_slot(node) for _ in range(asked)]
            if not late:
                lacking -= asked

    def _note_failed_start(self, slot: Slot, why: str) -> None:
        if slot.at.id not in {node.id for node in self._alive()}:  # it died between two looks
            self.nodes.pop(slot.at.id, None)
            return
        self.failed_starts[slot.at.id] += 1
        if self.failed_starts[slot.at.id] == MOST_FAILED_STARTS:
            self.refused.add(slot.at.id)
            self.nodes.pop(slot.at.id, None)
            self.say(f"muon: node {slot.node}: {MOST_FAILED_STARTS} slots could not start there ({why}); it takes no "
                     "part.")  # fmt: skip

    def _new_slot(self, node: Node) -> Slot:
        named = f"{self.owner}{node.id}.{uuid.uuid4().hex[:8]}"
        made = self.ray.remote(self.slot_class).options(
            name=named,
            lifetime="detached",
            num_gpus=self.devices,
            num_cpus=0,
            max_restarts=0,
            scheduling_strategy=_pinned(node.id),
        )
        return Slot(self, node, named, made.remote(self.devices))

    def wait(self, crew: Sequence[Worker]) -> None:
        """Until a slot has news, a second at most."""
        news = [slot.news for slot in crew if isinstance(slot, Slot) and slot.news is not None]
        news += [slot.greeting for slot in self.slots if slot.greeting is not None]
        if news:
            self.ray.wait(news, timeout=LOOK_S)
        else:
            time.sleep(LOOK_S)

    def stop_left(self) -> None:
        """End what an earlier driver has left at work and this one has not taken up, and keep its records."""
        for slot, job in self._at_work.values():
            with contextlib.suppress(UsageError):  # another process has the cell; the slot ends all the same
                slot.take_up(job)
            slot.stop()
            self.say(f"muon: {job.name}, left at work on {slot.node} by an earlier run, is stopped.")
        self._at_work.clear()

    def close(self) -> None:
        """Give the GPUs of this run back, say what else an earlier run has left at work, and disconnect."""
        for slot in self.slots:
            slot.stop()
        for slot, job in self._at_work.values():
            self.say(
                f"muon: {job.name} is still at work on {slot.node}, where an earlier run left it; nobody watches its "
                "cost: `muon study run` of all cells follows it."
            )
        self.ray.shutdown()
        self._held.close()

    # Who may take part

    def _alive(self) -> list[Node]:
        seen = [node for node in self.ray.nodes() if node["Alive"]]
        hosts = Counter(node["NodeManagerHostname"] for node in seen)

        def name(node: dict[str, Any]) -> str:
            host = str(node["NodeManagerHostname"])
            return host if hosts[host] == 1 else f"{host}/{node['NodeID'][:4]}"

        return [Node(node["NodeID"], int(node["Resources"].get("GPU", 0)), name(node)) for node in seen]

    def _refuse_too_many_gpus(self) -> None:
        most = max((node.gpus for node in self._alive()), default=0)
        if most < self.devices:
            raise UsageError(
                f"--gpus-per-cell: {count(self.devices, 'GPU')} a cell, and no node of the cluster at "
                f"{self.address} has more than {most}; no cell could ever begin: ask for fewer, or start Ray on a node "
                "that has as many."
            )

    def _unknown(self) -> list[Node]:
        """Nodes that can hold a cell and were not looked at; those that have gone are forgotten."""
        alive = {node.id: node for node in self._alive() if node.gpus >= self.devices}
        self.nodes = {key: node for key, node in self.nodes.items() if key in alive}
        return [node for key, node in alive.items() if key not in self.nodes and key not in self.refused]

    def _survey(self, nodes: list[Node], digests: list[str], *, refuse: bool) -> dict[str, dict[str, Any]]:
        """Ask nodes what they would train with, and let them take part if that is what this machine would.

        Returns the fences of these cells by node. One that differs is refused: the run is, or only the node.
        """
        # Before the first run the driver may still have to prepare the data.
        workloads = [self.study.workload] if digests or self._gathered else []
        asked = {node.id: self._task(node.id, cluster_node.survey).remote(self.kinds, workloads, digests)
                 for node in nodes}  # fmt: skip
        here = {**self._here, "data": cluster_node.data_of(self.layout, workloads)}
        found = {}
        for node in nodes:
            try:
                there = self.ray.get(asked[node.id], timeout=SURVEY_S)
                differs = there.get("error") or _difference(here, there)
            except (self.ray.exceptions.NodeDiedError, self.ray.exceptions.TaskUnschedulableError):
                continue  # gone, though Ray may list it for some seconds more
            except self.ray.exceptions.RayError as error:
                there, differs = {}, f"this project does not run there: {_first_line(error)}"
            if differs is None:
                self.nodes[node.id] = node
                found[node.id] = there["fences"]
                continue
            sentence = f"node {node.name} of {self.address}: {differs}"
            if refuse:
                raise UsageError(sentence)
            self.refused.add(node.id)
            self.nodes.pop(node.id, None)
            self.say(f"muon: {sentence} It takes no part.")
        return found

    def _refuse_to_wait(self, now: float) -> None:
        if self.nodes:
            self._nobody_since = 0.0
            for slot in self.slots:
                if slot.greeting is not None and not slot.told and now - slot.asked_at > SAY_WAITING_S:
                    slot.told = True
                    self.say(f"muon: a slot on {slot.node} waits for {count(self.devices, 'GPU')} that other "
                             "jobs of the cluster hold.")  # fmt: skip
        elif not self._nobody_since:
            self._nobody_since = now
            self.say("muon: no node of the cluster is left that can hold a cell; waiting for one to join.")
        elif now - self._nobody_since > NOBODY_LEFT_S:
            raise CellsFailedError(
                f"no node of the cluster at {self.address} has been there for {NOBODY_LEFT_S:.0f} s; what was trained "
                "is kept: start Ray on a node, and run the study again."
            )


class Slot:
    """The driver's side of a `cluster_node.Slot`: a worker of the pool."""

    def __init__(self, cluster: Cluster, at: Node, name: str, actor: Any, fence: Fence | None = None) -> None:
        self.cluster, self.at, self.name, self.actor = cluster, at, name, actor
        self.node = at.name
        self.job: Job | None = None
        self.gone = self.told = self._asked_to_stop = False
        self.failure: str | None = None
        """Why it could not start."""
        self.asked_at = time.monotonic()
        self.greeting = actor.ready.remote() if fence is None else None
        self.news: Any = None
        self._began: Any = None
        self._fence = fence
        self._held = contextlib.ExitStack()
        self._seen: Seen | None = None
        self._refusal: str | None = None

    @property
    def fence(self) -> Fence:
        """Behind which the attempt is made."""
        assert self._fence is not None
        return self._fence

    @property
    def number(self) -> int:
        """Of the attempt."""
        return self.fence.number

    def is_ready(self) -> bool:
        """Whether it has its GPUs."""
        if self.greeting is not None and self.cluster.ray.wait([self.greeting], timeout=0)[0]:
            try:
                self.cluster.ray.get(self.greeting)
            except self.cluster.ray.exceptions.RayError as error:
                self.gone, self.failure = True, _first_line(error)
            self.greeting = None
        return self.greeting is None and not self.gone

    def give(self, job: Job) -> None:
        """Reserve a fence, and let the slot begin behind it."""
        self.job = job
        digest, layout = job.cell.digest, self.cluster.layout
        try:
            self._held.enter_context(CellScratch(layout, digest).locked(job.name))
        except UsageError as error:
            self._refusal = str(error)
            return
        content = {"cell": job.cell.model_dump(mode="json"), "purpose": vars(job.purpose)}
        self._fence = reserve(layout, digest, content, above=self.cluster.taken[digest])
        self._began = self.actor.begin.remote(digest, self._fence.number, self._fence.job())
        self.news = self.actor.look.remote(LOOK_S)

    def take_up(self, job: Job) -> None:
        """Hear of a job that the slot was given by an earlier driver."""
        self._held.enter_context(CellScratch(self.cluster.layout, job.cell.digest).locked(job.name))
        self.job = job
        self.news = self.actor.look.remote(LOOK_S)

    def progress(self) -> AttemptProgress | None:
        """As last heard."""
        return self._seen.progress if self._seen is not None else None

    def unrecorded_seconds(self) -> float:
        """As last heard; what has ended is taken home in the same breath."""
        return self._seen.seconds if self._seen is not None else 0.0

    def poll(self) -> dict[str, Any] | None:
        """How the job ended, its result promoted, once it has."""
        ray = self.cluster.ray
        if self._refusal is not None:
            return self._ended({"status": "failed", "error": self._refusal})
        if not ray.wait([self.news], timeout=0)[0]:
            return None
        try:
            self._tell_beginning()
            heard = ray.get(self.news)
        except ray.exceptions.ActorUnavailableError:  # cut off, dead perhaps: Ray decides
            time.sleep(0.2)
            self.news = self.actor.look.remote(LOOK_S)
            return None
        except ray.exceptions.RayActorError as error:
            return self._ended(self._lost(_why(error)))
        except ray.exceptions.RayError as error:
            return self._ended({"status": "failed", "error": f"on {self.node}: {_first_line(error)}"})
        if heard["seen"] is not None and heard["seen"] != self._seen:
            self._seen = heard["seen"]
            self.fence.note(self._seen, self.node)
        if heard["ending"] is None:
            self.news = self.actor.look.remote(LOOK_S)
            return None
        return self._ended(self._take_home(heard["ending"]))

    def _tell_beginning(self) -> None:
        """Say what a further attempt goes on from."""
        if self._began is None or not self.cluster.ray.wait([self._began], timeout=0)[0]:
            return
        step, shared = self.cluster.ray.get(self._began)
        self._began = None
        if self.number == 1 or self.job is None:
            return
        if step > 0:
            how = f"goes on from step {step}"
        elif shared:
            how = "begins at step 0, since the earlier ones left no checkpoint"
        else:
            how = "begins at step 0: the checkpoints of earlier attempts do not lie on storage that this node shares"
        self.cluster.say(f"muon: {self.job.name}: attempt {self.number}, on {self.node}, {how}.")

    def _take_home(self, ending: dict[str, Any]) -> dict[str, Any]:
        """Fetch and promote what an ended attempt has left; how it ended is what its record says."""
        fence, seconds = self.fence, self._seen.seconds if self._seen is not None else 0.0
        try:
            if not fence.attempt.exists():
                self.cluster.fetch(self.at.id, fence)
            record = promote(self.cluster.layout, fence)
        except self.cluster.ray.exceptions.RayError as error:
            return self._lost(_first_line(error))
        except MuonlabError as error:
            return {"status": "failed", "error": str(error), "seconds": seconds}
        if record is not None and (record.is_result or record.status == "failed"):
            whole = not record.is_result or CellScratch(self.cluster.layout, fence.digest).finished() is not None
            told = record.status if whole else "died"
            return {"status": told, "error": ending.get("error", record.error), "seconds": record.wall_seconds}
        if record is not None:  # stopped, or its process was asked to end
            return {"status": "died", "seconds": record.wall_seconds}
        if ending["status"] == "failed":  # before it began
            shutil.rmtree(fence.folder, ignore_errors=True)
            return {**ending, "seconds": 0.0}
        return self._lost("its process was killed")

    def _lost(self, why: str) -> dict[str, Any]:
        assert self.job is not None
        fence = self.fence
        if fence.record() is not None:  # it had ended, and lies on shared storage
            return self._take_home({"status": "died"})
        terminal = why == OUT_OF_MEMORY
        record_lost(
            self.cluster.layout, fence, f"lost on {self.node}: {why}", status="failed" if terminal else "abandoned"
        )
        seen = fence.seen()
        self.cluster.say(f"muon: {self.job.name}: attempt {fence.number} on {self.node} was lost ({why}).")
        status = {"status": "failed", "error": f"on {self.node}: {why}"} if terminal else {"status": "died"}
        return {**status, "seconds": 0.0 if seen is None else seen.seconds}

    def _ended(self, ending: dict[str, Any]) -> dict[str, Any]:
        self._held.close()
        self.news = self._began = self._seen = self._refusal = None
        return ending

    def ask_to_stop(self) -> None:
        """Tell the attempt to end."""
        if self.job is not None and self.news is not None and not self._asked_to_stop:
            self._asked_to_stop = True
            self.actor.stop.remote()

    def stop(self) -> None:
        """End the attempt, keep its record, and give the GPUs back."""
        if self.gone:
            return
        self.ask_to_stop()
        self.gone = True
        ray = self.cluster.ray
        if self.job is not None and self.news is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                last = ray.get(self.actor.look.remote(0.0), timeout=STOP_S)
                self._seen = last["seen"] or self._seen
                if self._seen is not None:
                    self.fence.note(self._seen, self.node)
                self._take_home(last["ending"])
            self._held.close()
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self.actor)


def _pinned(node_id: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def _connect(address: str) -> Any:
    """The module `ray`, connected."""
    host, separator, port = address.rpartition(":")
    if not (separator and host and port.isdigit()):
        raise UsageError(f"--address: found {address!r}; it should be HOST:PORT, as `ray start --head` prints it.")
    # Whatever the user's environment says: both are read when Ray is loaded.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import grpc
        import ray
    except ImportError:
        raise UsageError(
            "--on ray: Ray is not installed; `pip install -c constraints.txt 'muonlab[cluster]'` installs it."
        ) from None
    _knock(grpc, address)
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR,
                 include_dashboard=False)  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UsageError(f"--address {address}: {_why_not(error)}") from None
    return ray


def _knock(grpc: Any, address: str) -> None:
    """Ask whether the cluster is there, without a token, which it must refuse, and with this machine's.

    Raises UsageError where nobody answers, where the cluster answers anybody, and where it does not answer us.
    """
    with grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")

        def refusal(*metadata: tuple[str, str]) -> Any:
            try:
                ask(b"", timeout=ANSWER_S, metadata=metadata)
            except grpc.RpcError as refused:
                return refused.code()
            return None

        code = refusal()
        if code is None:
            raise UsageError(
                f"--address {address}: the cluster asks for no token, so that whoever reaches it runs code on it; "
                "start every node again with RAY_AUTH_MODE=token (docs/cluster.md)."
            )
        if code != grpc.StatusCode.UNAUTHENTICATED:
            raise UsageError(
                f"--address {address}: no Ray cluster answers there within {ANSWER_S:.0f} s ({code.name.lower()}); "
                "`ray start --head` on the first node prints its address."
            )
        token = _token()
        if token is None or refusal(("authorization", f"Bearer {token}")) is not None:
            what = "asks for a token, and there is none here" if token is None else "refuses this machine's token"
            raise UsageError(
                f"--address {address}: the cluster {what}; put the cluster's into ~/.ray/auth_token or RAY_AUTH_TOKEN."
            )


def _token() -> str | None:
    """The token that Ray would use, found in the order in which Ray looks."""
    if told := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return told
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return (path.read_text(encoding="utf-8").strip() or None) if path.is_file() else None


def _why_not(error: Exception) -> str:
    text = str(error)
    if "Version mismatch" in text:
        metadata = f"Ray {importlib.metadata.version('ray')} and Python {platform.python_version()}"
        told = " ".join(line.strip() for line in text.splitlines() if line.strip().startswith(("Ray:", "Python:")))
        return (
            f"the cluster runs other versions than this machine, {metadata} (cluster first: {told}); install the same "
            "everywhere."
        )
    return f"this machine cannot take part in the cluster ({_first_line(error)}); start Ray here too (docs/cluster.md)."


def _difference(here: dict[str, Any], there: dict[str, Any]) -> str | None:
    """In what a node is not as this machine, in a sentence; None where it is."""
    if there["python"] != here["python"]:
        return f"it runs Python {there['python']}, this machine {here['python']}; install the same everywhere."
    if there["commit"] != here["commit"]:
        return (
            f"its checkout is at commit {str(there['commit'])[:12]}, this run at {str(here['commit'])[:12]}; check out "
            "the same commit there."
        )
    if there["dirty"] is not None:
        return f"{there['dirty'].partition(';')[0]}; check out the commit as it is there."
    if there["environment"] != here["environment"]:
        names = [name for name, value in here["environment"].items() if there["environment"].get(name) != value]
        differing = [f"{name} {there['environment'].get(name)} there, {here['environment'][name]} here"
                     for name in names]  # fmt: skip
        return f"it would train other cells ({listed(differing)}); all nodes and this machine must be of one kind."
    if there["code"] != here["code"]:
        return "its code of the trainer differs from this machine's; check out the same commit there."
    for workload, hashes in here["data"].items():
        if there["data"][workload] != hashes:
            what = "are not prepared there" if there["data"][workload] is None else "are others there"
            return (
                f"the data of {workload} {what}; in its checkout, `dvc pull` or `dvc repro "
                f"data/dvc.yaml:prepare_data@{workload}`."
            )
    return None


def _why(error: Exception) -> str:
    """Why an actor is dead, in a few words; by Ray's own, which name many possible causes of an unexplained death."""
    text = str(error)
    if "running low on memory" in text:
        return OUT_OF_MEMORY
    if "its node has died" in text or "node was terminated" in text:
        return "its node died"
    return "its worker died"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
