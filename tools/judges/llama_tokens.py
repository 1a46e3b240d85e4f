"""The ids that llama.cpp makes of texts: python llama_tokens.py '["FILE", ...]' '["text", ...]'.

Prints a JSON list of lists, by file and text, without what is put before and after. Calls the C functions in the
library that xllamacpp brings; runs in an environment with it, and needs nothing else.
"""

from __future__ import annotations

import json
import sys
from ctypes import POINTER, c_bool, c_char_p, c_int32, c_void_p

from llama_states import library


def main() -> None:
    files, texts = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    llama = library()
    llama.llama_backend_init()
    llama.llama_tokenize.restype = c_int32
    llama.llama_tokenize.argtypes = [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]
    answers: list[list[list[int]] | None] = []
    for path in files:
        params = llama.llama_model_default_params()
        params.vocab_only = True
        model = llama.llama_model_load_from_file(path.encode(), params)
        if not model:
            answers.append(None)
            continue
        vocabulary, found = llama.llama_model_get_vocab(model), []
        for text in texts:
            data = text.encode()
            ids = (c_int32 * (len(data) + 8))()
            count = llama.llama_tokenize(vocabulary, data, len(data), ids, len(ids), False, False)
            found.append(list(ids[:count]))
        answers.append(found)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
