"""The process in which vLLM draws: run by `engine.py` with an interpreter that has vLLM, which may have nothing else.

    python child.py REPLIES      (a file descriptor; standard output is vLLM's own)

It reads JSON lines: what to load, then an order at a time. It answers with JSON lines: that it is ready, then a line
for every problem, as soon as the last of its responses has ended. It ends when standard input does, in the midst of a
draw too: whoever orders is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, TextIO


def send(replies: TextIO, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def ordered() -> Iterator[str]:
    """The lines of standard input; with its end this process ends, and those that it has started."""
    lines: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        with open(0, closefd=False) as orders:  # not sys.stdin, whose lock a process forked meanwhile would find held
            for line in orders:
                lines.put(line)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=read, daemon=True).start()
    return iter(lines.get, None)


def serve(orders: Iterator[str], replies: TextIO) -> None:
    """Load the model that the first line names, then draw what each further line orders."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform
    from vllm.sampling_params import RequestOutputKind

    settings = json.loads(next(orders))
    options = settings["model"]
    if current_platform.is_cpu():
        options["enforce_eager"] = True  # torch.compile takes minutes there
        # A prompt that is read in parts draws a token after each, and takes it back by turning its generator back.
        # A CPU generator cannot do that (vLLM 0.32 ends with "CPU Generator does not use offset").
        options["enable_chunked_prefill"] = False
    engine = LLM(**options).llm_engine
    adapter = settings["adapter"] and LoRARequest("policy", 1, settings["adapter"])
    send(replies, {"ready": True})
    for line in orders:
        order = json.loads(line)
        requests = zip(order["prompts"], order["seeds"], order["max_new_tokens"])  # noqa: B905 - for any Python
        for number, (prompt, seed, max_tokens) in enumerate(requests):
            parameters = SamplingParams(
                n=order["n"],
                temperature=order["temperature"],
                seed=seed,
                max_tokens=max_tokens,
                stop_token_ids=order["stops"],
                ignore_eos=True,  # the order's stops are all there are
                logprobs=0,  # of the drawn token alone
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(str(number), {"prompt_token_ids": prompt}, parameters, lora_request=adapter)
        while engine.has_unfinished_requests():
            for drawn in engine.step():
                if drawn.finished:
                    samples = [[list(out.token_ids), out.cumulative_logprob] for out in drawn.outputs]
                    send(replies, {"order": order["order"], "number": int(drawn.request_id), "samples": samples})


if __name__ == "__main__":
    with os.fdopen(int(sys.argv[1]), "w") as channel:
        serve(ordered(), channel)
