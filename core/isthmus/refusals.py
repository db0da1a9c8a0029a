"""What a request may ask of any model and a device may not declare: refused before it runs, and said at start-up."""

from __future__ import annotations

from isthmus.contract import Capabilities
from isthmus.errors import InvalidRequest
from isthmus.sampling_params import RowSampling


def refusals(capabilities: Capabilities) -> list[str]:
    """One line for each kind of request that will be refused."""
    notes = []
    if not capabilities.logprobs:
        notes.append("log-probabilities are refused: the backend does not declare them")
    if not capabilities.prompt_logprobs:
        notes.append("log-probabilities of prompts are refused: the backend does not declare them")
    return notes


def check_declared(sampling: RowSampling, capabilities: Capabilities) -> None:
    """Raises :class:`InvalidRequest`, naming the parameter, for what is not declared."""
    for name, asked, declared, what in (
        ("logprobs", sampling.num_logprobs, capabilities.logprobs, "log-probabilities"),
        ("prompt_logprobs", sampling.num_prompt_logprobs, capabilities.prompt_logprobs, "log-probabilities of prompts"),
    ):
        if asked >= 0 and not declared:
            raise InvalidRequest(f"{name} is {asked}, and this device does not give {what}; leave it out", param=name)
