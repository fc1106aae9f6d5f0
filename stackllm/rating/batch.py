"""Prompts handed over as files, which a server answers within a day for about half the price.

What costs money is the creation of a batch, and a process may be killed at any moment around it.
So the journal knows the uploaded file before a batch is made of it, and the server is told our name
for the batch: one that was made and not written down is found in the server's list by either. A
batch stays open in the journal until every answer in its results is there as well.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from stackllm.engine.progress import Reporter
from stackllm.errors import ServerError
from stackllm.rating.advice import lasting_refusals, unreachable
from stackllm.rating.endpoint import Endpoint, LostError, RefusedError, is_name, open_endpoint
from stackllm.rating.journal import Batch, Journal
from stackllm.rating.refusal import Refusal, read_reason
from stackllm.rating.replies import judge_all
from stackllm.rating.requests import Job, ServerParams, estimate_tokens
from stackllm.rating.results import Results
from stackllm.rating.rubric import reply_tokens
from stackllm.rating.sending import Session, budget_spent, send
from stackllm.store.digest import digest

MOST_LINES = 50_000
"""In one file, as OpenAI, Groq, Together and others have it."""

MOST_BYTES = 100_000_000
"""In one file: Together's limit and once OpenAI's, which is 200 MB now, as is Groq's."""

_FIRST_WAIT = 2.0
"""Seconds before the second look at a batch; small ones are done soon."""

_SLOWER = 1.5
_TRIALS = 20
"""Prompts that are sent live before files go to an LLM that gave no valid answer to the first."""

_OVER = {"completed", "failed", "expired", "cancelled", "canceled"}


def ask_in_batches(
    url: str, missing: dict[str, Job], server: ServerParams, journal: Journal, reporter: Reporter
) -> dict[str, str]:
    """Wait for batches under way, then hand over what is still missing, the first prompt live.

    Where ``server.batch`` is off, batches that are under way are waited for all the same, for they
    are paid for, and the rest is sent live.

    Parameters
    ----------
    url
        Of the chat completions.
    missing
        By the digest of the request.
    server
        How it may be used.
    journal
        Gets each batch before it is waited for, and each answer before it is used.
    reporter
        Told how far it is.

    Returns
    -------
    dict
        The reason of each request that got no answer.

    Raises
    ------
    BudgetError
        If ``max_requests`` lines have been handed over.
    ServerError
        If the server is out of reach, turns us away, takes no batches or refuses one. Batches that
        are under way stay in the journal.
    """
    with open_endpoint(url, server) as endpoint:
        asking = _Asking(endpoint, url, server, journal, reporter)
        asking.settle(asking.recall(missing))
        for number in range(server.attempts + 1):
            todo = asking.unanswered(missing)
            if not todo:
                break
            if not server.batch:
                return asking.failed | send(url, todo, server, journal, reporter, asking.session)
            if number == server.attempts:
                asking.failed |= dict.fromkeys(todo, "batch expired")
                break
            asking.learn(todo)
            asking.round(asking.unanswered(todo))
        if len(asking.failed.keys() & missing.keys()) == len(missing):
            raise unreachable(url, asking.failed.values(), asking.refusals, server)
        if told := lasting_refusals(asking.refusals, server):
            reporter.warn(told)
        return asking.failed


def describe_work(
    missing: Mapping[str, Job], under_way: Sequence[Batch], server: ServerParams
) -> str:
    """What is to be sent, what it costs, in how many batches, and what is being answered already.

    Parameters
    ----------
    missing
        Requests without an answer.
    under_way
        Batches that hold some of them.
    server
        How the server may be used.
    """
    waited = {key for batch in under_way for key in batch.requests} & missing.keys()
    bodies = {key: body for key, (_, body) in missing.items() if key not in waited}
    tokens = sum(estimate_tokens(body) for body in bodies.values())
    told = f"{len(bodies)} requests and about {tokens:,} tokens to send"
    if server.batch and len(bodies) > 1:
        live = min(bodies, key=lambda key: estimate_tokens(bodies[key]))
        rest = {key: body for key, body in bodies.items() if key != live}
        told += f", the first at once and the others as {_several(sum(1 for _ in cut_files(rest)))}"
    if waited:
        told += f"; {len(waited)} prompts are under way at the server in {_several(len(under_way))}"
    return told


