"""The steps of `--optimize`: what makes a pipeline's UNet faster or smaller without another model, and undoes itself.

diffusion-fast's ladder (bf16, sdpa, compile, qkv, int8), with or without students, and three more steps. They are
taken in the order of config.OPTIMIZATIONS whatever the order they were named in.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sd_hyena.errors import BadInput
from sd_hyena.large.adapters import loaded
from sd_hyena.large.around import replaced
from sd_hyena.options.generate_config import OPTIMIZATIONS
from sd_hyena.students.student import cast

SHAPES = 64  # sizes, batches and kinds of block that one compiled function may meet


def check_optimize(steps: Iterable[str], device: torch.device) -> None:
    """Raise BadInput for a step that this device or installation cannot take, before any model is loaded."""
    if {"compile", "graphs"} <= set(steps):
        raise BadInput("optimize=graphs compiles the UNet whole and compile its blocks; leave one of them out")
    for step in steps:
        if why := _hindrance(step, device):
            raise BadInput(f"optimize={step} {why}")


def _hindrance(step: str, device: torch.device) -> str:
    if step == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return (
            f"needs a GPU that computes in bfloat16, which {torch.cuda.get_device_name(device)} does not; leave it out"
        )
    if step == "graphs" and device.type != "cuda":
        return f"records what a GPU is given to do; device={device} has no such launches; leave it out"
    if step in ("compile", "graphs"):
        return _missing_compiler(device)
    if step == "int8" and importlib.util.find_spec("torchao") is None:
        return "needs torchao: pip install 'sd_hyena[optimize]'"
    if step == "int8" and device.type not in ("cpu", "cuda"):
        return f"has no kernels on device={device}; leave it out"
    return ""


def _missing_compiler(device: torch.device) -> str:
    """Why torch.compile cannot work here; empty if it can."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "needs triton, which this build of PyTorch came without"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return f"needs a C++ compiler for device={device}, and none was found; install g++, or leave it out"
    return ""


@contextmanager
def optimized(unet: nn.Module, steps: Iterable[str], students: Iterable[nn.Module] = ()) -> Iterator[nn.Module]:
    """Within the block, a UNet computes as `steps` say, and so do students that will be swapped in; yields the UNet.

    Afterwards, also after an exception, weights, modules and processors are the very same objects again. Raises BadInput.
    Checks of the device are `check_optimize`'s.
    """
    steps, students = set(steps), list(students)
    if unknown := steps - set(OPTIMIZATIONS):
        raise BadInput(f"optimize={sorted(unknown)[0]!r} is none of {', '.join(OPTIMIZATIONS)}")
    if steps & {"qkv", "int8"} and loaded([unet]):
        raise BadInput("optimize=qkv and int8 replace the weights that a LoRA changes; leave them out, or the LoRA")
    ladder: dict[str, Callable[[], Any]] = {
        "bf16": lambda: _bfloat16(unet, students),
        "channels_last": lambda: _channels_last(unet),
        "sdpa": lambda: _fused_kernels(unet),
        "qkv": lambda: _fused_projections(unet),
        "int8": lambda: _int8(unet),
        "halves": lambda: _halves(unet),
        "compile": lambda: _compiled(unet, students),
        "graphs": lambda: _graphed(unet),
    }
    with ExitStack() as stack:
        for step in OPTIMIZATIONS:
            if step in steps:
                stack.enter_context(ladder[step]())
        yield unet


@contextmanager
def _weights_kept(*modules: nn.Module) -> Iterator[None]:
    """What happens to weights within the block, in place or by replacement, is undone."""
    owners = [owner for module in modules for owner in module.modules()]
    kept = [(owner._parameters, dict(owner._parameters)) for owner in owners]
    kept += [(owner._buffers, dict(owner._buffers)) for owner in owners]
    data = [(weight, weight.data) for _, weights in kept for weight in weights.values() if weight is not None]
    try:
        yield
    finally:
        for weight, was in data:
            weight.data = was
        for now, was in kept:
            now.clear()
            now.update(was)


@contextmanager
def _bfloat16(unet: nn.Module, students: list[nn.Module]) -> Iterator[None]:
    """The original weights wait beside the rounded ones; `--dtype` alone would not come back."""
    with _weights_kept(unet, *students):
        for module in (unet, *students):  # not `unet.to`: a student's implicit filters stay in float32
            cast(module, next(unet.parameters()).to(torch.bfloat16))
        given = unet.forward

        @functools.wraps(given)
        def forward(sample: Tensor, *args, **kwargs) -> Any:
            args, kwargs = pytree.tree_map(_to_bfloat16, (args, kwargs))
            answer = given(sample.to(torch.bfloat16), *args, **kwargs)
            return pytree.tree_map(lambda t: t.to(sample.dtype) if isinstance(t, Tensor) else t, answer)

        with replaced(unet, "forward", forward):
            yield


