"""`atelier info`: what the server is and whether it is ready."""

from __future__ import annotations

from dataclasses import asdict

import typer

from atelier.cli import flags, output
from atelier.cli.connection import connect


def info(*, server: flags.Server = flags.DEFAULT_SERVER, json: flags.Json = False) -> None:
    """Describe the server; exit 0 only when its worker is ready."""
    with connect(server) as client:
        told = client.server_info()
    if json:
        output.print_json(output.record(told))
    else:
        base, device, slots = told.base_model, told.device, told.slots
        output.out(f"{server}: {'ready' if told.ready else f'not ready: {told.message}'}")
        output.out(f"base     {base.reference or '-'} ({base.family}), {base.num_parameters / 1e6:.1f} M")
        output.out(f"pictures {base.native_width} x {base.native_height}, scheduler {base.default_scheduler}")
        dtype = f"{device.dtype}{f' ({base.quantization} weights)' if base.quantization else ''}"
        output.out(f"device   {device.name} {dtype}, {device.description}")
        ways = (base.training_methods, base.training_optimizers, base.training_precisions)
        output.out(f"teaches  {'; '.join(', '.join(way) for way in ways if way) or 'nothing'}")
        output.out(f"slots    {slots.used} of {slots.total}: {', '.join(slots.adapters) or '-'}")
        quotas = {name: value for name, value in asdict(told.quotas).items() if value is not None}
        bounds = ", ".join(f"{name} {value}" for name, value in quotas.items())
        output.out(f"tenant   {told.tenant or '-'}, {bounds or 'no quotas'}")
        if told.controlnets:
            output.out(f"controls {', '.join(net.name for net in told.controlnets)}")
        output.out(f"restarts {told.worker_restarts}")
        output.out(f"versions {', '.join(f'{name} {number}' for name, number in told.versions.items())}")
    if not told.ready:
        raise typer.Exit(1)