def cut_files(
    bodies: Mapping[str, Mapping[str, Any]],
) -> Iterator[tuple[tuple[str, ...], bytes]]:
    """Files of as many lines as a server takes.

    Parameters
    ----------
    bodies
        What to send, by the digest of the request.

    Yields
    ------
    tuple
        The requests of a file, and its content.
    """
    keys: list[str] = []
    content = bytearray()
    for key, body in bodies.items():
        # what comes as a file is not streamed
        said = {name: value for name, value in body.items() if name != "stream"}
        order = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": said}
        line = json.dumps(order).encode() + b"\n"
        if keys and (len(keys) == MOST_LINES or len(content) + len(line) > MOST_BYTES):
            yield tuple(keys), bytes(content)
            keys, content = [], bytearray()
        keys.append(key)
        content += line
    if keys:
        yield tuple(keys), bytes(content)


@dataclass
class _Asking:
    """One run's way with batches."""

    endpoint: Endpoint
    url: str
    server: ServerParams
    journal: Journal
    reporter: Reporter
    session: Session = field(default_factory=Session)
    failed: dict[str, str] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    lost: list[ServerError] = field(default_factory=list)
    has_valid: bool = False

    def unanswered(self, jobs: dict[str, Job]) -> dict[str, Job]:
        """Those that have neither an answer nor failed."""
        known = self.journal.get(jobs).keys() | self.failed.keys()
        return {key: job for key, job in jobs.items() if key not in known}

    def recall(self, missing: dict[str, Job]) -> list[Batch]:
        """Batches that another process has begun; those that were never made are crossed out."""
        batches = []
        for batch in self.journal.under_way(self.url, missing):
            if not batch.id:
                try:
                    made = self.endpoint.find(batch.file, batch.name)
                except LostError as error:
                    self._give_up(batch, error)
                    continue
                batch = replace(batch, id=made, is_over=not made)
                self.journal.put_batch(batch)
            if batch.id:
                self.reporter.say(
                    f"batch {batch.id} with {len(batch.requests)} prompts is under way"
                )
                batches.append(batch)
        return batches

    def learn(self, todo: dict[str, Job]) -> None:
        """Send a prompt live, the shortest, which tells whether and how the server answers at all.

        Where that is no valid answer, more are tried before thousands are paid for: so many that
        the rule of single prompts for answers that are never valid holds.
        """
        ranked = sorted(todo, key=lambda key: estimate_tokens(todo[key][1]))
        for trial in (ranked[:1], ranked[1 : 1 + _TRIALS]):
            if self.has_valid or not trial:
                return
            jobs = {key: todo[key] for key in trial}
            self.failed |= send(
                self.url, jobs, self.server, self.journal, self.reporter, self.session
            )
            for key, reply in self.journal.get(jobs).items():
                recipe, body = jobs[key]
                judged = judge_all(reply, recipe, body["model"], self.server.any_model)
                self.has_valid |= any(it.status == "ok" for it in judged)

    def round(self, todo: dict[str, Job]) -> None:
        """Hand over what is left to ask, as far as ``max_requests`` goes, and wait for it."""
        if not todo:
            return
        if self.server.max_requests is not None:
            left = max(0, self.server.max_requests - self.session.sent)
            if not left:
                raise budget_spent(self.server)
            todo = dict([*todo.items()][:left])
        batches, refused = self._hand_over(todo)
        refused += self.settle(batches)
        came = self.journal.get(todo)
        if refused and not came:  # else it may take the rest once there is less in its queue
            raise refused[0]

    def _hand_over(self, todo: dict[str, Job]) -> tuple[list[Batch], list[ServerError]]:
        batches: list[Batch] = []
        model = next(iter(todo.values()))[1]["model"]
        keep = max(reply_tokens(recipe) for recipe, _ in todo.values())
        bodies = {key: self.session.dialect.apply(body) for key, (_, body) in todo.items()}
        for keys, content in cut_files(bodies):
            try:
                file = self.endpoint.upload(content)
                batch = Batch(digest(self.url, file, list(keys)), self.url, model, keys, keep, file)
                self.journal.put_batch(batch)
                batch = replace(batch, id=self.endpoint.create(file, batch.name))
            except RefusedError as error:
                return batches, [error]
            except LostError as error:
                self._give_up(batch, error)
                break
            self.journal.put_batch(batch)
            self.session.sent += len(keys)
            batches.append(batch)
            self.reporter.say(
                f"batch {batch.id}: {len(keys)} prompts handed over, which may take 24 hours; if you stop this command, "
                "the same one picks them up"
            )
        return batches, []

    def settle(self, batches: Sequence[Batch]) -> list[ServerError]:
        """Wait for batches and read their results; gives why the server refused some of them.

        One that can't be found stops the run, but not before all others are read.
        """
        refused = self._wait_for(batches) if batches else []
        if self.lost:
            raise self.lost[0]
        return refused

    def _wait_for(self, batches: Sequence[Batch]) -> list[ServerError]:
        waiting, refused = {batch.name: batch for batch in batches}, []
        done = dict.fromkeys(waiting, 0)
        wait, shown = min(_FIRST_WAIT, self.server.poll_seconds), 0
        total = sum(len(batch.requests) for batch in batches)
        with self._telling(waiting), self.reporter.bar("batch", total) as advance:
            while waiting:
                asked = 0.0
                for batch in [*waiting.values()]:
                    try:
                        told = self.endpoint.poll(batch.id)
                        asked = max(asked, told.wait)
                        is_over = str(told.data.get("status")).casefold() in _OVER
                        done[batch.name] = (
                            len(batch.requests) if is_over else _done(told.data, batch)
                        )
                        if is_over:
                            refused += self._collect(batch, told.data)
                    except LostError as error:
                        self._give_up(batch, error)
                        is_over = True
                    if is_over:
                        del waiting[batch.name]
                for _ in range(sum(done.values()) - shown):
                    advance()
                shown = max(shown, sum(done.values()))
                if waiting:
                    time.sleep(max(wait, asked))
                    wait = min(wait * _SLOWER, self.server.poll_seconds)
        return refused

    @contextmanager
    def _telling(self, waiting: Mapping[str, Batch]) -> Iterator[None]:
        """Tell whoever stops the command that batches go on without it."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception):
                prompts = sum(len(batch.requests) for batch in waiting.values())
                self.reporter.warn(
                    f"the server goes on with {_several(len(waiting))} of {prompts} prompts; the same command picks up the "
                    "answers."
                )
            raise

    def _collect(self, batch: Batch, told: Mapping[str, Any]) -> list[ServerError]:
        """Commit the results of a batch that is over, then cross it out."""
        results = Results(batch, self.journal, self.endpoint.secret)
        named = [told.get(name) for name in ("output_file_id", "error_file_id")]
        files = [file for file in named if isinstance(file, str) and is_name(file)]
        status = str(told.get("status")).casefold()
        if (_count(told, "completed") and named[0] not in files) or (
            status == "completed" and not files
        ):
            raise LostError(
                f"{self.endpoint.base} has done batch {batch.id} and names no file of results."
            )
        # room for a line more, and for what stands around a reply
        limits = (
            len(batch.requests) + 1,
            self.server.most_bytes(self.server.max_tokens + batch.keep),
        )
        for file in files:
            self.endpoint.read(file, limits, results.read)
        if status == "completed":
            lost = {*batch.requests} - results.settled
            results.failed |= dict.fromkeys(lost, "missing from the results")
        for problem, count in sorted(results.odd.items()):
            self.reporter.warn(
                f"batch {batch.id}: lines of its results that {problem} are left out ({count})."
            )
        self.failed |= {key: str(reason) for key, reason in results.failed.items()}
        self.refusals += [it for it in results.failed.values() if isinstance(it, Refusal)]
        self.journal.put_batch(replace(batch, is_over=True))
        if status != "failed":
            return []
        return [
            ServerError(
                f"{self.endpoint.base} refused batch {batch.id}: {_why(told, self.endpoint.secret)}. "
                "Answers so far are kept. Change what it names, or set [server] batch = false."
            )
        ]

    def _give_up(self, batch: Batch, error: LostError) -> None:
        """A batch that can't be found is paid for, and may be there under another key: users decide."""
        if self.server.batch:
            self.lost.append(
                ServerError(
                    f"{error} Use the key with which it was made, or set [server] batch = false to ask its "
                    f"{len(batch.requests)} prompts anew."
                )
            )
            return
        self.reporter.warn(f"{error} Its {len(batch.requests)} prompts are asked anew.")
        self.journal.put_batch(replace(batch, is_over=True))


def _several(count: int) -> str:
    return "1 batch" if count == 1 else f"{count} batches"


def _count(told: Mapping[str, Any], name: str) -> int:
    counts = told.get("request_counts")
    count = counts.get(name) if isinstance(counts, dict) else None
    return count if type(count) is int and count > 0 else 0


def _done(told: Mapping[str, Any], batch: Batch) -> int:
    return min(_count(told, "completed") + _count(told, "failed"), len(batch.requests))


def _why(told: Mapping[str, Any], secret: str) -> str:
    """Why a server refused a batch: its first reason, the line, and how many others there are."""
    errors = told.get("errors")
    listed = errors.get("data") if isinstance(errors, dict) else errors
    if not isinstance(listed, list) or not listed:
        said = read_reason(json.dumps(errors).encode(), secret) if errors else ""
        return said or "it gives no reason"
    first = listed[0] if isinstance(listed[0], dict) else {"message": listed[0]}
    line = first.get("line")
    where = f"line {line}: " if type(line) is int else ""
    others = f", and {len(listed) - 1} more" if len(listed) > 1 else ""
    return where + (read_reason(json.dumps(first).encode(), secret) or "no reason") + others
