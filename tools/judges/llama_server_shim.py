#!/usr/bin/env python3
"""Stands in for llama-server: takes its flags and starts `kbit serve` (llama_server_tests.py has the use).

    llama_server_shim.py --model stories260K.gguf --port 8080 --ctx-size 512 --parallel 2 ...
    llama_server_shim.py --fork-server SOCKET            # imports everything once, and forks for every start

A flag that kbit has no like of ends it, with a line that names the flag. Where LLAMA_SHIM_SOCKET names a fork server's
socket, that server starts kbit, so that hundreds of starts do not import everything hundreds of times; the server ends
when this process does.
"""

import datetime
import json
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

# Flags of speed and memory, and of what kbit does anyway: with a value, without one.
IGNORED_WITH_VALUE = {"--ubatch-size", "--threads", "--n-gpu-layers", "--cache-ram", "-fa"}
IGNORED = {"--offline", "--cont-batching", "--jinja", "--no-jinja", "--swa-full", "--backend_sampling", "--embedding"}
SWITCHES = {"--kv-unified", "--verbose", "--metrics", "--slots", "--no-slots", "--no-ui"}
KNOWN = {
    *("--model", "--hf-repo", "--alias", "--port", "--host", "--temp", "--seed", "--ctx-size", "--parallel"),
    *("--n-predict", "--api-key", "--chat-template", "--chat-template-file", "--reasoning", "--cors-origins"),
    *("--batch-size", "--tags", "--hf-file", "--slot-save-path"),
}
# Models by what the tests call them (repository, or repository/file): the variable that names the one that is here.
HERE = {
    "ggml-org/test-model-stories260K": "LLAMA_SHIM_MODEL",
    "ggml-org/test-model-stories260K-infill": "LLAMA_SHIM_INFILL",
    "ggml-org/models/tinyllamas/split/stories15M-q8_0-00001-of-00003.gguf": "LLAMA_SHIM_SPLIT",
    "ggml-org/models/bert-bge-small/ggml-model-f16.gguf": "LLAMA_SHIM_ENCODER",
}
# Conversations as they are written where a model's file has no template, and templates that llama.cpp knows by name.
CHATML = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content "
    "+ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
COMMAND_R = (
    "{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' + {'system': '<|SYSTEM_TOKEN|>', 'user': '<|USER_TOKEN|>', "
    "'assistant': '<|CHATBOT_TOKEN|>'}[m.role] + m.content + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "command-r": COMMAND_R}


def translated(flags: list[str]) -> list[str]:
    """The arguments of `kbit` for llama-server's."""
    given: dict[str, str] = {}
    on: set[str] = set()
    words = iter(flags)
    for flag in words:
        if flag in IGNORED or flag in SWITCHES:
            on.add(flag)
        elif flag in IGNORED_WITH_VALUE:
            next(words)
        elif flag in KNOWN:
            given[flag] = next(words)
        else:
            sys.exit(f"llama_server_shim: kbit serve has nothing like {flag}")
    model = given.get("--model", os.environ.get("LLAMA_SHIM_MODEL", ""))
    if "--hf-repo" in given:
        named = "/".join(given[name] for name in ("--hf-repo", "--hf-file") if name in given)
        variable = HERE.get(named, HERE.get(given["--hf-repo"], ""))
        model = os.environ.get(variable, "")
        if not model:
            sys.exit(f"llama_server_shim: the model {named} is not here")
    seats = int(given.get("--parallel", "4"))
    names = ",".join(
        sorted(given.get("--alias", "").split(","))
    )  # llama-server's name of several is the first of the set
    arguments = ["serve", f"{names}={model}" if names else model, "--any-model"]
    arguments += ["--parallel", str(seats), "--threads", "1"]
    for flag, name in (
        ("--port", "--port"),
        ("--host", "--host"),
        ("--batch-size", "--batch"),
        ("--tags", "--tags"),
        ("--temp", "--temperature"),
        ("--seed", "--seed"),
        ("--slot-save-path", "--slot-save-path"),
    ):
        if flag in given:
            arguments += [name, given[flag]]
    if "--api-key" in given:
        arguments += ["--api-key", given["--api-key"]]
    if "--reasoning" in given:  # llama-server's "auto" tells templates that models may think
        arguments += ["--reasoning", "off" if given["--reasoning"] == "off" else "on"]
    if "--ctx-size" in given:
        context = int(given["--ctx-size"])
        arguments += ["--context", str(context if "--kv-unified" in on else context // seats)]
    if int(given.get("--n-predict", "-1")) > 0:
        arguments += ["--max-tokens", given["--n-predict"]]
    arguments += ["--verbose"] * ("--verbose" in on)
    arguments += ["--without", "metrics"] * ("--metrics" not in on)
    arguments += ["--without", "slots"] * ("--no-slots" in on)
    arguments += ["--without", "page"] * ("--no-ui" in on)
    today = datetime.date.today()  # llama-server tells templates, under the names that two families use
    days = {"date_string": today.strftime("%d %b %Y"), "datetime": today.strftime("%b %d %Y")}
    arguments += ["--chat-template-kwargs", json.dumps(days)]
    arguments += ["--cors-origin", given.get("--cors-origins", "*")]
    return [*arguments, "--chat-template", template(given)]


def template(given: dict[str, str]) -> str:
    """The file of a chat template."""
    if "--chat-template-file" in given:
        return str(Path(given["--chat-template-file"]).absolute())
    named = given.get("--chat-template", "chatml")
    text = TEMPLATES.get(named)
    if text is None:
        if "{" not in named and " " not in named:
            sys.exit(f"llama_server_shim: kbit has no template of the name {named}")
        text = named  # one that is given in full
    with tempfile.NamedTemporaryFile("w", suffix=".jinja", delete=False) as file:
        file.write(text)
    return file.name


def fork_server(path: str) -> None:
    """Starts kbit again and again: a child for every connection, which ends with it."""
    import threading

    import uvicorn  # noqa: F401

    import kbit.engine.loader
    import kbit.models.load
    import kbit.serve.app
    import kbit.serve.grammar  # noqa: F401
    from kbit.cli.main import main

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(64)
    while True:
        connection, _ = server.accept()
        data, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 2)
        if os.fork():
            connection.close()
            for each in descriptors:
                os.close(each)
            continue
        server.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(descriptors[0], 1)
        os.dup2(descriptors[1], 2)

        def end_with(connection: socket.socket = connection) -> None:
            connection.recv(1)
            os._exit(0)

        threading.Thread(target=end_with, daemon=True).start()
        sys.argv = ["kbit", *json.loads(data)]
        code: object = 1
        try:
            main()
        except SystemExit as end:
            code = end.code
        os._exit(code if isinstance(code, int) else 1)


def main() -> None:
    """Starts kbit, here or by a fork server."""
    if sys.argv[1:2] == ["--fork-server"]:
        fork_server(sys.argv[2])
        return
    arguments = translated(sys.argv[1:])
    path = os.environ.get("LLAMA_SHIM_SOCKET")
    if path is None:
        os.execv(sys.executable, [sys.executable, "-m", "kbit", *arguments])
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    socket.send_fds(connection, [json.dumps(arguments).encode()], [1, 2])
    # Told to end, this tells the server and waits for it: the next one wants its port.
    signal.signal(signal.SIGTERM, lambda *_: connection.shutdown(socket.SHUT_WR))
    connection.recv(1)  # nothing: the server has ended
    sys.exit(1)


if __name__ == "__main__":
    main()
