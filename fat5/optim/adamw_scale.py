"""AdamWScale: AdamW whose update is scaled by the parameter's own root mean square.

T5 is trained with Adafactor, whose step is relative to the size of the parameter; AdamW with one absolute step for
embeddings of size 1 and projections of size 0.01 does not train it well. AdamWScale takes that one thing over from
Adafactor. The formula is nanoT5's (Nawrot, 2023, https://github.com/PiotrNawrot/nanoT5, Apache-2.0), which is also what
the published FAT5 was trained with; with g the gradient, t the number of the update, and all of it per element:

    m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g²
    step = lr sqrt(1 - beta2^t) / (1 - beta1^t) max(min_rms, RMS(p))
    p <- p - step m / (sqrt(v) + eps)       p <- p - lr weight_decay p
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.optim import Optimizer

from fat5.optim.rounding import add_kahan_, add_stochastic_

Rounding = Literal["nearest", "kahan", "stochastic"]
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "kahan", "stochastic")

# Elements that are updated together: what bounds the memory of the intermediate results (256 MiB each in fp32).
_BUCKET = 2**26


class AdamWScale(Optimizer):
    """AdamW with the update scaled by the parameter's RMS; see the module for the formula.

    The moments are kept in fp32 (fp64 for fp64 parameters), whatever the parameters are in: a second moment in bf16
    never decays, since 0.999 v rounds back to v. Parameters may be `DTensor`s, sharded as FSDP2 does it: RMS is that of
    the whole parameter. Nothing is copied from the device to the host.

    Args:
        params: parameters or groups of them, floating point; groups may have values of their own for all that follows.
        lr: learning rate.
        betas: decay of the two moments, each from 0 up to, not including, 1.
        eps: added to the root of the second moment.
        weight_decay: decoupled from the gradient, relative to `lr`.
        min_rms: least RMS by which an update is scaled, so that a parameter that starts at 0 moves.
        rounding: how an update is added to a parameter in bf16: `nearest` (of bf16's eight bits; loses what is smaller
            than half of the last one), `kahan` (keeps what was lost beside the parameter, in bf16) or `stochastic` (up
            or down at random, right on average). In fp32 and fp64 it makes no difference.
        seed: of the random numbers of `stochastic`; with the update's number it decides all of them.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        min_rms: float = 1e-3,
        rounding: Rounding = "nearest",
        seed: int = 0,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("min_rms", min_rms)):
            if value < 0:
                raise ValueError(f"{name} must be 0 or more, not {value}")
        if eps <= 0:
            raise ValueError(f"eps must be above 0, not {eps}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be from 0 up to, not including, 1, not {betas}")
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, not {rounding!r}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "min_rms": min_rms}
        super().__init__(params, defaults | {"rounding": rounding, "seed": seed})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: computes the loss anew, as for every torch optimizer.

        Returns:
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            ready = [p for p in group["params"] if p.grad is not None]
            for bucket_number, bucket in enumerate(_buckets(ready)):
                for p in bucket:
                    if not self.state[p]:
                        self._start(p, group["rounding"])
                self._update(bucket, group, (group["seed"], number, bucket_number))
        return loss

    def _start(self, p: Tensor, rounding: str) -> None:
        state = self.state[p]
        precise = torch.promote_types(p.dtype, torch.float32)
        state["step"] = torch.zeros((), dtype=torch.float32)  # on the host, as torch's own AdamW keeps it
        state["exp_avg"] = torch.zeros_like(p, dtype=precise)
        state["exp_avg_sq"] = torch.zeros_like(p, dtype=precise)
        if rounding == "kahan" and p.dtype != precise:
            state["compensation"] = torch.zeros_like(p)

    def _update(self, bucket: list[Tensor], group: dict[str, Any], place: tuple[int, ...]) -> None:
        states = [self.state[p] for p in bucket]
        (beta1, beta2), lr = group["betas"], group["lr"]
        params = [_local(p) for p in bucket]
        first, second = ([_local(s[name]) for s in states] for name in ("exp_avg", "exp_avg_sq"))
        gradients = [_local(p.grad).to(m.dtype) for p, m in zip(bucket, first, strict=True)]
        counts = [int(s["step"].add_(1)) for s in states]  # on the host already

        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        del gradients
        updates = list(torch._foreach_sqrt(second))
        torch._foreach_add_(updates, group["eps"])
        torch._foreach_reciprocal_(updates)
        torch._foreach_mul_(updates, first)
        torch._foreach_mul_(updates, [-lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t) for t in counts])
        torch._foreach_mul_(updates, _scales(bucket, params, group["min_rms"]))
        if decay := lr * group["weight_decay"]:
            # p + u, then times (1 - decay), as one update: u (1 - decay) - decay p.
            torch._foreach_mul_(updates, 1 - decay)
            torch._foreach_add_(updates, [p.to(u.dtype) for p, u in zip(params, updates, strict=True)], alpha=-decay)
        if params[0].dtype == updates[0].dtype:
            torch._foreach_add_(params, updates)
        elif group["rounding"] == "kahan":
            add_kahan_(params, updates, [_local(s["compensation"]) for s in states])
        elif group["rounding"] == "stochastic":
            add_stochastic_(params, updates, (*place, counts[0], *_shard(bucket[0])))
        else:
            torch._foreach_add_(updates, [p.to(u.dtype) for p, u in zip(params, updates, strict=True)])
            torch._foreach_copy_(params, updates)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, with the moments as precise as they were saved.

        torch would round them to the parameters' dtype.
        """
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        order = [p for group in self.param_groups for p in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for p, key in zip(order, keys, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                if key in saved and name in saved[key]:
                    self.state[p][name] = saved[key][name].to(device=p.device, copy=True)


def _buckets(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Cut parameters into lists of one kind (device, dtype, sharding) with about as many elements each."""
    kinds: dict[Any, list[Tensor]] = {}
    for p in params:
        mesh = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
        kinds.setdefault((p.device, p.dtype, mesh), []).append(p)
    for alike in kinds.values():
        bucket: list[Tensor] = []
        elements = 0
        for p in alike:
            size = _local(p).numel()
            if bucket and elements + size > _BUCKET:
                yield bucket
                bucket, elements = [], 0
            bucket.append(p)
            elements += size
        yield bucket


def _local(tensor: Any) -> Tensor:
    """Give the part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _scales(bucket: list[Tensor], params: list[Tensor], min_rms: float) -> list[Tensor]:
    """Give max(min_rms, RMS(p)) for each parameter, 0-dim tensors on its device, over all of its shards."""
    precise = torch.promote_types(params[0].dtype, torch.float32)
    squares = torch.stack(torch._foreach_norm(params, 2, dtype=precise)).square()
    if isinstance(whole := bucket[0], DTensor):
        # Sum over the shards, of all parameters at once; replicas hold the same.
        placements = [Partial() if placement.is_shard() else Replicate() for placement in whole.placements]
        squares = DTensor.from_local(squares, whole.device_mesh, placements).full_tensor()
    sizes = torch.tensor([p.numel() for p in bucket], dtype=precise)  # from the host: no waiting
    rms = (squares / sizes.to(squares.device, non_blocking=True)).sqrt()
    return list(rms.clamp_(min=min_rms).unbind())


def _shard(p: Any) -> tuple[int, ...]:
    """Say which shard of a parameter this process holds; replicas of one shard have the same answer."""
    if not isinstance(p, DTensor):
        return ()
    coordinate = p.device_mesh.get_coordinate() or ()
    return tuple(c for c, placement in zip(coordinate, p.placements, strict=True) if placement.is_shard())