def _to_bfloat16(value: Any) -> Any:
    """Activations alone: a timestep stays what it is."""
    floating = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
    return value.to(torch.bfloat16) if floating else value


@contextmanager
def _channels_last(unet: nn.Module) -> Iterator[None]:
    with _weights_kept(unet):
        unet.to(memory_format=torch.channels_last)
        yield


def _attentions(unet: nn.Module) -> list[nn.Module]:
    """Those that have not been swapped out."""
    from diffusers.models.attention_processor import Attention

    return [module for module in unet.modules() if isinstance(module, Attention)]


@contextmanager
def _processor(attention: nn.Module, processor: Any) -> Iterator[None]:
    """One attention's processor, by the module: a swap changes how many there are, and diffusers counts them."""
    before = attention.processor
    attention.set_processor(processor)
    try:
        yield
    finally:
        attention.set_processor(before)


@contextmanager
def _fused_kernels(unet: nn.Module) -> Iterator[None]:
    from diffusers.models.attention_processor import AttnProcessor2_0

    with ExitStack() as stack:
        for attention in _attentions(unet):
            stack.enter_context(_processor(attention, AttnProcessor2_0()))
        yield


@contextmanager
def _fused_projections(unet: nn.Module) -> Iterator[None]:
    """One product for q, k and v (of cross-attention: k and v)."""
    from diffusers.models.attention_processor import FusedAttnProcessor2_0

    with ExitStack() as stack:
        for attention in _attentions(unet):
            stack.callback(_unfused, attention, attention.fused_projections)
            attention.fuse_projections()
            stack.enter_context(_processor(attention, FusedAttnProcessor2_0()))
        yield


def _unfused(attention: nn.Module, before: bool) -> None:
    for name in () if before else ("to_qkv", "to_kv"):
        attention._modules.pop(name, None)
    attention.fused_projections = before


@contextmanager
def _int8(unet: nn.Module) -> Iterator[None]:
    """Weights of 8 bits, activations rounded to 8 bits row by row; of the linear layers in the transformer blocks."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    inside = lambda module, name: isinstance(module, nn.Linear) and ".transformer_blocks." in name
    with _weights_kept(unet), ExitStack() as stack:
        for name, module in unet.named_modules():
            if inside(module, name):
                stack.callback(vars(module).pop, "extra_repr", None)  # torchao's, of the new weights
        quantize_(unet, Int8DynamicActivationInt8WeightConfig(), filter_fn=inside)
        yield


@contextmanager
def _halves(unet: nn.Module) -> Iterator[None]:
    """The UNet's batch, the two sides of guidance in it, in two calls: half the memory of its activations."""
    given = unet.forward

    @functools.wraps(given)
    def forward(sample: Tensor, *args, **kwargs) -> Any:
        batch = len(sample)
        if batch < 2:
            return given(sample, *args, **kwargs)

        def part(rows: slice) -> Any:
            cut = lambda t: t[rows] if isinstance(t, Tensor) and t.ndim and len(t) == batch else t
            return given(*pytree.tree_map(cut, (sample, *args)), **pytree.tree_map(cut, kwargs))

        first, second = part(slice(0, batch // 2)), part(slice(batch // 2, batch))
        return pytree.tree_map(lambda a, b: torch.cat([a, b]) if isinstance(a, Tensor) else a, first, second)

    with replaced(unet, "forward", forward):
        yield


@contextmanager
def _for_many_shapes() -> Iterator[None]:
    """A compiler that takes all that one drawing meets, and does not warn that it looks behind a cache: what is kept there
    follows from its argument alone."""
    with torch._dynamo.config.patch(recompile_limit=SHAPES), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        yield


@contextmanager
def _compiled(unet: nn.Module, students: list[nn.Module]) -> Iterator[None]:
    """The repeated blocks, each kind once, and the students whole; diffusers' `compile_repeated_blocks` with an end."""
    with ExitStack() as stack:
        stack.enter_context(_for_many_shapes())
        blocks = [module for module in unet.modules() if type(module).__name__ in unet._repeated_blocks]
        for module in blocks:
            compiled = torch.compile(module._call_impl, dynamic=False)
            stack.enter_context(replaced(module, "_compiled_call_impl", compiled))
        for student in students:
            compiled = torch.compile(student._call_impl, dynamic=False, fullgraph=True)
            stack.enter_context(replaced(student, "_compiled_call_impl", compiled))
        yield


@contextmanager
def _graphed(unet: nn.Module) -> Iterator[None]:
    """The UNet whole, its launches recorded once for each shape and replayed."""
    with ExitStack() as stack:
        stack.enter_context(_for_many_shapes())
        compiled = torch.compile(unet.forward, dynamic=False, mode="reduce-overhead")

        @functools.wraps(unet.forward)
        def forward(*args, **kwargs) -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            answer = compiled(*args, **kwargs)  # lies in memory that the next replay writes to, and samplers look back
            return pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, answer)

        stack.enter_context(replaced(unet, "forward", forward))
        yield
