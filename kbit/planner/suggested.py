"""Small models of the hub that are worth a try, by name: what `kbit pull --list` shows beside kbit's own catalogue.

Shapes are those of `kbit.planner.shapes`. Where the hub can be asked, what it says of sizes, licences and access
counts; this table was written where it could not be.
"""

from __future__ import annotations

from dataclasses import dataclass

from kbit.checkpoint.hub import HubFacts, hub_facts
from kbit.host.errors import KbitError
from kbit.planner.shapes import KNOWN_MODELS

# Repository, the shape's name, licence, and "gated" where its terms must be accepted on its page first.
_SUGGESTED = """
HuggingFaceTB/SmolLM2-360M-Instruct smollm2-360m   apache-2.0
baidu/ERNIE-4.5-0.3B-PT             ernie-4.5-0.3b apache-2.0
Qwen/Qwen2.5-0.5B-Instruct          qwen2.5-0.5b   apache-2.0
Qwen/Qwen3-0.6B                     qwen3-0.6b     apache-2.0
google/gemma-3-1b-it                gemma-3-1b     gemma      gated
meta-llama/Llama-3.2-1B-Instruct    llama-3.2-1b   llama3.2   gated
allenai/OLMo-2-0425-1B-Instruct     olmo-2-1b      apache-2.0
HuggingFaceTB/SmolLM2-1.7B-Instruct smollm2-1.7b   apache-2.0
Qwen/Qwen3-1.7B                     qwen3-1.7b     apache-2.0
ibm-granite/granite-3.3-2b-instruct granite-3.3-2b apache-2.0
HuggingFaceTB/SmolLM3-3B            smollm3-3b     apache-2.0
microsoft/Phi-4-mini-instruct       phi-4-mini     mit
Qwen/Qwen3-4B                       qwen3-4b       apache-2.0
"""


@dataclass(frozen=True)
class Suggestion:
    """A model to try.

    Attributes:
        repository: its name, for every command.
        parameters: all weights, a tied head once.
        nbytes: of its weight files; as the shape adds up in 16 bits where the hub was not asked.
        licence: its short name on the hub.
        gated: its terms must be accepted on its page first.
    """

    repository: str
    parameters: int
    nbytes: int
    licence: str
    gated: bool


def suggestions() -> tuple[list[Suggestion], str | None]:
    """The models, smallest first, and why the hub could not be asked; None: it was."""
    lines = [line.split() for line in _SUGGESTED.strip().splitlines()]
    facts: dict[str, HubFacts] = {}
    reason = None
    try:
        facts = hub_facts([line[0] for line in lines])
    except KbitError as error:
        reason = str(error)
    found = []
    for repository, name, licence, *gated in lines:
        shape, told = KNOWN_MODELS[name], facts.get(repository)
        found.append(
            Suggestion(
                repository,
                shape.parameters,
                2 * shape.parameters if told is None else told.nbytes,
                licence if told is None or told.licence is None else told.licence,
                bool(gated) if told is None else told.gated,
            )
        )
    return sorted(found, key=lambda each: each.parameters), reason
