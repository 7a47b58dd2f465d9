"""SD 1.5 at 512 and SDXL at 1024 pixels, real widths with random weights, on a CUDA GPU.

    python -m benchmarks gpu --family sd15 --out FOLDER
    python -m benchmarks gpu --family sdxl --parts pictures forward

Every row is written as soon as it is there, so that a run that is cut off leaves what it has measured.
"""

from __future__ import annotations

import argparse
import gc
import io
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from atelier_server.adapters.exporter import write_adapter
from atelier_server.core import ROW_BUCKETS, AdapterUse
from atelier_server.diffusion.compiling import compile_blocks
from benchmarks import harness
from benchmarks.bases import PROMPTS, random_adapter
from benchmarks.desk import Desk, job
from benchmarks.harness import RESULTS, Row, take_turns
from benchmarks.real_bases import BASES, RealBase, dtype_on

PARTS = ("pictures", "forward", "compiled", "compiled_peer")
_REQUESTS = 8
_RANK = 16
_PEAK = 989.0  # TFLOP/s, dense bfloat16: NVIDIA's data sheets of H100 SXM and H200
_Rows = list[list[tuple[int, float]]]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--family", choices=tuple(BASES), nargs="*", default=tuple(BASES))
    parser.add_argument("--parts", choices=PARTS, nargs="*", default=PARTS)
    parser.add_argument("--out", type=Path, help="a folder for the results instead of benchmarks/results/gpu")
    parser.add_argument("--pairs", type=int, default=2, help="of pictures; forwards are cheap and many")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="tiny widths, on the CPU where there is no GPU")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not chosen.quick:
        print("gpu: skipped, torch finds no CUDA GPU here", flush=True)
        return 0
    diffusers.utils.logging.set_verbosity_error()  # it warns of every file without text encoders
    missed = False
    for name in chosen.family:
        with tempfile.TemporaryDirectory() as folder:
            measured = RealSize(BASES[name], Path(folder), chosen)
            measured.run()
            missed |= measured.failed or any(row.met is False for row in measured.rows)
        gc.collect()
        torch.cuda.empty_cache()
    return 1 if missed else 0


