"""llama.cpp's converter, with a list of words in place of the model's tokenizer (which tiny models do not have).

python llama_convert.py LLAMA_CPP_SOURCE FOLDER [convert_hf_to_gguf.py's options]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def words_only(model: Any) -> None:
    """The vocabulary of a converter's model: words that stand for themselves, and no merges worth the name."""
    import gguf

    count = model.hparams["vocab_size"]
    writer = model.gguf_writer
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{index}>" for index in range(count)])
    writer.add_token_types([gguf.TokenType.NORMAL] * count)
    writer.add_token_merges(["a b"])


def main() -> None:
    source = sys.argv.pop(1)
    sys.path.insert(0, source)
    import convert_hf_to_gguf as converter

    find = converter.get_model_class

    def without_tokenizer(*arguments: Any, **options: Any) -> Any:
        found = find(*arguments, **options)
        found.set_vocab = words_only
        found._MLP_LAYER_TYPES = {"moe", "mlp"}  # of Nemotron-H, in transformers' words
        settings = found.set_gguf_parameters

        def with_share(model: Any) -> None:
            # GPT-NeoX's share of a head that turns, which transformers calls otherwise now.
            model.hparams.setdefault("rotary_pct", model.rope_parameters.get("partial_rotary_factor", 1.0))
            settings(model)

        found.set_gguf_parameters = with_share
        return found

    # Gemma's converter counts the words that there are; MPT's knows what the models' own code was called.
    folder = Path(sys.argv[1])
    config = json.loads((folder / "config.json").read_text())
    count = config["vocab_size"]
    if config["architectures"] == ["MptForCausalLM"]:
        config["architectures"] = ["MPTForCausalLM"]
    if config["model_type"] == "granitemoehybrid":  # whose layers have other names in transformers now
        names = {"full_attention": "attention", "linear_attention": "mamba"}
        config["layer_types"] = [names.get(kind, kind) for kind in config["layer_types"]]
    (folder / "config.json").write_text(json.dumps(config))
    words = {"model": {"vocab": {f"<{index}>": index for index in range(count)}}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(words))

    base = sys.modules["conversion.base"].ModelBase
    load = base.load_hparams

    def without_experts(*arguments: Any, **options: Any) -> Any:
        # Nemotron-H's converter takes a model for a mixture that only says how many it would choose.
        found, groups = load(*arguments, **options), ("n_group", "topk_group")
        if found.get("model_type") == "nemotron_h" and "moe" not in (found.get("layers_block_type") or ["moe"]):
            found = {key: value for key, value in found.items() if "expert" not in key and key not in groups}
        return found

    base.load_hparams = staticmethod(without_experts)
    converter.get_model_class = without_tokenizer
    converter.main()


if __name__ == "__main__":
    main()
