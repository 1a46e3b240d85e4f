"""What `kbit quantize` and `kbit.quantize` are asked, and what that means: format, method, budget, plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbit.host.errors import UsageError
from kbit.host.quantities import parse_duration, parse_size
from kbit.quantizers.nested_flags import FORMAT_FLAGS, check_anchor, nested_format

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource
    from kbit.formats.codec import Codec
    from kbit.host.progress import Progress
    from kbit.quantizers.calibrated import CalibratedRounding
    from kbit.quantizers.method import Method
    from kbit.quantizers.mixed import Budget
    from kbit.quantizers.plan import Plan

_MAX_SHARD_GB = 1_000_000
# Bits of embeddings and head where nothing else is said and the method is calibrated: free of loss on every model
# measured (docs/accuracy.md).
EMBEDDING_BITS = 6
# Tokens that the result is measured on.
MEASURED_TOKENS = 4096


@dataclass(frozen=True)
class QuantizeRequest:
    """How a model is to be quantized. The attributes are the flags of `kbit quantize` of these names, which say what
    they mean (`kbit.cli.quantize_flags`)."""

    model: str
    bits: float | None = None
    size: str | None = None
    max_kl: float | None = None
    uniform: bool = False
    dtype: str | None = None
    block_size: int | None = None
    asymmetric: bool = False
    exponent_bits: int | None = None
    float_grid: str | None = None
    scale_dtype: str | None = None
    double_quant: bool = False
    nested: str | None = None
    anchor: int | None = None
    format: str | None = None
    method: str = "auto"
    fast: bool = False
    time_budget: str | None = None
    calibration: list[str] | None = None
    calibration_tokens: int | None = None
    inputs_only: bool = False
    static_scales: bool = False
    act_order: bool = False
    embedding_bits: int | None = None
    override: list[str] | None = None
    output: Path | None = None
    shard_size: float = 5.0
    measure: bool = True
    save_plan: Path | None = None
    plan_file: Path | None = None
    dry_run: bool = False
    resume: bool = True
    force: bool = False
    threads: int | None = None
    device: str = "cpu"

    @property
    def format_fields(self) -> dict[str, Any]:
        """The fields of a format that flags give, by name (`FORMAT_FLAGS` has the flags)."""
        fields: dict[str, Any] = {
            "dtype": self.dtype.lower() if self.dtype else None,
            "bits": None if self.bits is None else int(self.bits),
            "block_size": self.block_size,
            "asymmetric": self.asymmetric or None,
            "exponent_bits": self.exponent_bits,
            "grid": self.float_grid,
            "scale_dtype": self.scale_dtype,
            "double_quant": self.double_quant or None,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def codec(self) -> Codec:
        """The format of linear weights; of mixed widths the one below the mean.

        Raises:
            UsageError: a setting that does not exist, or one that --format says already.
        """
        from kbit.formats.quant_format import MAX_BITS, MIN_BITS, QuantFormat, default_dtype
        from kbit.formats.registry import parse_format

        if self.bits is not None and self.bits != int(self.bits) and not MIN_BITS <= self.bits <= MAX_BITS:
            raise UsageError(f"--bits {self.bits:g}: use {MIN_BITS} to {MAX_BITS}")
        given = self.format_fields
        own = self._method_with_formats()
        if self.nested is not None:
            others = {
                "--format": self.format,
                "--size": self.size,
                "--max-kl": self.max_kl,
                f"--method {self.method}": None if own is None else own.name,
                "--fast": self.fast or None,
            }
            return nested_format(self.nested, given, others)
        if own is not None and self.format is None:
            other = next((FORMAT_FLAGS[name] for name in given if name != "bits"), None)
            if other is not None:
                raise UsageError(f"--method {self.method} has formats of its own: drop {other}")
            return self._format_of_method(own)
        if self.fast:
            fast = None if self.format is None else _with_fast_window(parse_format(self.format))
            if fast is not None:
                raise UsageError(f"--fast: --format {self.format} says everything; write --format {fast} for both")
            raise UsageError("--fast: is for --method trellis, whose search takes long; drop it")
        if self.format is None:
            given = {"bits": 4, **given}
            return QuantFormat(**{"dtype": default_dtype(given["bits"]), **given})
        if given:
            raise UsageError(f"--format {self.format}: says everything; drop {FORMAT_FLAGS[next(iter(given))]}")
        named = parse_format(self.format)
        usual = None if own is None else own.format(4, False)
        if usual is not None and named.family != usual.family:
            raise UsageError(
                f"--format {self.format}: --method {self.method} has formats of its own; use another method, or "
                f"--format {usual}"
            )
        return named

    def _method_with_formats(self) -> CalibratedRounding | None:
        """The method by its name, if it brings formats of its own."""
        from kbit.quantizers.calibrated import CalibratedRounding
        from kbit.quantizers.methods import get_method

        method = None if self.method == "auto" else get_method(self.method, to_store=True)
        return method if isinstance(method, CalibratedRounding) and method.format(4, False) is not None else None

    def _format_of_method(self, method: CalibratedRounding) -> Codec:
        """The format that goes with a method's name."""
        from kbit.formats.quant_format import MAX_BITS, MIN_BITS
        from kbit.formats.trellis import INTEGER_BITS

        bits = 4 if self.bits is None else self.bits
        if not MIN_BITS <= bits <= MAX_BITS:
            raise UsageError(f"--bits {bits:g}: use {MIN_BITS} to {MAX_BITS}")
        if not self._is_half_width:
            bits = int(bits)
        # Integers have no windows, so of mixed widths they would not tell the others that theirs are to be short.
        mixes = method.mixes and method.request.gradients and not self.inputs_only and not self.names_a_type
        found = method.format(min(bits, INTEGER_BITS - 1) if self.fast and mixes else bits, self.fast)
        assert found is not None
        return found

    @property
    def _is_half_width(self) -> bool:
        """Whether --bits, though no whole number, is a width that one format has: half a bit more of a trellis."""
        from kbit.formats.trellis import HALF_WIDTHS

        return self.uniform and self.bits in HALF_WIDTHS and self._method_with_formats() is not None

    def measures(self, method: Method) -> bool:
        """Whether the result is compared with the original."""
        from kbit.quantizers.calibrated import CalibratedRounding

        return self.measure and isinstance(method, CalibratedRounding)

    @property
    def names_a_type(self) -> bool:
        """Whether linear weights are to have one format that the user named."""
        special = self.nested or self.dtype or self.format or self.asymmetric or self.exponent_bits or self.float_grid
        return self.uniform or bool(special)

    @property
    def mixes(self) -> str | None:
        """The flag that only mixed widths can do justice to, if there is one."""
        if self.bits is not None and self.bits != int(self.bits) and not self._is_half_width:
            return f"--bits {self.bits:g}"
        return "--size" if self.size else "--max-kl" if self.max_kl is not None else None

    @property
    def seconds(self) -> float | None:
        """--time-budget in seconds.

        Raises:
            UsageError: it is no time, or there is nothing to choose.
        """
        if self.time_budget is None:
            return None
        found = parse_duration(self.time_budget)
        if found is None:
            raise UsageError(f"--time-budget {self.time_budget}: write a time such as 90s, 10m or 1h30m")
        if self.method != "auto":
            raise UsageError(f"--time-budget chooses the method, and it is {self.method} already: drop one of the two")
        return found

    def mixes_widths(self, method: Method) -> bool:
        """Whether every matrix gets a width of its own.

        Raises:
            UsageError: a budget that one width for all cannot meet, or that needs another method.
        """
        from kbit.quantizers.calibrated import CalibratedRounding

        budget = self.mixes
        weighs = isinstance(method, CalibratedRounding) and method.request.gradients
        if budget and self.names_a_type:
            raise UsageError(f"{budget} mixes widths: drop --uniform, and flags that name a data type")
        if budget and not weighs:
            raise UsageError(f"{budget} needs gradients to weigh widths: use --method ldlq2, without --inputs-only")
        if self.size and (self.bits is not None or self.max_kl is not None):
            raise UsageError("--size, --bits and --max-kl are three ways to say one thing: use one")
        if self.max_kl is not None and self.bits is not None:
            raise UsageError("--bits and --max-kl are two ways to say one thing: use one")
        wanted = isinstance(method, CalibratedRounding) and (method.mixes or budget is not None)
        return weighs and wanted and not self.names_a_type and self.plan_file is None

    def label(self, codec: Codec, mixed: bool) -> str:
        """How the default output folder ends."""
        if self.plan_file is not None:
            return self.plan_file.stem
        if not mixed:
            return str(codec)
        if self.size:
            return self.size.strip().lower()
        return f"kl{self.max_kl:g}" if self.max_kl is not None else f"{4 if self.bits is None else self.bits:g}bit"

    def fixed(self, plan: Plan) -> set[str]:
        """Names of matrices whose formats are not to be mixed: --override and --embedding-bits say what they are."""
        from fnmatch import fnmatchcase

        patterns = [pattern for pattern, _ in self.overrides]
        return {
            tensor.source.name
            for tensor in plan.tensors
            if any(fnmatchcase(tensor.source.name, pattern) for pattern in patterns)
            or (self.embedding_bits is not None and tensor.role in ("embedding", "table", "head"))
        }

    @property
    def options(self) -> dict[str, bool]:
        """Of methods that pass errors on (`CalibratedRounding.with_options`)."""
        return {"act_order": self.act_order, "static_scales": self.static_scales}

    @property
    def stops(self) -> bool:
        """Whether the plan is all that is wanted."""
        return self.dry_run or self.save_plan is not None

    @property
    def budget(self) -> Budget:
        """What mixed widths may take.

        Raises:
            UsageError: --size is no size.
        """
        from kbit.quantizers.mixed import Budget

        if self.size_bytes is not None:
            return Budget(nbytes=self.size_bytes)
        if self.max_kl is not None:
            return Budget(cost=self.max_kl)
        return Budget(bits=4.0 if self.bits is None else self.bits)

    @property
    def overrides(self) -> list[tuple[str, str]]:
        """--override as patterns of names and formats.

        Raises:
            UsageError: one is no pattern with a format.
        """
        return [_split_override(text) for text in self.override or ()]

    @property
    def size_bytes(self) -> int | None:
        """--size in bytes.

        Raises:
            UsageError: it is no size.
        """
        if self.size is None:
            return None
        found = parse_size(self.size)
        if found is None:
            raise UsageError(f"--size {self.size}: write a size such as 80MB or 1.5GB")
        return found

    def chosen_method(self, codec: Codec) -> Method:
        """The method, calibrated on what the flags say.

        Raises:
            UsageError: there is none of that name, or flags for a calibration that it does not do.
        """
        from kbit.calibration.request import CalibrationRequest
        from kbit.formats.nested import NestedFormat
        from kbit.formats.trellis import TrellisFormat
        from kbit.quantizers.calibrated import CalibratedRounding
        from kbit.quantizers.methods import get_method
        from kbit.quantizers.settings import ANCHOR, Nesting
        from kbit.quantizers.trellis import Trellis

        name = self.method
        if self.anchor is not None:
            check_anchor(self.anchor, codec, "--format" if self.format else "--plan" if self.plan_file else None)
        if name == "auto" and isinstance(codec, TrellisFormat):
            name = "trellis"
        elif name == "auto":
            name = "ldlq2" if self.device == "cpu" and get_method("ldlq2").refuses(codec) is None else "rtn"
            if name == "ldlq2" and self.inputs_only:
                name = "gptq"
        method = get_method(name, to_store=True)
        asked = {
            "--calibration": self.calibration,
            "--calibration-tokens": self.calibration_tokens,
            "--inputs-only": self.inputs_only,
        }
        if isinstance(method, CalibratedRounding):
            if self.device != "cpu" and not isinstance(method, Trellis):
                raise UsageError(
                    f"--device {self.device}: rounds to nearest, or searches for trellis codes; use --method rtn, "
                    "--method trellis, or --device cpu"
                )
            method = method.with_options(**self.options)
            if any(asked.values()):
                texts, gradients = self.calibration or [], not self.inputs_only
                method = method.calibrated_on(CalibrationRequest.of(texts, self.calibration_tokens, gradients))
            if isinstance(codec, NestedFormat):
                method = method.nested(Nesting.of(codec.low, codec.bits, self.anchor or ANCHOR, mixed=not self.uniform))
            return method
        asked |= {"--act-order": self.act_order, "--static-scales": self.static_scales, "--anchor": self.anchor}
        flag = next((flag for flag, value in asked.items() if value), None)
        if flag is not None:
            raise UsageError(f"{flag}: method {name} does not calibrate; use --method ldlq2")
        return method

    def check(self) -> None:
        """Look for mistakes that show before the model is opened.

        Raises:
            UsageError: a flag is out of range.
            UnsupportedError: --device cuda where there is no GPU.
        """
        from kbit.formats.quant_format import MAX_BITS, MIN_BITS

        if not 0 < self.shard_size <= _MAX_SHARD_GB:
            raise UsageError(f"--shard-size {self.shard_size}: use a size in GB, above 0 and at most {_MAX_SHARD_GB}")
        _ = self.seconds, self.size_bytes, self.overrides
        bits = self.embedding_bits
        if bits is not None and bits != 16 and not MIN_BITS <= bits <= MAX_BITS:
            raise UsageError(f"--embedding-bits {bits}: use {MIN_BITS} to {MAX_BITS}, or 16 to keep them")
        if self.device not in ("cpu", "cuda"):
            raise UsageError(f"--device {self.device}: use cpu or cuda")
        if self.device == "cuda":
            from kbit.backends.select import select_backend

            select_backend("cuda")

    def plan(
        self,
        source: CheckpointSource,
        codec: Codec,
        method: Method,
        formats: Mapping[str, Codec | str] | None = None,
        progress: Progress | None = None,
    ) -> Plan:
        """What becomes of every tensor.

        How many weights are kept apart is looked for in the weights, but in a dry run of a model that is not
        calibrated, and where a plan file says it.

        Args:
            formats: of mixed widths or a plan file, by the matrix's name; --override wins over them.
            progress: told of weights that are read.
        """
        from kbit.quantizers.calibrated import CalibratedRounding
        from kbit.quantizers.outlier_counts import with_outliers
        from kbit.quantizers.plan import make_plan

        calibrated = isinstance(method, CalibratedRounding)
        plan = make_plan(
            source,
            codec,
            embedding_bits=self.embedding_bits or (EMBEDDING_BITS if calibrated else None),
            formats=formats,
            overrides=self.overrides,
            shard_bytes=int(self.shard_size * 1e9),
            method=method,
        )
        dry = self.dry_run and self.save_plan is None
        known = isinstance(method, CalibratedRounding) and method.is_calibrated(source)
        if self.plan_file or (dry and not known):
            return plan
        # A format of planes that is named is what others read, too (`kbit export`); a trellis is read by kbit alone.
        named = self.format or any(name != "bits" for name in self.format_fields)
        chosen = not named and formats is None
        fixed = self.fixed(plan)
        return with_outliers(source, plan, method, planes=chosen, fixed=fixed, progress=progress)


def _with_fast_window(format: Codec) -> Codec | None:
    """The trellis with the windows of --fast; None: it is none, or has no windows, or no shorter ones."""
    from kbit.formats.trellis import TrellisFormat

    if not isinstance(format, TrellisFormat):
        return None
    fast = format.with_short_windows()
    return None if fast == format else fast


def _split_override(text: str) -> tuple[str, str]:
    pattern, equals, format = text.rpartition("=")
    if not equals:
        raise UsageError(f"--override {text!r}: write PATTERN=FORMAT, for example '*.down_proj.weight=int8-b64'")
    return pattern, format
