"""The commands inside a conversation: /reset, /bits, /model, /system, /save, /help."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kbit.cli.generation import GenerationFlags, Ready
from kbit.engine.conversation import Conversation
from kbit.host.errors import KbitError, UsageError

HELP = """\
Type a message and press Enter; end a line with \\ to go on in the next, or put several between \"\"\" and \"\"\".
  /reset        forget the conversation (the system message stays)
  /system TEXT  give the model a system message from here on; alone: show it; /system off: none
  /model MODEL  go on with another model; alone: say which it is
  /bits K       go on at another number of bits of a nested model; alone: say which there are
  /save FILE    write the conversation into FILE, as JSON messages
  /help         this text
  /exit         leave; so does Ctrl-D
Anything else is a message, also where it begins with a slash.
Ctrl-C stops an answer; what there is of it stays in the conversation."""


class ChatCommands:
    """Carries out commands.

    Args:
        conversation: which they are about.
        ready: its model.
        flags: what it was started with.
        load: loads another model with such flags; None where none can be, as several processes share this one.
        note: says something to the person.

    Attributes:
        ready: the model that answers now.
    """

    def __init__(
        self,
        conversation: Conversation,
        ready: Ready,
        flags: GenerationFlags,
        load: Callable[[GenerationFlags], Ready] | None,
        note: Callable[[str], None],
    ) -> None:
        self.ready = ready
        self._conversation = conversation
        self._flags = flags
        self._load = load
        self._note = note
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._system,
            "/model": self._model,
            "/save": self._save,
        }

    def run(self, message: str) -> bool:
        """Carries a message out, if it is a command; whether it is one.

        Raises:
            KbitError: it cannot be done; nothing has changed.
        """
        word, _, rest = message.partition(" ")
        rest = rest.strip()
        if message == "/reset":
            self._conversation.reset()
            self._note("conversation forgotten")
        elif message == "/help":
            self._note(HELP)
        elif word == "/bits" and len(rest.split()) <= 1:
            self._bits(rest)
        elif word in self._commands:
            self._commands[word](rest)
        else:
            return False
        return True

    def _bits(self, asked: str) -> None:
        loaded = self.ready.loaded
        if not asked:
            served = ", ".join(str(width) for width in loaded.widths)
            between = ", and all between" if loaded.ladder.order is not None else ""
            now = "every matrix at its widest;" if loaded.bits is None else f"{loaded.bits:g} of"
            self._note(f"{now} {served} bits{between}" if served else f"{loaded.name} has one width")
            return
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", asked, re.ASCII):
            raise UsageError(f"/bits {asked}: write a number of bits, as in /bits 3")
        from kbit.engine.self_speculation import SelfDrafter

        found = loaded.at_width(float(asked))
        if found is loaded:
            self._note(f"{float(asked):g} bits already")
            return
        self.ready = replace(self.ready, loaded=found)
        self._conversation.use(found.decoder)
        if self.ready.speculation is not None and isinstance(self.ready.speculation.drafter, SelfDrafter):
            self.ready.speculation.drafter.follow(found)
        self._note(f"{found.bits:g} bits; what was said before is read again at this width, with the next message")

    def _system(self, text: str) -> None:
        if not text:
            current = self._conversation.system
            self._note("there is no system message" if current is None else current)
            return
        self._conversation.instruct(None if text == "off" else text)
        self._note("no system message from here on" if text == "off" else "system message set; what was said stays")

    def _model(self, name: str) -> None:
        if not name:
            self._note(f"{self.ready.loaded.name} · {self.ready.loaded.backend_description}")
            return
        if self._load is None:
            raise UsageError("/model: several processes share this model: start kbit chat anew for another")
        flags = replace(self._flags, model=name, bits=None)
        ready = self._load(flags)
        loaded = ready.loaded
        self._conversation.hand_over(loaded.decoder, loaded.tokenizer, name, ready.speculation)
        self.ready, self._flags = ready, flags
        self._note(f"{loaded.name} · {loaded.backend_description}; it reads what was said with the next message")

    def _save(self, name: str) -> None:
        if not name:
            raise UsageError("/save: name a file, as in /save talk.json")
        file = Path(os.path.expanduser(name))
        content = {"model": self.ready.loaded.name, "messages": self._conversation.messages}
        try:
            with file.open("x", encoding="utf-8") as out:
                json.dump(content, out, ensure_ascii=False, indent=1)
                out.write("\n")
        except FileExistsError:
            raise UsageError(f"/save {name}: is there already: name another file") from None
        except OSError as error:
            raise KbitError(f"/save {name}: cannot be written ({error.strerror})") from None
        self._note(f"{len(self._conversation.messages)} messages in {file}")