class RealSize:
    """One base, on both sides; `rows` are what has been measured so far."""

    def __init__(self, base: RealBase, root: Path, chosen: argparse.Namespace) -> None:
        self.rows: list[Row] = []
        self.failed = False
        self._base, self._root, self._quick = base, root, bool(chosen.quick)
        self._parts: tuple[str, ...] = tuple(chosen.parts)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._dtype = dtype_on(self._device)
        self._steps: int = 2 if self._quick else chosen.steps
        self._pairs: int = 1 if self._quick else chosen.pairs
        self._forwards = 1 if self._quick else 15
        self._pixels = 64 if self._quick else base.pixels
        # A quick run says nothing of anything: it is kept only where it is asked for.
        self._out: Path | None = chosen.out or (None if self._quick else RESULTS / "gpu")
        self._name = "_".join((base.name, *(p for p in self._parts if self._parts != PARTS)))
        self._told = count()  # no prompt comes twice: ours keeps what it has heard
        self._sequential: list[float] = []  # images/s of the peer, one picture after the other

    def run(self) -> None:
        began = perf_counter()
        self._prepare()
        if "pictures" in self._parts:
            self._attempt(self._pictures)
        if "forward" in self._parts:
            self._attempt(self._residents)
        self._attempt(self._fuse)
        if "forward" in self._parts:
            self._attempt(self._forward)
        if "compiled" in self._parts or "compiled_peer" in self._parts:
            self._attempt(self._compile)
        if "compiled" in self._parts:
            for measure in (self._compiled_pictures, self._recompilations, self._compiled_forward):
                self._attempt(measure)
        if "compiled_peer" in self._parts:
            self._attempt(self._compiled_peer)
        harness.report(self._name, self.rows, keep=False)
        peak = torch.cuda.max_memory_allocated() / 2**30 if self._device == "cuda" else 0.0
        print(f"{self._base.name}: {perf_counter() - began:.1f} s, {peak:.1f} GiB at the peak", flush=True)

    def _attempt(self, measure: Callable[[], None]) -> None:
        """What goes wrong in one measurement is told, and the others follow."""
        try:
            with self._phase(measure.__name__.strip("_")):
                measure()
        except Exception:
            self.failed = True
            traceback.print_exc()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()
        before = perf_counter()
        yield
        print(f"{self._base.name}: {name} took {perf_counter() - before:.1f} s", flush=True)

    def _add(
        self,
        case: str,
        unit: str,
        samples: dict[str, list[float]],
        target: str | None,
        ratio: Callable[[float, float], float],
    ) -> None:
        one = harness.row(
            f"{self._base.title}: {case}", unit, samples, None if self._quick else target, ratio=ratio
        )
        self.rows.append(one)
        print(f"{one.case}: {one.ours:.4g} / {one.peer:.4g} {unit}, ratio {one.ratio:.3f}", flush=True)
        if self._out is not None:
            harness.write(self._name, self.rows, self._out)

    # ------------------------------------------------------------------------------------ the two sides
    def _prepare(self) -> None:
        with self._phase("making and saving the base"):
            folder = self._base.save(self._root / "base", self._device, tiny=self._quick)
        with self._phase("loading ours"):
            self._desk = Desk(str(folder), self._root / "data", device=self._device)
        with self._phase("making adapters"):
            (self._root / "files").mkdir()
            self._files = [self._root / "files" / f"subject{i}.safetensors" for i in range(_REQUESTS)]
            for seed, file in enumerate(self._files):
                adapter = random_adapter(self._unet, seed, rank=_RANK, dtype=self._dtype, size=0.05)
                write_adapter(adapter, file)
        with self._phase("publishing adapters"):
            self._uses = self._desk.publish(self._files)
        with self._phase("loading the peer"):
            self._peer: Any = self._base.peer(folder, self._device)
            for file in self._files:
                self._load_peer(file, file.stem)
        lora = next(p for name, p in self._peer.unet.named_parameters() if "lora_A" in name)
        assert lora.dtype == self._dtype, lora.dtype  # float32 would be slower than it has to be
        assert str(lora.device).startswith(self._device)

    @property
    def _unet(self) -> Any:
        return self._desk.runner.base.unet

    def _load_peer(self, file: Path, name: str, *, hotswap: bool = False) -> None:
        self._peer.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name, hotswap=hotswap)

    def _prompts(self) -> list[str]:
        return [f"{PROMPTS[i % len(PROMPTS)]}, {next(self._told)}" for i in range(_REQUESTS)]

    def _paint(self, steps: int) -> float:
        """images/s of ours: text encoding, decoding and PNG included."""
        jobs = [
            replace(
                job(f"r{i}", prompt, use, steps=steps, seed=i),
                width=self._pixels,
                height=self._pixels,
                scheduler=self._base.scheduler,
            )
            for i, (prompt, use) in enumerate(zip(self._prompts(), self._uses, strict=True))
        ]
        return _REQUESTS / self._seconds(lambda: self._desk.generate(jobs))

    def _paint_one_by_one(
        self, steps: int, switch: Callable[[Path], None], pictures: int = _REQUESTS
    ) -> float:
        """images/s of diffusers' pipeline, with the same included."""

        def paint() -> None:
            for i, (prompt, file) in enumerate(zip(self._prompts()[:pictures], self._files, strict=False)):
                switch(file)
                picture = self._peer(
                    prompt,
                    num_inference_steps=steps,
                    guidance_scale=5.0,
                    height=self._pixels,
                    width=self._pixels,
                    generator=torch.Generator("cpu").manual_seed(i),
                ).images[0]
                picture.save(io.BytesIO(), "PNG")

        return pictures / self._seconds(paint)

    def _select(self, file: Path) -> None:
        self._peer.set_adapters(file.stem)

    def _hotswap(self, file: Path) -> None:
        self._load_peer(file, "swapped", hotswap=True)

    def _seconds(self, work: Callable[[], object]) -> float:
        self._wait()
        before = perf_counter()
        work()
        self._wait()
        return perf_counter() - before

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    # ------------------------------------------------------------------------------------------ pictures
    def _pictures(self) -> None:
        flops = self._flops()
        self._paint(2)
        self._paint_one_by_one(2, self._select, pictures=2)
        samples = take_turns(
            lambda: self._paint(self._steps),
            lambda: self._paint_one_by_one(self._steps, self._select),
            self._pairs,
        )
        self._sequential = samples["peer"]
        case = f"{_REQUESTS} requests, {_REQUESTS} adapters, {self._steps} steps, as served"
        peer = "diffusers, set_adapters between pictures"
        self._add(f"{case}; peer: {peer}", "images/s", samples, self._base.target, _more)
        self._limits("as served", samples["ours"], flops)

    def _flops(self) -> float:
        """Of the U-Net in one step of a guided picture, without adapters."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self._unet(**self._inputs(2), return_dict=False)
        flops = float(counter.get_total_flops())
        print(f"{self._base.name}: {flops / 1e12:.3f} TFLOP a guided step", flush=True)
        return flops

    def _limits(self, how: str, images_per_second: Sequence[float], flops: float) -> None:
        """Controls: the share of the peak, and seconds a picture against what arithmetic allows."""
        achieved = [rate * self._steps * flops / 1e12 for rate in images_per_second]
        samples = {"ours": achieved, "peer": [_PEAK] * len(achieved)}
        self._add(
            f"the U-Net's arithmetic over all seconds, {how}; peer: peak", "TFLOP/s", samples, None, _more
        )
        seconds = [1 / rate for rate in images_per_second]
        samples = {"ours": seconds, "peer": [self._base.limit * self._steps / 30] * len(seconds)}
        self._add(f"a picture, {how}; peer: limit at 790 TFLOP/s", "s", samples, None, _less)

    # ------------------------------------------------------------------------------------------ forwards
    def _inputs(self, rows: int, side: int | None = None) -> dict[str, Any]:
        """Arguments of the U-Net's forward: latents of `side`, a text of 77 tokens."""
        config = self._unet.config
        side = side or self._pixels // 8
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(rows, *shape, generator=generator).to(self._device, self._dtype)

        inputs: dict[str, Any] = {
            "sample": noise(config.in_channels, side, side),
            "timestep": torch.linspace(900, 100, rows, device=self._device),
            "encoder_hidden_states": noise(77, config.cross_attention_dim),
            "added_cond_kwargs": {},
        }
        if self._base.extended:
            width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            sizes = torch.tensor([[self._pixels, self._pixels, 0, 0, self._pixels, self._pixels]])
            times = sizes.expand(rows, -1).to(self._device, self._dtype)
            inputs["added_cond_kwargs"] = {"text_embeds": noise(width), "time_ids": times}
        return inputs

    @torch.no_grad()
    def _ours(self, rows: _Rows, inputs: dict[str, Any]) -> Tensor:
        """As the loop does it: gathered anew only when the batch has changed."""
        with self._desk.runner.bank.use(self._desk.runner.gather(rows)):
            return self._unet(**inputs, return_dict=False)[0]  # type: ignore[no-any-return]

    @torch.no_grad()
    def _theirs(self, inputs: dict[str, Any]) -> Tensor:
        return self._peer.unet(**inputs, return_dict=False)[0]  # type: ignore[no-any-return]

    def _residents(self) -> None:
        """Another adapter that is there already, up to the end of one forward of a guided picture."""
        self._fill_slots(self._uses)
        inputs, turn = self._inputs(2), count()

        def ours() -> float:
            slot = next(turn) % _REQUESTS + 1
            return self._seconds(lambda: self._ours([[(slot, 1.0)]] * 2, inputs))

        def peer() -> float:
            file = self._files[next(turn) % _REQUESTS]

            def switched() -> None:
                self._select(file)
                self._theirs(inputs)

            return self._seconds(switched)

        ours(), peer()
        samples = take_turns(ours, peer, min(5, self._forwards))
        self._add("another resident adapter and a forward; peer: set_adapters", "s", samples, None, _faster)

    def _fill_slots(self, uses: Sequence[AdapterUse]) -> None:
        for slot, use in enumerate(uses, start=1):
            self._desk.runner.load(use, slot)

    def _fuse(self) -> None:
        """From here on the peer's weights are those of the first adapter."""
        self._peer.unload_lora_weights()
        self._load_peer(self._files[0], "fused")
        self._peer.fuse_lora()
        self._peer.unload_lora_weights()

    def _forward(self) -> None:
        self._compare("eager")

    def _compiled_forward(self) -> None:
        with self._phase("compiling the fused peer"):
            self._peer.unet.compile_repeated_blocks(fullgraph=True)
            self._theirs(self._inputs(2 * _REQUESTS))
        self._compare("both compiled")

    def _compare(self, how: str) -> None:
        """A guided forward with every adapter against one on fused weights, of the first adapter."""
        self._fill_slots(self._uses)
        inputs = self._inputs(2 * _REQUESTS)
        theirs = self._theirs(inputs).float()
        first: _Rows = [[(1, 1.0)]] * (2 * _REQUESTS)
        none: _Rows = [[]] * (2 * _REQUESTS)
        same, plain = (
            (self._ours(rows, inputs).float() - theirs).norm().item() / theirs.norm().item()
            for rows in (first, none)
        )
        print(f"{self._base.name}: off by {same:.2g} of the norm, {plain:.2g} without adapter", flush=True)
        # Roundings of bfloat16 in every layer; an adapter that is not heard would be off by much more.
        if not same < min(0.05, plain / 2):
            raise RuntimeError(f"the two sides compute different things: {same:.3g}, unadapted {plain:.3g}")
        mixed = [[(slot, 1.0)] for slot in range(1, _REQUESTS + 1) for _ in range(2)]
        samples = harness.interleave(
            lambda: self._seconds(lambda: self._ours(mixed, inputs)),
            lambda: self._seconds(lambda: self._theirs(inputs)),
            self._forwards,
        )
        case = f"a forward of {2 * _REQUESTS} rows with {_REQUESTS} adapters, {how}; peer: one, fused"
        self._add(case, "s", samples, "<= 1.10", _less)

    # ------------------------------------------------------------------------------------------ compiled
    def _compile(self) -> None:
        """What `compile` in the worker's settings does to the same runner, and the first pictures."""
        compile_blocks(self._unet)
        self._paint(2)

    def _compiled_pictures(self) -> None:
        rates = [self._paint(self._steps) for _ in range(self._pairs)]
        case = f"{_REQUESTS} requests, {_REQUESTS} adapters, {self._steps} steps, compiled"
        if self._sequential:
            samples = {"ours": rates, "peer": self._sequential}
            told = f"{case}; peer: diffusers as above, its very samples"
            self._add(told, "images/s", samples, self._base.target, _more)
        with torch.compiler.set_stance("force_eager"):
            flops = self._flops()
        self._limits("compiled", rates, flops)

    def _recompilations(self) -> None:
        """Swaps of rank and content, in every bucket and two sizes: all meet graphs that are there."""
        bank, random = self._desk.runner.bank, Random(0)
        adapters = [random_adapter(self._unet, rank, rank=rank, dtype=self._dtype) for rank in (4, 8, _RANK)]
        sides = (self._pixels // 16, self._pixels // 32) if not self._quick else (8, 16)
        shown = {(rows, side): self._inputs(rows, side) for rows in ROW_BUCKETS for side in sides}
        self._fill_slots(self._uses)
        for inputs in shown.values():
            bucket = len(inputs["sample"])
            self._ours([[(1, 1.0)]] * bucket, inputs)
            self._ours([[(1, 0.5), (2, 0.7)]] * bucket, inputs)
        before = _graphs()
        assert before, "no compilation was counted at all"
        for _ in range(5 if self._quick else 100):
            slot = random.randint(1, _REQUESTS)
            bank.load(slot, random.choice(adapters))
            inputs = random.choice(list(shown.values()))
            rows: _Rows = [[(random.randint(1, _REQUESTS), random.random())] for _ in inputs["sample"]]
            rows[0] = [(slot, 1.0), (slot % _REQUESTS + 1, 0.5)]
            self._ours(rows, inputs)
        again = float(_graphs() - before)
        print(f"{self._base.name}: {before} graphs, then {again:.0f} more", flush=True)
        samples = {"ours": [again], "peer": [0.0]}
        case = "graphs compiled in 100 swaps over all buckets, ranks 4 to 16, compositions; peer: none"
        self._add(case, "graphs", samples, "<= 0", lambda ours, peer: ours - peer)

    # ---------------------------------------------------------------------------- the peer, compiled too
    def _compiled_peer(self) -> None:
        """The documented way to swap adapters without compiling again; on weights that do not matter."""
        with self._phase("compiling the peer"):
            self._peer.unload_lora_weights()
            self._peer.enable_lora_hotswap(target_rank=_RANK)
            self._load_peer(self._files[0], "swapped")
            self._peer.unet.compile_repeated_blocks(fullgraph=True)
            self._paint_one_by_one(2, self._hotswap, pictures=2)
        samples = take_turns(
            lambda: self._paint(self._steps),
            lambda: self._paint_one_by_one(self._steps, self._hotswap),
            1,
        )
        case = f"{_REQUESTS} requests, {_REQUESTS} adapters, {self._steps} steps, both compiled"
        self._add(f"{case}; peer: diffusers, hotswap", "images/s", samples, None, _more)
        self._from_file()

    def _from_file(self) -> None:
        """An adapter out of its file, up to the end of one forward of a guided picture."""
        inputs, turn = self._inputs(2), count()

        def ours() -> None:
            self._desk.runner.load(self._uses[next(turn) % _REQUESTS], 1)
            self._ours([[(1, 1.0)]] * 2, inputs)

        def peer() -> None:
            self._hotswap(self._files[next(turn) % _REQUESTS])
            self._theirs(inputs)

        samples = harness.interleave(
            lambda: self._seconds(ours), lambda: self._seconds(peer), min(5, self._forwards)
        )
        case = "an adapter from its file and a forward, both compiled; peer: hotswap"
        self._add(case, "s", samples, None, _faster)


def _more(ours: float, peer: float) -> float:
    """Of rates."""
    return ours / peer


def _less(ours: float, peer: float) -> float:
    """Of seconds: how much ours takes of the peer's."""
    return ours / peer


def _faster(ours: float, peer: float) -> float:
    """Of seconds: how many times faster ours is."""
    return peer / ours


def _graphs() -> int:
    """Compiled so far in this process, as Dynamo counts them."""
    return int(counters["stats"]["unique_graphs"])
