"""Sample with a server that is running already, `sampling.engine=server sampling.url=http://node1:8000`.

Any that speaks OpenAI's completions protocol, takes a prompt as token ids and returns the ids it drew, as `vllm serve`
does (`return_token_ids`). It spreads requests over its GPUs itself; how to start one: site/pages/clusters.md.

The `model` of a request is the base's name, `model.path`, or that of M_t's adapter there, `served_name`: a hash of its
files, so that an adapter which was trained anew is another one. A server that has none of that name is asked to load it
from its folder. The random numbers are the server's own (`remote.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

from ..files import ConfigError, file_hash
from ..methods.sampler import Sampler, opened_when_asked
from ..settings import Settings
from ..tasks.base import Problem, Task
from .remote import Answer, Orders, Remote, Request

PATIENCE = 1800.0  # seconds for one answer, which may wait for others'
AT_ONCE = 256  # requests that are open, at most
# What a model's own generation configuration could change, where a server reads it.
PLAIN = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


class ServerError(RuntimeError):
    """The server is not there, has another model or answers in another form; the message says what to change."""


def served_name(policy: Path) -> str:
    """The name under which a server knows the adapter in `policy`."""
    return f"irpo-{file_hash(policy)[:12]}"


class Server(Remote):
    """A server that holds M_t.

    Args:
        policy: the folder of M_t's adapter, None for the base.

    Raises:
        ServerError: there is none, or it has not M_t and does not load it.
    """

    def __init__(self, config: Settings, policy: Path | None):
        self.url = config.sampling.url.rstrip("/").removesuffix("/v1")
        self.max_rows = config.sampling.max_rows
        self.base, self.adapter = config.model.path, served_name(policy) if policy else None
        self.model = self.adapter or self.base
        served = self.models()
        if self.base not in served:
            raise ServerError(
                f"sampling.url: {self.url} serves {', '.join(served) or 'no model'} and not {self.base}; "
                f"serve it by that name (vllm serve ... --served-model-name {self.base}), or set model.path"
            )
        if policy and self.adapter not in served:
            self._load(policy)

    def models(self) -> list[str]:
        """The names that it serves."""
        try:
            return [str(card["id"]) for card in self._ask("/v1/models")["data"]]
        except (KeyError, TypeError):
            raise ServerError(
                f"sampling.url: {self.url}/v1/models lists no models; is it a completions server?"
            ) from None

    def _load(self, policy: Path) -> None:
        try:
            self._ask("/v1/load_lora_adapter", {"lora_name": self.adapter, "lora_path": str(policy.absolute())})
        except ServerError as error:
            raise ServerError(
                f"{error}\nthe adapter of M_t is not there: load {policy.absolute()} by the name {self.adapter}, "
                "or start the server so that it may be asked to "
                "(VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve --enable-lora)"
            ) from None

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What the server answers, read as JSON where it is that. A `body` is posted."""
        data = None if body is None else json.dumps(body).encode()
        try:
            asked = HttpRequest(self.url + path, data, {"Content-Type": "application/json"})
            with urlopen(asked, timeout=PATIENCE) as answer:
                text = answer.read().decode()
        except HTTPError as error:
            said = " ".join(error.read().decode(errors="replace").split())[:500]
            raise ServerError(f"{self.url}{path} answers {error.code}: {said}") from None
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise ServerError(f"sampling.url: no server answers at {self.url} ({reason}); is it running?") from None
        try:
            return json.loads(text)
        except ValueError:
            return text

    def answers(self, requests: list[Request], orders: Orders) -> Iterator[Answer]:
        """As many requests are open as have `sampling.max_rows` responses. Raises ServerError."""
        pool = ThreadPoolExecutor(min(AT_ONCE, max(1, self.max_rows // orders.n)))
        try:
            waiting = {pool.submit(self._answer, request, orders): i for i, request in enumerate(requests)}
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, request: Request, orders: Orders) -> list[tuple[list[int], float]]:
        """The n responses to one request, (token ids, log-probability) each."""
        body = {
            "model": self.model,
            "prompt": request.prompt,
            "n": orders.n,
            "seed": request.seed,
            "temperature": orders.temperature,
            "max_tokens": request.max_new_tokens,
            "stop_token_ids": orders.stops,
            "ignore_eos": True,  # the stops are all there are
            "logprobs": 0,  # of the drawn token alone
            "return_token_ids": True,
            "no_stop_trim": True,  # SGLang's: the token that ends a response stays
            **PLAIN,
        }
        if self.adapter:
            body["lora_path"] = self.adapter  # SGLang's; vLLM goes by the model's name
        reply = self._ask("/v1/completions", body)
        try:
            if reply["model"] != self.model:
                raise ServerError(f"{self.url} was asked for {self.model} and answers as {reply['model']}")
            choices = sorted(reply["choices"], key=lambda choice: choice["index"])
            drawn = [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]
            sent = {tuple(choice.get("prompt_token_ids") or request.prompt) for choice in choices}
            found = [([int(i) for i in ids], float(sum(logps))) for ids, logps in drawn]
        except (KeyError, TypeError):
            raise ServerError(
                f"{self.url} returns no token ids with their log-probabilities, "
                "which training needs as they were drawn; it must know return_token_ids, as vllm serve does"
            ) from None
        if sent != {tuple(request.prompt)} or len(found) != orders.n:
            raise ServerError(
                f"{self.url} changes prompts, or draws {len(found)} responses where {orders.n} are asked for"
            )
        for ids, _ in found:
            if not ids or (ids[-1] not in orders.stops and len(ids) != request.max_new_tokens):
                raise ServerError(
                    f"{self.url} cuts responses: one has {len(ids)} of {request.max_new_tokens} tokens and no end; "
                    "see the server's --max-model-len, and its limit of new tokens "
                    "(vllm serve --generation-config vllm)"
                )
        return found


def check(config: Settings, jobs: int = 1) -> None:
    """Look before a run whether the server is there and has the base. Raises ConfigError, which says what to change."""
    try:
        Server(config, None)
    except ServerError as error:
        raise ConfigError(str(error)) from None


@contextmanager
def opened(config: Settings, policy: Path | None, task: Task, problems: list[Problem]) -> Iterator[Sampler]:
    """A sampler of M_t (None: the base) on the server, which is first asked by the first draw."""
    yield opened_when_asked(config, task, lambda: Server(config, policy).sample)
