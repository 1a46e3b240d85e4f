"""What is exported as GGUF: llama.cpp's tensors, keys and tokenizers; codes bit for bit; and what cannot be said refused."""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import gguf
import gguf_older_cases as older
import numpy as np
import pytest
import torch
from decoder_cases import saved_model
from gguf_family_cases import CASES, keys_of, tensors_of
from gguf_model_cases import Model
from packed_cases import Packed, awq, draw, gptq, write_packed
from safetensors.torch import load_file, save_file

from kbit.checkpoint.gguf.header import read_header
from kbit.checkpoint.gguf.tokenizer import sidecars_from_header
from kbit.checkpoint.source import StoredSource
from kbit.formats.registry import parse_format
from kbit.host.errors import KbitError, UnsupportedError, UsageError
from kbit.models.export_gguf import ExportedGGUF, export_gguf
from kbit.models.families import spec_from_config
from kbit.models.opening import open_model
from kbit.quantizers.convert import convert
from kbit.quantizers.plan import make_plan

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
# What is read only: convolutions and state spaces.
REFUSED = ("lfm2", "granite-hybrid", "falcon-h1", "nemotron-h")
# llama.cpp has no windows for EXAONE 4 but in models of 64 layers, and reads DeepSeek-V2-Lite in 26 or 27.
FAMILIES = tuple(case for case in CASES if case not in ("exaone4", "deepseek-v2-lite"))


def opened(model: Path) -> StoredSource:
    source = open_model(str(model))
    assert isinstance(source, StoredSource)
    return source


def export(model: Path, out: Path, **options: Any) -> ExportedGGUF:
    with opened(model) as source:
        return export_gguf(source, out, **options)


def stored(path: Path) -> dict[str, tuple[str, bytes]]:
    """The tensors of a file: types and bytes."""
    header, data = read_header(path), path.read_bytes()
    return {
        name: (tensor.type.name, data[tensor.offset : tensor.offset + tensor.nbytes])
        for name, tensor in header.tensors.items()
    }


