"""Types of the compiled module (kernels/cpu/bind/module.cpp, bind_*.cpp)."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

_Bytes: TypeAlias = torch.Tensor | NDArray[np.uint8]

def pack_plane(codes: _Bytes, width: int, shift: int, plane: _Bytes) -> None: ...
def unpack_plane(plane: _Bytes, width: int, shift: int, first: bool, codes: _Bytes) -> None: ...
def unpack_stream(data: _Bytes, bits: int, codes: _Bytes) -> None: ...
def look_up_levels(
    codes: _Bytes, levels: NDArray[Any], block_of: NDArray[np.int32] | None, out: NDArray[Any]
) -> None: ...

_Table: TypeAlias = torch.Tensor | NDArray[np.float32]

def round_matrix(
    weights: _Table,
    correction: _Table | None,
    feedback: _Table | None,
    importance: _Table,
    levels: _Table,
    codes_of_levels: _Bytes,
    block: int,
    scale_type: str,
    asymmetric: bool,
    shares: _Table,
    given_scales: _Table | None,
    given_offsets: _Table | None,
    codes: _Bytes,
    scales: _Table,
    offsets: _Table | None,
    residual: _Table | None,
    blocks_of: _Table | None = None,
    isa: str = "",
) -> None: ...
def descend_rows(
    slopes: _Table,
    inputs: _Table,
    outputs: _Table,
    levels: _Table,
    codes_of_levels: _Bytes,
    block: int,
    scale_type: str,
    fixed_scales: bool,
    codes: _Bytes,
    scales: _Table,
    offsets: _Table | None,
    change: _Table,
    isa: str = "",
) -> None: ...
def descend_nested_rows(
    slopes: _Table,
    inputs: _Table,
    outputs: _Table,
    levels: Sequence[_Table],
    weights: Sequence[float],
    block: int,
    scales: _Table,
    codes: _Bytes,
    change: _Table,
    isa: str = "",
) -> None: ...
def trellis_search(
    numbers: _Table,
    values: _Table,
    bits: int,
    strings: _Bytes,
    context: Context,
    half: bool = False,
    columns: _Table | None = None,
    rows: _Table | None = None,
) -> None: ...
def instruction_sets() -> list[str]: ...
def emulated_sets() -> list[str]: ...
def compiled_sets() -> list[str]: ...

class Context:
    def __init__(self, isa: str | None = None, threads: int = 1) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def has_bf16(self) -> bool: ...
    @property
    def threads(self) -> int: ...

class Matrix:
    @staticmethod
    def quantized(
        planes: Sequence[NDArray[np.uint8]],
        bits: int,
        columns: int,
        block_size: int,
        scales: NDArray[Any],
        offsets: NDArray[Any] | None,
        scale_kind: str,
        codebook: NDArray[np.float32],
        context: Context,
        signs: NDArray[np.uint8] | None = None,
        mixed: int = 0,
        apart: bool = False,
    ) -> Matrix: ...
    @staticmethod
    def trellis(
        codes: NDArray[np.uint8],
        bits: int,
        code: str,
        window: int,
        columns: int,
        scales: NDArray[Any],
        signs: NDArray[np.uint8],
        mixed: int,
        context: Context,
        half: bool = False,
    ) -> Matrix: ...
    @staticmethod
    def dense(values: NDArray[Any], kind: str, context: Context) -> Matrix: ...
    def keep_apart(self, rows: NDArray[np.int32], columns: NDArray[np.int32], values: NDArray[np.float32]) -> None: ...
    def selection(self, panels: int) -> Matrix: ...
    def take(self, places: NDArray[np.int64], panels: NDArray[np.int64]) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def two_digits(self) -> bool: ...
    @property
    def rotated(self) -> bool: ...
    def shares_input(self, other: Matrix) -> bool: ...
    @property
    def nbytes(self) -> int: ...

class MappedFile:
    def __init__(self, path: str) -> None: ...
    @property
    def path(self) -> str: ...
    def __len__(self) -> int: ...
    def check(self) -> None: ...
    def prefetch(self, begin: int, end: int) -> None: ...
    def bytes(self, begin: int, end: int) -> NDArray[np.uint8]: ...

def describe_matrix(matrix: Matrix) -> dict[str, Any]: ...
def matrix_arrays(matrix: Matrix) -> list[NDArray[np.uint8]]: ...
def map_matrix(
    file: MappedFile,
    rows: int,
    columns: int,
    bits: int,
    block_size: int,
    kind: str,
    offsets: bool,
    begins: Sequence[int],
    code: str = "planes",
    window: int = 0,
    mixed: int = 0,
    apart: bool = False,
    half: bool = False,
    outliers: int = 0,
) -> Matrix: ...

class KVPages:
    def __init__(
        self,
        layers: int,
        kv_heads: int | Sequence[int],
        head_dim: int | Sequence[int],
        kind: str,
        count: int,
        latent: bool = False,
    ) -> None: ...
    @property
    def kind(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    def resize(self, count: int) -> None: ...
    def copy(self, source: int, target: int) -> None: ...
    def dump(self, page: int) -> bytes: ...
    def load(self, page: int, data: bytes) -> None: ...
    def dequantized(
        self, layer: int, table: NDArray[np.int32], length: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...

TILE_COLUMNS: int
ATTENTION_CHUNK: int
REDUNDANT_INPUT: int
THREAD_SCRATCH_BYTES: int

def matrix_bytes(
    rows: int, columns: int, bits: int, block_size: int, kind: str, offsets: bool, half: bool = False
) -> int: ...
def matrix_segment(block_size: int) -> int: ...
def attention_task_bytes(rows: int, head_dim: int) -> int: ...
def kv_page_bytes(
    layers: int, kv_heads: int | Sequence[int], head_dim: int | Sequence[int], kind: str, latent: bool = False
) -> int: ...

class Program:
    def __init__(self, context: Context, compute: str) -> None: ...
    def buffer(self, width: int) -> int: ...
    def given(self, out: int) -> None: ...
    def embed(self, matrix: Matrix, out: int, of: str = "tokens", first: int = 0) -> None: ...
    def matmul(
        self,
        x: int,
        matrices: Sequence[Matrix],
        biases: Sequence[NDArray[np.float32] | None],
        outs: Sequence[int],
        norm: NDArray[np.float32] | None,
        eps: float,
        activation: str | None,
        residual: int | None,
        norm_bias: NDArray[np.float32] | None = None,
        centred: bool = False,
    ) -> None: ...
    def norm(
        self,
        x: int,
        weight: NDArray[np.float32],
        eps: float,
        out: int,
        bias: NDArray[np.float32] | None = None,
        centred: bool = False,
        groups: int = 1,
    ) -> None: ...
    def add(self, x: int, y: int, out: int) -> None: ...
    def multiply(self, x: int, y: int, out: int) -> None: ...
    def map(self, x: int, out: int, factor: float = 1.0, cap: float = 0.0) -> None: ...
    def rotate(self, x: int, out: int, head_dim: int, first: int, half: int) -> None: ...
    def fit_heads(self, x: int, shared: int | None, out: int, heads: int) -> None: ...
    def activate(self, gate: int, up: int | None, kind: str, out: int) -> None: ...
    def attend(
        self,
        q: int,
        k: int | None,
        v: int | None,
        out: int,
        layer: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        window: int | None,
        rotary: bool = True,
        key_bias: NDArray[np.float32] | None = None,
        angles: tuple[int, int] | None = None,
        soft_cap: float = 0.0,
        sinks: NDArray[np.float32] | None = None,
        by_distance: NDArray[np.float32] | None = None,
        latent: bool = False,
        chunked: bool = False,
    ) -> None: ...
    def columns(self, x: int, out: int, first: int) -> None: ...
    def by_heads(self, x: int, matrix: Matrix, out: int, heads: int, first: int, backward: bool) -> None: ...
    def adapt(
        self, x: int, outs: Sequence[int], factors: Sequence[Sequence[tuple[Matrix, Matrix, float] | None]]
    ) -> None: ...
    def sigmoid_gate(self, x: int, gate: int, out: int) -> None: ...
    def experts(
        self,
        x: int,
        logits: int,
        out: int,
        gates: Sequence[Matrix],
        ups: Sequence[Matrix],
        downs: Sequence[Matrix],
        gate_biases: Sequence[NDArray[np.float32] | None],
        up_biases: Sequence[NDArray[np.float32] | None],
        down_biases: Sequence[NDArray[np.float32] | None],
        selection_bias: NDArray[np.float32] | None,
        chosen: int,
        score: str,
        normalise: bool,
        scale: float,
        groups: int,
        chosen_groups: int,
        activation: str,
        alpha: float = 1.0,
        limit: float = 0.0,
        best_of_group: bool = False,
        scales: NDArray[np.float32] | None = None,
        jitter: float = 0.0,
        scales_input: bool = False,
    ) -> None: ...
    def store_keys(self, k: int, v: int, layer: int, heads: int, kv_heads: int, head_dim: int) -> None: ...
    def cross_attend(
        self, q: int, out: int, layer: int, heads: int, kv_heads: int, head_dim: int, scale: float
    ) -> None: ...
    def recur(
        self,
        x: int,
        decay: int,
        write: int,
        log_rates: NDArray[np.float32],
        out: int,
        state: int,
        key_heads: int,
        heads: int,
        key_dim: int,
        value_dim: int,
    ) -> None: ...
    def scan(
        self,
        x: int,
        steps: int,
        log_rates: NDArray[np.float32],
        skips: NDArray[np.float32],
        out: int,
        state: int,
        groups: int,
        heads: int,
        key_dim: int,
        value_dim: int,
    ) -> None: ...
    def convolve(
        self,
        x: int,
        weight: NDArray[np.float32],
        out: int,
        state: int,
        width: int,
        bias: NDArray[np.float32] | None = None,
    ) -> None: ...
    def finish(self, hidden: int) -> None: ...
    def head(
        self,
        matrix: Matrix,
        norm: NDArray[np.float32] | None,
        eps: float,
        norm_bias: NDArray[np.float32] | None = None,
        centred: bool = False,
        factor: float = 1.0,
        cap: float = 0.0,
        bias: NDArray[np.float32] | None = None,
    ) -> None: ...
    def run(
        self,
        ids: NDArray[np.int64],
        sequence: NDArray[np.int32],
        positions: NDArray[np.int32],
        cos: NDArray[np.float32],
        sin: NDArray[np.float32],
        rope_row: NDArray[np.int32],
        pages: KVPages,
        tables: NDArray[np.int32],
        logits_rows: NDArray[np.int64] | None,
        out: NDArray[np.float32],
        last_seen: NDArray[np.int32] | None = None,
        encoder: tuple[KVPages, NDArray[np.int32], NDArray[np.int32]] | None = None,
        states: tuple[Sequence[NDArray[np.float32]], NDArray[np.int32], NDArray[np.int32]] | None = None,
        types: NDArray[np.int64] | None = None,
        features: NDArray[np.float32] | None = None,
        adapters: NDArray[np.int32] | None = None,
    ) -> None: ...
    def logits(self, hidden: NDArray[np.float32], out: NDArray[np.float32]) -> None: ...
    @property
    def nbytes(self) -> int: ...

def attention(
    context: Context,
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    positions: NDArray[np.int32],
    sequence: NDArray[np.int32],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    pages: KVPages,
    tables: NDArray[np.int32],
    layer: int,
    scale: float,
    window: int = 0,
    key_bias: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]: ...

class BytePairs:
    def __init__(
        self,
        texts: memoryview,
        ends: memoryview,
        token_slots: memoryview,
        merges: memoryview,
        merge_slots: memoryview,
        ignore_merges: bool,
    ) -> None: ...
    def __len__(self) -> int: ...
    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, token_id: int) -> str | None: ...
    def encode(self, ids: Sequence[int], words: Sequence[int | None]) -> list[int]: ...

def fill_token_slots(texts: memoryview, ends: memoryview, slots: memoryview) -> None: ...
def fill_merge_slots(merges: memoryview, slots: memoryview) -> None: ...
def simd_trace(isa: str, data: NDArray[np.uint8]) -> bytes: ...

class RowSampler:
    position: int
    def __init__(
        self,
        factor: float,
        top_k: int,
        top_p: float,
        min_score: float,
        typical_p: float,
        repetition_penalty: float,
        presence_penalty: float,
        frequency_penalty: float,
        bias_tokens: NDArray[np.int64],
        biases: NDArray[np.float32],
        seed: int,
        choice: int,
    ) -> None: ...
    def see(self, ids: NDArray[np.int64]) -> None: ...
    def copy(self) -> RowSampler: ...

def keyed_uniform(seed: int, choice: int, position: int) -> float: ...
def sample_rows(
    samplers: Sequence[RowSampler],
    logits: NDArray[np.float32],
    rows: NDArray[np.int64],
    masks: Sequence[NDArray[np.bool_] | None],
    tokens: NDArray[np.int64],
    best: NDArray[np.float32],
    isa: str = "",
) -> None: ...
def score_rows(
    logits: NDArray[np.float32],
    rows: NDArray[np.int64],
    best: NDArray[np.float32],
    totals: NDArray[np.float64],
    ids: NDArray[np.int64],
    values: NDArray[np.float32],
    isa: str = "",
) -> None: ...
