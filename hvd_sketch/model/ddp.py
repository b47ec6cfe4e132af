"""DDP's communication hook: what a backward pass leaves is exchanged at its end, in place of DDP's own allreduce."""

# Without `from __future__ import annotations`: DDP compares the annotations of a hook, and strings are refused.
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hvd_sketch.exchange.setup import refused_together
from hvd_sketch.model.optimizer import DistributedOptimizer
from hvd_sketch.model.parameters import name_parameters


class DDPState:
    """What :func:`ddp_hook` keeps, for a model that must stay in torch's ``DistributedDataParallel``::

        model = DistributedDataParallel(model)
        optimizer = DistributedOptimizer(optimizer, model.named_parameters(), compression)
        model.register_comm_hook(DDPState(model, optimizer), ddp_hook)

    ``backward()`` then averages the gradients, and ``optimizer.step()`` takes them as they are. Residuals, checkpoints,
    ledger and skipped steps are those of the optimizer. Backward passes under ``model.no_sync()`` exchange nothing, and
    their gradients go along with the next one that does.

    Every backward pass outside of ``no_sync()`` is an exchange of its own, also where several come before a step.

    In ``with model.join():`` a rank without data contributes what is left in its residual, and the mean is over all
    ranks throughout. It takes over the optimizer's state of one that left last with the first gradients that it has
    again, or in ``save_checkpoint`` before. With ``levels=2`` that is refused on every rank. The optimizer's own
    ``join()`` is refused: DDP has collectives of its own.

    Args:
        model: a ``DistributedDataParallel`` on every rank, also as ``torch.compile`` wraps it.
        optimizer: holds the parameters that the model's DDP averages, all of them and no others, and exchanges over the
            ranks of its process group: ``transport=TorchTransport(model.process_group)``.
        scaler: the ``GradScaler`` of the losses, so that residuals do not carry its scale. Call
            ``scaler.unscale_(optimizer)`` before ``scaler.step(optimizer)``.

    Raises:
        ValueError: on every rank: ``model`` is no DDP model, has a hook already, holds other parameters than the
            optimizer or sparse gradients, or has another process group.

    Communication: the constructor is collective, all ranks of the optimizer's transport.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: DistributedOptimizer,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        with refused_together(optimizer.transport):
            plain = getattr(model, "_orig_mod", model)  # in torch.compile's wrapper
            _check(plain, optimizer)
        optimizer.expect_hook()
        if plain is model:  # a compiled model would take the hook into its graphs
            plain.register_forward_pre_hook(lambda *_: optimizer.begin_pass())
        self.optimizer = optimizer
        self._scaler = scaler
        self._places: list[tuple[Tensor, Tensor]] = []  # parameters of this pass, and their gradients in DDP's buckets

    def take(self, bucket: dist.GradBucket) -> None:
        """Take in a bucket; after the last one of a backward pass average the gradients, into all buckets.

        Buckets come in one order on all ranks, but change after the first pass. So nothing is made of their order.

        Communication: with the last bucket collective, all ranks. Modifies ``p.grad``, the buckets and the residuals.
        """
        self._places += [(p, _as_strided(g, p)) for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True)]
        if bucket.is_last():
            places, self._places = self._places, []
            self._average(places)

    @torch.no_grad()
    def _average(self, places: list[tuple[Tensor, Tensor]]) -> None:
        had_gradient = [parameter.grad is not None for parameter, _ in places]
        self.optimizer.average_in_backward(self._scaler.get_scale() if self._scaler is not None else None)
        for (parameter, in_bucket), had in zip(places, had_gradient, strict=True):
            if parameter.grad is None:
                continue
            if parameter.grad.data_ptr() != in_bucket.data_ptr():  # equal with gradient_as_bucket_view
                in_bucket.copy_(parameter.grad)
            if not had:
                parameter.grad = None  # DDP makes one, a view of its bucket where that was asked for


def ddp_hook(state: DDPState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """For ``model.register_comm_hook(DDPState(model, optimizer), ddp_hook)``.

    Args:
        state: of this model.
        bucket: gradients of some parameters, ready on this rank.

    Returns:
        A finished future of the bucket's memory. The average is there once the last bucket has been taken, and DDP does
        not read it before.

    Communication: with the last bucket of a backward pass collective, all ranks.
    """
    state.take(bucket)
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def _as_strided(in_bucket: Tensor, parameter: Tensor) -> Tensor:
    """Memory of a gradient in a bucket, with the strides that DDP gives it: the parameter's, if those have no gaps."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    if reach != parameter.numel():
        return in_bucket
    return in_bucket.as_strided(parameter.shape, parameter.stride())


def _check(model: object, optimizer: DistributedOptimizer) -> None:
    """Refuse a model whose gradients cannot be exchanged in its hook. Raises ValueError. Communication: none."""
    if not isinstance(model, DistributedDataParallel):
        raise ValueError(
            f"model must be a DistributedDataParallel, got {type(model).__name__}: a plain model needs no hook, "
            "optimizer.step() exchanges its gradients"
        )
    if not isinstance(optimizer, DistributedOptimizer):
        raise ValueError(
            f"optimizer must be a DistributedOptimizer, got {type(optimizer).__name__}: only that exchanges gradients, "
            "as DDP's hook does"
        )
    if getattr(model, "_comm_hooks", None):
        raise ValueError(
            "the model's DDP has a hook already, and takes one only: after wrapping another optimizer make a new "
            "DistributedDataParallel(model.module), too, and register the hook with that"
        )
    comm, group = optimizer.transport, model.process_group
    here, there = (comm.rank, comm.size), (dist.get_rank(group), dist.get_world_size(group))
    if here != there:
        raise ValueError(
            f"the optimizer exchanges as rank {here[0]} of {here[1]}, and the model's DDP is rank {there[0]} of "
            f"{there[1]}: give DistributedOptimizer transport=TorchTransport(model.process_group)"
        )
    _check_same_parameters(model, optimizer)
    sparse = [name for name, module in model.named_modules() if _has_sparse_gradient(module)]
    if sparse:
        raise ValueError(
            f"{', '.join(sparse[:5])} has sparse gradients, which DDP's hook cannot hand on as dense ones: build it "
            "with sparse=False, or leave the hook out and run forward and backward passes inside model.no_sync()"
        )


def _check_same_parameters(model: DistributedDataParallel, optimizer: DistributedOptimizer) -> None:
    ignored = {f"module.{name}" for name in model.parameters_to_ignore}
    of_model = {p: name for name, p in model.named_parameters() if p.requires_grad and name not in ignored}
    exchanged = {parameter: place for place, parameter in name_parameters(optimizer, None)}
    left_out = [name for parameter, name in of_model.items() if parameter not in exchanged]
    others = [place for parameter, place in exchanged.items() if parameter not in of_model]
    if left_out or others:
        raise ValueError(
            f"the model and the optimizer must have the same parameters: {', '.join(left_out[:5]) or 'none'} of the "
            f"model are not in the optimizer, {', '.join(others[:5]) or 'none'} of the optimizer are not averaged by "
            "this DDP. Give one optimizer all of them, or leave the hook out and run forward and backward passes "
            "inside model.no_sync()"
        )


def _has_sparse_gradient(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