def byte_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer of bytes, some merges and some special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n")]
    texts = [*alphabet, *(left + right for left, right in merges)]
    made = Tokenizer(models.BPE({text: index for index, text in enumerate(texts)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([f"<|{index}|>" for index in range(len(texts), size)])
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": f"<|{size - 1}|>",
        "chat_template": "{{ x }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_written_is_refused(tmp_path: Path, case: str) -> None:
    saved_model(case, tmp_path / "m")
    with pytest.raises(
        UnsupportedError, match="kbit writes no GGUF file of a .* model, but of .*; export plain floats with --to"
    ):
        export(tmp_path / "m", tmp_path / "m.gguf")


@pytest.mark.parametrize("case", FAMILIES)
def test_tensors_and_keys_are_those_of_llama_cpps_converter(tmp_path: Path, case: str) -> None:
    """As `gguf_family_cases` has them, which were compared with its files; some keys that it writes of others more."""
    arch, _, changes = CASES[case]
    saved_model(case, tmp_path / "m", **{"max_position_embeddings": 64, **changes})
    done = export(tmp_path / "m", tmp_path / "m.gguf")
    found, expected = stored(tmp_path / "m.gguf"), tensors_of(case, tmp_path / "m")
    assert (
        found.keys() - {"rope_factors_short.weight", "rope_factors_long.weight", "rope_freqs.weight"} == expected.keys()
    )
    for name, values in expected.items():
        assert found[name] == ("F32", values.astype("<f4").tobytes()), name
    assert (done.error, done.types) == (0.0, {"F32": len(found)})
    if arch == "gemma4":  # the first quarter of 16 pairs turns
        factors = np.frombuffer(found["rope_freqs.weight"][1], "<f4").tolist()
        assert factors == [1.0] * 4 + [float(np.float32(1e30))] * 12
    header = read_header(tmp_path / "m.gguf")
    assert header.value("general.architecture") == arch
    for key, value in keys_of(case, tmp_path / "m").items():
        if (
            key == "rope.scaling.original_context_length"
            and f"{arch}.rope.scaling.type" not in header
            and arch == "phi3"
        ):
            continue  # the converter writes it of models without scaling, too, for which it says nothing
        if key == "rope.dimension_sections":  # (of heads of 256 features; the tiny ones' have 2 pairs)
            assert header.value(f"{arch}.{key}") == [1, 1, 0, 0]
            continue
        found_value = header.value(f"{arch}.{key}")
        assert found_value == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key


@pytest.mark.parametrize("case", older.CASES)
def test_older_families_are_written_as_llama_cpps_converter_does(tmp_path: Path, case: str) -> None:
    """As `gguf_older_cases` has them; they are read back as the same tensors."""
    arch, changes = older.CASES[case]
    saved_model(case, tmp_path / "m", **{"max_position_embeddings": 64, **changes})
    export(tmp_path / "m", tmp_path / "m.gguf")
    found, expected = stored(tmp_path / "m.gguf"), older.tensors_of(arch, tmp_path / "m")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == ("F32", values.astype("<f4").tobytes()), name
    header = read_header(tmp_path / "m.gguf")
    for key, value in older.keys_of(arch, tmp_path / "m").items():
        if (key, value) == ("rope.scaling.type", "none"):
            continue
        found_value = header.value(f"{arch}.{key}")
        assert found_value == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key
    with open_model(str(tmp_path / "m.gguf")) as file, open_model(str(tmp_path / "m")) as folder:
        assert file.tensors.keys() == folder.tensors.keys()
        for name in file.tensors:
            assert torch.equal(file.read(name), folder.read(name)), name


def test_blocks_of_delta_nets_and_latent_keys(tmp_path: Path) -> None:
    """Heads of values in another order, by row and by column, whole blocks at a time; keys lie down, and are rounded so."""
    type_ = gguf.GGMLQuantizationType.Q8_0

    def rounded(values: Any) -> Any:
        return gguf.quants.dequantize(gguf.quants.quantize(values, type_), type_)

    sizes = {"hidden_size": 64, "intermediate_size": 64, "linear_num_value_heads": 6, "linear_value_head_dim": 32}
    saved_model("qwen3_5", tmp_path / "m", max_position_embeddings=64, **sizes)
    export(tmp_path / "m", tmp_path / "m.gguf", requantize="Q8_0")
    with opened(tmp_path / "m.gguf") as file, opened(tmp_path / "m") as folder:
        for name in folder.tensors:
            plain = folder.read_array(name)
            small = plain.ndim != 2 or "embed" in name or "lm_head" in name
            if "A_log" in name:
                assert np.allclose(file.read_array(name), plain, rtol=1e-6)  # there it is -exp of it
            else:
                assert np.array_equal(file.read_array(name), plain if small else rounded(plain)), name
    sizes = {"hidden_size": 96, "qk_nope_head_dim": 32, "v_head_dim": 32, "kv_lora_rank": 32, "q_lora_rank": 32}
    sizes |= {"intermediate_size": 64, "moe_intermediate_size": 32, "head_dim": 4, "qk_rope_head_dim": 4}
    saved_model("deepseek-v2", tmp_path / "d", max_position_embeddings=64, attention_bias=False, **sizes)
    export(tmp_path / "d", tmp_path / "d.gguf", requantize="Q8_0")
    with opened(tmp_path / "d.gguf") as file, opened(tmp_path / "d") as folder:
        for part in ("k_b_proj", "v_b_proj", "q_b_proj"):
            name = f"model.layers.1.self_attn.{part}.weight"
            plain = folder.read_array(name)
            if part == "k_b_proj":
                lying = np.ascontiguousarray(plain.reshape(6, 32, 32).swapaxes(1, 2))
                wanted = rounded(lying).swapaxes(1, 2).reshape(plain.shape)
            else:
                wanted = rounded(plain)
            assert np.array_equal(file.read_array(name), wanted), name


def test_factors_that_are_the_same_for_all_texts_are_a_tensor_of_any_architecture(tmp_path: Path) -> None:
    """As llama3's are, and read back."""
    factors = [1.5, 2.0, 3.0, 7.5]
    settings = {"rope_type": "longrope", "rope_theta": 1000.0, "short_factor": factors, "long_factor": factors}
    settings |= {"factor": 1.0, "attention_factor": 1.0, "original_max_position_embeddings": 64}
    saved_model("llama", tmp_path / "m", max_position_embeddings=64, rope_parameters=settings)
    export(tmp_path / "m", tmp_path / "m.gguf")
    kind, written = stored(tmp_path / "m.gguf")["rope_freqs.weight"]
    assert (kind, np.frombuffer(written, "<f4").tolist()) == ("F32", factors)
    with open_model(str(tmp_path / "m.gguf")) as file, open_model(str(tmp_path / "m")) as folder:
        specs = [spec_from_config(source.config).rope for source in (file, folder)]
    assert specs[0] == specs[1]


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("exaone4", {}, "no sliding windows for its exaone4 architecture"),
        ("mistral-window", {}, "no sliding windows for its llama architecture"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "gemma2 architecture cannot say that score_scale is 0.204"),
        ("llama-gelu", {}, "llama architecture cannot say that activation is gelu .it would be silu."),
        ("llama-longrope", {}, "kbit writes no LongRoPE for llama.cpp's llama architecture"),
        ("llama-dynamic", {}, "llama architecture cannot say that rope.kind is dynamic"),
        ("qwen3-moe", {"norm_topk_prob": False}, "qwen3moe architecture cannot say that experts.routing.normalise is False"),
        ("gpt_neo", {}, "kbit writes no GGUF file of a gpt_neo model, but of .*qwen3"),
        ("deepseek-v2-lite", {}, r"llama.cpp reads queries without a rank .q_lora_rank. in deepseek2 models of 26 or 27 layers"),
        ("gemma4-dense", {}, "llama.cpp caps a gemma4 model's logits at 30 where there is no cap"),
        ("deepseek-v2", {"attention_bias": True}, "biases, or none, where GGUF files of the deepseek2 architecture"),
        ("gpt_neox", {"tie_word_embeddings": True}, "llama.cpp reads no gptneox model whose head is its embedding"),
        ("gpt_neox-sequential", {}, "have biases, or none, where GGUF files of the gptneox architecture have biases"),
        ("falcon", {"bias": True}, "have biases, or none, where GGUF files of the falcon architecture have none"),
        ("falcon-rw", {}, "have biases, or none, where GGUF files of the falcon architecture have none"),
        ("gpt_neox", {"hidden_act": "gelu_new"}, "gptneox architecture cannot say that activation is gelu_tanh"),
        ("starcoder2", {}, "no sliding windows for its starcoder2 architecture"),
    ],
)  # fmt: skip
def test_what_the_architecture_cannot_say(tmp_path: Path, case: str, changes: dict[str, Any], message: str) -> None:
    saved_model(case, tmp_path / "m", **{"max_position_embeddings": 64, **changes})
    with pytest.raises(UnsupportedError, match=message + ".*--to safetensors"):
        export(tmp_path / "m", tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_llama3_scaling_is_a_tensor(tmp_path: Path) -> None:
    saved_model("llama-llama3", tmp_path / "m", head_dim=32, max_position_embeddings=64)
    export(tmp_path / "m", tmp_path / "m.gguf", dtype="bf16")
    with opened(tmp_path / "m.gguf") as source:
        scaling = source.config["rope_scaling"]
    assert scaling == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }


def mxfp4(shape: torch.Size, generator: torch.Generator) -> Packed:
    """A layer as compressed-tensors writes MXFP4."""
    rows, columns = shape
    codes, exponents = draw((rows, columns), 16, generator), 115 + draw((rows, columns // 32), 10, generator)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    return Packed({"weight_packed": packed, "weight_scale": exponents.to(torch.uint8)}, torch.zeros(shape))


MXFP4 = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}
# Case: what others have packed, and the type that loses nothing of it.
PACKED: dict[str, tuple[dict[str, Any], Any, str]] = {
    "2 bits": ({**GPTQ, "bits": 2}, gptq(2, 32, symmetric=True, layout=1), "Q4_0"),
    "4 bits": (GPTQ, gptq(4, 32, symmetric=True, layout=1), "Q4_0"),
    "4 bits, long blocks": ({**GPTQ, "group_size": 64}, gptq(4, 64, symmetric=True, layout=1), "Q4_0"),
    "4 bits with zeros": ({**GPTQ, "sym": False}, gptq(4, 32, symmetric=False, layout=1), "Q5_0"),
    "AWQ": ({"quant_method": "awq", "bits": 4, "group_size": 32}, awq(32), "Q5_0"),
    "5 bits": ({**GPTQ, "bits": 5}, gptq(5, 32, symmetric=True, layout=1), "Q5_0"),
    "8 bits": ({**GPTQ, "bits": 8}, gptq(8, 32, symmetric=True, layout=1), "Q8_0"),
    "MXFP4": (MXFP4, mxfp4, "MXFP4"),
}


@pytest.mark.parametrize("case", PACKED)
def test_others_codes_are_the_same_numbers(tmp_path: Path, packable_model: Path, case: str) -> None:
    """As the gguf package decodes them, rows of queries and keys in its order."""
    settings, pack, type_ = PACKED[case]
    write_packed(packable_model, tmp_path / "m", settings, pack)
    done = export(tmp_path / "m", tmp_path / "m.gguf")
    assert (done.types[type_], done.rounded, done.error) == (14, 0, 0.0)
    kind = gguf.GGMLQuantizationType[type_]
    found = stored(tmp_path / "m.gguf")
    with opened(tmp_path / "m") as source, opened(tmp_path / "m.gguf") as again:
        for name in source.tensors:
            assert np.array_equal(source.read_array(name), again.read_array(name)), name
        down = source.read_array("model.layers.1.mlp.down_proj.weight")
    data = np.frombuffer(found["blk.1.ffn_down.weight"][1], dtype=np.uint8).reshape(len(down), -1)
    assert np.array_equal(gguf.quants.dequantize(data, kind), down)


def converted(model: Path, out: Path, format: str) -> Path:
    with open_model(str(model)) as source:
        convert(source, make_plan(source, parse_format(format)), out)
    return out


def test_what_no_type_holds_is_refused_and_can_be_rounded(tmp_path: Path, packable_model: Path) -> None:
    model = converted(packable_model, tmp_path / "q", "nf4-b32")
    message = r"GGUF has no type for model\.layers\.0\.self_attn\.q_proj\.weight, which has levels that are neither.*"
    message += r"and 1[123] more.: round them with --requantize Q8_0"
    with pytest.raises(UnsupportedError, match=message):
        export(model, tmp_path / "m.gguf")
    errors = []
    for type_ in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"):
        done = export(model, tmp_path / f"{type_}.gguf", requantize=type_)
        assert done.rounded == done.types[type_] == 14
        errors.append(done.error)
    assert errors == sorted(errors)
    assert 1e-4 < errors[0] < 0.01 < errors[-1] < 0.2


@pytest.mark.parametrize(("format", "type_"), [("int8-b64", "Q8_0"), ("int4-b32", "Q4_0"), ("int4-b32", "Q8_0")])
def test_kbits_own_integers_keep_their_codes(tmp_path: Path, packable_model: Path, format: str, type_: str) -> None:
    """Only their scales are rounded, to float16: half of 2^-10."""
    model = converted(packable_model, tmp_path / "q", format)
    with pytest.raises(UnsupportedError, match="has scales that float16 cannot hold, as GGUF's are"):
        export(model, tmp_path / "m.gguf")
    done = export(model, tmp_path / "m.gguf", requantize=type_)
    assert 0 < done.error < 2.0**-11


def test_rows_that_are_no_blocks(tmp_path: Path) -> None:
    """Rounding them is of no use, and not recommended."""
    saved_model("llama", tmp_path / "m")
    for options in ({}, {"requantize": "Q8_0"}):
        with pytest.raises(UnsupportedError, match="has rows of 48 weights, .* of 32.*: write plain floats with --to"):
            export(converted(tmp_path / "m", tmp_path / f"q{len(options)}", "int8-b16"), tmp_path / "m.gguf", **options)


def test_dense_models_are_rounded_to_a_type(tmp_path: Path, packable_model: Path) -> None:
    """Layers, not the embedding; and floats become what --dtype says, vectors float32."""
    done = export(packable_model, tmp_path / "m.gguf", requantize="Q8_0", dtype="bf16")
    assert (done.rounded, done.types) == (14, {"Q8_0": 14, "BF16": 1, "F32": 5})
    plain = export(packable_model, tmp_path / "plain.gguf")
    assert (plain.error, plain.types) == (0.0, {"F16": 15, "F32": 5})


def test_a_gguf_file_is_copied_bit_for_bit(tmp_path: Path) -> None:
    """Types that kbit makes none of, too; parts are joined."""
    model = Model("llama")
    rng = np.random.default_rng(0)
    for index, (name, (values, _)) in enumerate(list(model.stored.items())):
        if values.ndim == 2 and "ffn_gate" in name:
            model.stored[name] = (
                gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1),
                gguf.GGMLQuantizationType.Q4_1,
            )
        elif values.ndim == 2 and index % 2:
            model.stored[name] = (rng.standard_normal(values.shape).astype(np.float16), None)
    model.general["general.name"] = "Müller"
    model.keys["rope.scaling.type"] = "none"
    whole = model.write(tmp_path / "whole.gguf")
    done = export(whole, tmp_path / "copy.gguf")
    assert stored(whole) == stored(tmp_path / "copy.gguf")
    assert done.nbytes == (tmp_path / "copy.gguf").stat().st_size
    before, after = read_header(whole), read_header(tmp_path / "copy.gguf")
    kept = [[(key, file.type_of(key), file.value(key)) for key in file] for file in (before, after)]
    assert kept[0] == kept[1]
    model.write(tmp_path / "part.gguf", split_max_tensors=7)
    first = next(tmp_path.glob("part-00001-of-*.gguf"))
    export(first, tmp_path / "joined.gguf")
    assert stored(tmp_path / "joined.gguf") == stored(whole)
    assert "split.count" not in read_header(tmp_path / "joined.gguf")
    with pytest.raises(UsageError, match="a GGUF file is copied as it is: leave out --dtype and --requantize"):
        export(whole, tmp_path / "other.gguf", requantize="Q8_0")


def test_what_is_in_the_way(tmp_path: Path, packable_model: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model")
    for name, message in (("m.bin", "name a file that ends in .gguf"), ("text.gguf", "exists; name another file")):
        with pytest.raises(UsageError, match=message):
            export(packable_model, tmp_path / name)
    with pytest.raises(UsageError, match=r"exists and is no GGUF file"):
        export(packable_model, tmp_path / "text.gguf", overwrite=True)
    export(packable_model, tmp_path / "m.gguf")
    export(packable_model, tmp_path / "m.gguf", overwrite=True, dtype="fp32")
    with pytest.raises(UsageError, match="--requantize Q4_K: kbit rounds to Q8_0"):
        export(packable_model, tmp_path / "n.gguf", requantize="Q4_K")


def test_a_failed_export_leaves_nothing(tmp_path: Path, write_model: Any) -> None:
    folder = write_model(tmp_path / "m", dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = 7e4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        KbitError, match=r"down_proj\.weight holds values up to 7e\+04, which F16 cannot: use --dtype bf16"
    ):
        export(folder, tmp_path / "m.gguf", dtype="fp16")
    assert not list(tmp_path.glob("*.gguf*"))
    export(folder, tmp_path / "m.gguf", dtype="bf16")  # as the error says


def test_a_tokenizer_is_the_same_read_back(tmp_path: Path, packable_model: Path) -> None:
    """Ids of texts, special tokens, what is added to a text, chat templates."""
    from kbit.text.tokenizer import Tokenizer

    folder = tmp_path / "m"
    saved_model("llama", folder, vocab_size=270)
    byte_tokenizer(folder, 266)
    export(folder, tmp_path / "m.gguf")
    header = read_header(tmp_path / "m.gguf")
    tokens = header.strings("tokenizer.ggml.tokens") or []
    assert (len(tokens), tokens[256:262], tokens[-4:]) == (
        270,
        ["th", "the", "Ġthe", "in", "<|260|>", "<|261|>"],
        [f"[PAD{i}]" for i in range(266, 270)],
    )
    assert (header.integers("tokenizer.ggml.token_type") or [])[258:] == [1, 1] + [3] * 6 + [5] * 4
    assert header.string("tokenizer.ggml.pre") == "gpt-2"
    with opened(folder) as source, opened(tmp_path / "m.gguf") as again:
        ours, theirs = Tokenizer.from_source(source), Tokenizer.from_source(again)
        text = "the thing in <|262|> the"
        assert ours.encode(text) == theirs.encode(text)
        assert (
            (ours.eos_ids, ours.chat_templates)
            == (theirs.eos_ids, theirs.chat_templates)
            == ({265}, {"default": "{{ x }}"})
        )


DATA = Path(os.environ.get("KBIT_DATA", "no-such-folder")) / "tokenizers"
VOCABULARIES = ("llama-spm", "deepseek-coder")


@pytest.mark.parametrize("name", VOCABULARIES)
def test_real_vocabularies(tmp_path: Path, name: str) -> None:
    """llama.cpp's own, through tokenizer.json and back: the same metadata, of SentencePiece but for the size of scores."""
    path = DATA / f"ggml-vocab-{name}.gguf"
    if not path.is_file():
        pytest.skip(f"{path} is not there (KBIT_DATA)")
    from tokenizers import Tokenizer as Library

    from kbit.checkpoint.gguf.tokenizer_out import check_same, tokenizer_metadata

    header = read_header(path)
    library = Library.from_buffer(sidecars_from_header(header, 2048)["tokenizer.json"])
    ids = {key: header.integer(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "padding", "unknown")}
    unknown = ids["unknown"] if name == "llama-spm" else None
    tokens = header.strings("tokenizer.ggml.tokens") or []
    eos = [ids["eos"]] if ids["eos"] is not None else []
    found = tokenizer_metadata(
        library, len(tokens), name, bos=ids["bos"], eos=eos, pad=ids["padding"], unknown=unknown, templates={}
    )
    assert found["tokenizer.ggml.tokens"] == tokens
    if "tokenizer.ggml.merges" in header and name != "llama-spm":
        assert found["tokenizer.ggml.merges"] == header.strings("tokenizer.ggml.merges")
        assert found["tokenizer.ggml.pre"] in (header.string("tokenizer.ggml.pre"), "smollm")
    else:
        scores, made = header.numbers("tokenizer.ggml.scores") or [], found["tokenizer.ggml.scores"]
        assert isinstance(made, list)
        types = header.integers("tokenizer.ggml.token_type") or []
        normal = [index for index, kind in enumerate(types) if kind == 1 and len(tokens[index]) > 1]
        assert all(isinstance(made[index], float) for index in normal)
        order = sorted(normal, key=lambda index: -float(made[index]))  # type: ignore[arg-type]
        assert all(scores[one] >= scores[other] for one, other in itertools.pairwise(order))
    saved_model(
        "llama", tmp_path / "m", vocab_size=len(tokens), hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    (tmp_path / "m" / "tokenizer.json").write_text(library.to_str())
    names = {"bos_token": ids["bos"], "eos_token": ids["eos"], "unk_token": unknown}
    settings = {key: tokens[index] for key, index in names.items() if index is not None}
    (tmp_path / "m" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings})
    )
    export(tmp_path / "m", tmp_path / "m.gguf")
    again = Library.from_buffer(sidecars_from_header(read_header(tmp_path / "m.gguf"), 2048)["tokenizer.json"])
    check_same(library, again, name)
    texts = (path.parent / f"{path.name}.inp").read_text().split("\n__ggml_vocab_test__\n")
    wanted = [
        [int(each) for each in line.split()] for line in (path.parent / f"{path.name}.out").read_text().splitlines()
    ]
    assert len(wanted) > 40
    assert [again.encode(text, add_special_tokens=False).ids for text in texts[: len(wanted)]] == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "GGUF has no name that kbit knows for a pre-tokenizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "GGUF has no name for a pre-tokenizer with Whitespace"),
        ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]], "byte_fallback": False}}, "kbit writes no Unigram tokenizer"),
    ],
)  # fmt: skip
def test_tokenizers_that_it_cannot_say(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = tmp_path / "m"
    saved_model("llama", folder, vocab_size=270)
    byte_tokenizer(folder, 266)
    parsed = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**parsed, **change}))
    with pytest.raises(UnsupportedError, match=message + ".*--to safetensors"):
        export(tmp_path / "m", tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "case", ["llama", "llama-llama3", "qwen3", "gemma3", "phi3-longrope", "granite", "olmo3", "qwen3-moe", "gpt-oss"]
)
def test_llama_cpp_computes_the_same(tmp_path: Path, case: str) -> None:
    """Log-probabilities after a text of the compiled llama.cpp in the xllamacpp wheel; its keys and values are fp16."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    changes = {**CASES[case][2]} if case in CASES else {"head_dim": 32} if case == "llama-llama3" else {}
    changes |= {"vocab_size": 266, "max_position_embeddings": 64, "tie_word_embeddings": case == "gemma3"}
    changes |= {"norm_topk_prob": True} if case == "qwen3-moe" else {}
    theirs = saved_model(case, tmp_path / "m", **changes)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" not in name:
                parameter *= 0.5  # logits that fp16 moves less
    theirs.save_pretrained(tmp_path / "m")
    byte_tokenizer(tmp_path / "m", 266)
    export(tmp_path / "m", tmp_path / "m.gguf")
    # More than LongRoPE's original length: llama.cpp chooses factors by the room that it makes for a text.
    ids = torch.randint(1, 250, (1, 45), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = torch.log_softmax(theirs(ids).logits[0, -1].double(), -1)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_gpu_layers, params.warmup = str(tmp_path / "m.gguf"), 64, 0, False
    server = xllamacpp.Server(params)
    request = {"prompt": ids[0].tolist(), "n_predict": 1, "logprobs": 300, "temperature": 0.0, "ignore_eos": True}
    answer = server.handle_completions(request)
    found = {each["id"]: each["logprob"] for each in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    assert len(found) == 266
    worst = max(abs(found[index] - float(expected[index])) for index in range(266) if math.isfinite(found[index]))
    assert worst <= 2.0**-8 * float(expected.max() - expected.min())  # eight of fp16's roundings, of the whole range
