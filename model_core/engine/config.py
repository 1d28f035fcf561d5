"""How an engine is set up: every number a person may choose, and what "auto" becomes."""

from __future__ import annotations

from dataclasses import dataclass, field

from model_core.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
CALIBRATIONS = ("auto", "off", "again")


@dataclass(frozen=True)
class EngineConfig:
    """Settings of one engine (one model on one device).

    Attributes:
        device: "auto" is CUDA where there is a GPU, else the CPU.
        dtype: of weights, activations and KV cache; "auto" is bfloat16 on CUDA and float32 on the CPU (few CPUs have
            bfloat16 arithmetic: prefill is four times slower with it there, see the README).
        page_size: tokens per KV page, a power of two from 8 to 256.
        kv_cache_bytes: bytes of the KV pool; None takes what is left of `gpu_memory_fraction` on a GPU, and on the
            CPU a quarter of the available memory, at most 2 GiB.
        gpu_memory_fraction: share of the GPU's memory that this engine may use in total.
        max_seqs: sequences computed at once (slots); None is 256 on CUDA, 32 on the CPU.
        max_batch_tokens: token budget of one step; None is 4096 on CUDA, 256 on the CPU.
        context_length: longest prompt + output; None is the model's own, reduced to what the pool can hold.
        prefix_cache: keep pages of finished prompts for requests that begin the same way.
        kernels: implementation by op name, e.g. {"rmsnorm": "torch"}; "default" for all ops.
        cuda_graphs: steps on a GPU are captured graphs; False launches every op by itself (for debugging).
        capture_at_start: capture all graphs before the engine is ready instead of when it is idle or needs them.
        pdl: chain the launches inside decode graphs (Hopper); without it tokens are the same bits, later.
        calibration: which kernel computes each product of a decode step on a GPU. "auto" takes what was measured there
            before, and measures (half a minute) if nothing was; "again" measures now; "off" takes dispatch/tiles.py's defaults.
        deterministic: a greedy or seeded request gets the same bits whatever else is computed, however its prompt is divided,
            and whether its prefix was cached or it was preempted. Slower: no decode graphs, one product kernel for all
            numbers of rows, log-probabilities and cuts row by row.
        threads: CPU threads of torch; None leaves torch's choice.
        seed: base of the seeds given to requests that bring none.
    """

    device: str = "auto"
    dtype: str = "auto"
    page_size: int = 16
    kv_cache_bytes: int | None = None
    gpu_memory_fraction: float = 0.9
    max_seqs: int | None = None
    max_batch_tokens: int | None = None
    context_length: int | None = None
    prefix_cache: bool = True
    kernels: dict[str, str] = field(default_factory=dict)
    cuda_graphs: bool = True
    capture_at_start: bool = False
    pdl: bool = True
    calibration: str = "auto"
    deterministic: bool = False
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ConfigError(f"device must be one of {', '.join(DEVICES)}, got {self.device!r}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.calibration not in CALIBRATIONS:
            raise ConfigError(f"calibration must be one of {', '.join(CALIBRATIONS)}, got {self.calibration!r}")
        if self.page_size not in (8, 16, 32, 64, 128, 256):
            raise ConfigError(f"page_size must be a power of two from 8 to 256, got {self.page_size}")
        if not 0.05 <= self.gpu_memory_fraction <= 0.99:
            raise ConfigError(f"gpu_memory_fraction must be from 0.05 to 0.99, got {self.gpu_memory_fraction}")
        # a prompt and its answer have a token each; torch crashes at a number of threads that the system does not give it
        least, most = {"context_length": 2}, {"threads": 1024}
        for name in ("kv_cache_bytes", "max_seqs", "max_batch_tokens", "context_length", "threads"):
            value = getattr(self, name)
            if value is not None and value < least.get(name, 1):
                raise ConfigError(f"{name} must be at least {least.get(name, 1)}, got {value}")
            if value is not None and value > most.get(name, value):
                raise ConfigError(f"{name} must be at most {most[name]}, got {value}")
