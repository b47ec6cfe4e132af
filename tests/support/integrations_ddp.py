"""Training loops of other frameworks under torchrun, where they wrap the model in DDP: its hook exchanges.

Each shards the data itself. Every job trains, saves in the middle, and trains the second half once more from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hvd_sketch import DDPState, DistributedOptimizer, ddp_hook, load_checkpoint, save_checkpoint
from hvd_sketch.transport import Transport
from hvd_sketch.transport.base import gather_texts
from tests.support.integrations import BATCH, QUIET, STEPS, Counting, Questions, classifier, result, sketched

HALF = STEPS // 2


@contextmanager
def shared_folder(transport: Transport) -> Iterator[str]:
    """One of rank 0's, for all ranks."""
    with TemporaryDirectory() as own:
        yield gather_texts(transport, own)[0]
        transport.barrier()


def hook(model: Any, optimizer: DistributedOptimizer) -> None:
    model.register_comm_hook(DDPState(model, optimizer), ddp_hook)


def accelerate_job(transport: Transport) -> dict[str, Any]:
    from accelerate import Accelerator
    from accelerate.state import GradientState

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)

    def new_model() -> tuple[nn.Module, DistributedOptimizer, Any, Any]:
        model = classifier(seed=transport.rank)
        optimizer = sketched(model, 1.0, transport)
        data = DataLoader(Questions(STEPS * 2 * BATCH * transport.size), BATCH)
        model, stepped, loader = accelerator.prepare(model, optimizer, data)
        hook(model, optimizer)
        return model, optimizer, stepped, loader

    losses: list[float] = []

    def train(model: nn.Module, optimizer: DistributedOptimizer, stepped: Any, loader: Any, start: int) -> None:
        for i, (points, labels) in enumerate(loader):
            if i == 2 * HALF and not start:
                save_checkpoint(folder, model, optimizer)
            if i < start:
                continue
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(points), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                stepped.step()
                stepped.zero_grad()
            losses.append(loss.item())

    with shared_folder(transport) as folder:
        first, second = new_model(), new_model()
        train(*first, start=0)
        assert load_checkpoint(folder, second[0], second[1]) is not None
        train(*second, start=2 * HALF)
    GradientState._reset_state()  # one object for all of a process: the next job would accumulate, too
    return result(first[0], second[0], losses[: 2 * STEPS], first[1])


def trainer_job(transport: Transport) -> dict[str, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    class Recording(Trainer):
        def training_step(self, *arguments: Any, **options: Any) -> Tensor:
            loss = super().training_step(*arguments, **options)
            losses.append(loss.item())  # what it logs is a mean over the ranks
            return loss

    losses: list[float] = []

    class Exchange(TrainerCallback):
        trainer: Any
        goes_on = False

        def __init__(self, optimizer: DistributedOptimizer) -> None:
            self.optimizer = optimizer

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            model = self.trainer.model_wrapped
            hook(model, self.optimizer)
            if self.goes_on:
                step = self.trainer.state.global_step
                done = load_checkpoint(f"{folder}/exchange", model, self.optimizer, step=step)
                assert done is not None and step == HALF
                self.trainer.lr_scheduler.load_state_dict(done.extra)

        def on_save(self, *_: Any, **__: Any) -> None:
            if not self.goes_on and self.trainer.state.global_step == HALF:
                schedule = self.trainer.lr_scheduler.state_dict()
                save_checkpoint(f"{folder}/exchange", self.trainer.model_wrapped, self.optimizer, extra=schedule)

    def new_trainer() -> tuple[Recording, Exchange]:
        torch.manual_seed(transport.rank)
        sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 64, "n_layer": 1, "n_head": 2}
        without_dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}  # its states are not in the checkpoint
        model = GPT2LMHeadModel(GPT2Config(**sizes, **without_dropout))
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            save_steps=HALF,
            save_only_model=True,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        exchange = Exchange(sketched(model, 1.0, transport))
        data = Counting(STEPS * BATCH * transport.size)
        trainer = Recording(
            model, arguments, train_dataset=data, optimizers=(exchange.optimizer, None), callbacks=[exchange]
        )
        exchange.trainer = trainer
        return trainer, exchange

    with shared_folder(transport) as folder:
        (first, exchange), (second, goes_on) = new_trainer(), new_trainer()
        first.train()
        goes_on.goes_on = True
        second.train(resume_from_checkpoint=f"{folder}/checkpoint-{HALF}")
    return result(first.model, second.model, losses[:STEPS], exchange.optimizer)


def lightning_job(transport: Transport) -> dict[str, Any]:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = classifier(seed=transport.rank)
            self.losses: list[float] = []

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sketched(self, 1.0, transport)

        def on_train_start(self) -> None:
            hook(self.trainer.strategy.model, self.trainer.optimizers[0])

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            if "optimizer_states" in checkpoint:
                checkpoint["optimizer_states"] = [self.trainer.optimizers[0].state_dict(consolidated=True)]

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

    def fit(module: Module, epochs: int, checkpoint: str | None = None) -> Any:
        trainer = lightning.Trainer(
            max_epochs=epochs,
            gradient_clip_val=1.0,
            default_root_dir=folder,
            strategy="ddp",
            **QUIET | {"devices": transport.size},
        )
        data = DataLoader(Questions(STEPS * BATCH * transport.size), BATCH)
        trainer.fit(module, data, ckpt_path=checkpoint)
        return trainer

    with shared_folder(transport) as folder:
        first, second = Module(), Module()
        trainer = fit(first, 1)
        trainer.save_checkpoint(f"{folder}/half.ckpt")
        whole = fit(first, 2, f"{folder}/half.ckpt")
        fit(second, 2, f"{folder}/half.ckpt")
    return result(first, second, first.losses, whole.optimizers[0])
