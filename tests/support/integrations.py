"""Training loops of other frameworks around a DistributedOptimizer, run by test_integrations.py under horovodrun.

None of them knows of Horovod: to each, every rank is a job of one process. So every rank gets its own share of the data
and its own folder for checkpoints, which hold the residuals of its rank.

Every job trains, saves in the middle, goes on to the end, and trains the second half once more from the checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from hvd_sketch import DistributedOptimizer, SketchConfig, broadcast_parameters, sketched_dim
from hvd_sketch.transport import Transport
from tests.support.toy import flat

STEPS = 12
BATCH = 16


class Questions(Dataset):
    """Points, labelled by the axis along which they are farthest out."""

    def __init__(self, samples: int) -> None:
        self.points = torch.randn(samples, 32, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.points[index], self.points[index, :10].argmax()


def classifier(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 1024), nn.ReLU(), nn.Linear(1024, 10))


def sketched(model: nn.Module, lr: float, transport: str | Transport = "horovod") -> DistributedOptimizer:
    sketch = SketchConfig.for_compression(10, sketched_dim(model.parameters()), momentum=0.0)
    inner = torch.optim.SGD(model.parameters(), lr=lr)
    return DistributedOptimizer(inner, model.named_parameters(), sketch=sketch, transport=transport)


def result(
    model: nn.Module, resumed: nn.Module, losses: list[float], optimizer: DistributedOptimizer
) -> dict[str, Any]:
    """What a rank reports.

    Args:
        model: trained without a break.
        resumed: trained from the checkpoint on.
        losses: of the first training, in order.
        optimizer: the first one, after its last step.
    """
    ledger = optimizer.ledger
    return {
        "parameters": flat(model),
        "resumed": flat(resumed),
        "losses": losses,
        "steps": ledger.totals().steps,
        "ratio": ledger.compression_ratio(),
    }


def in_own_folder(transport: Transport, job: str) -> dict[str, Any]:
    """What a job returns that saves into a folder of its rank's own."""
    with TemporaryDirectory() as folder:
        return globals()[job](transport, folder)


# --- Accelerate


def accelerate_job(transport: Transport, folder: str) -> dict[str, Any]:
    """The loop of Accelerate's documentation, with accumulation over two batches and clipping."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    data = Questions(STEPS * 2 * BATCH * transport.size)
    sampler = DistributedSampler(data, transport.size, transport.rank, shuffle=False)
    model = classifier(seed=transport.rank)
    broadcast_parameters(model.state_dict())
    optimizer = sketched(model, lr=1.0)
    # Accelerate's own wrapper is stepped; synchronize() is ours.
    model, stepped, loader = accelerator.prepare(model, optimizer, DataLoader(data, BATCH, sampler=sampler))
    checkpoint = Path(folder) / "checkpoint"
    losses: list[float] = []

    def train(start: int, save_at: int) -> None:
        for i, (points, labels) in enumerate(loader):
            if i == save_at:
                accelerator.save_state(str(checkpoint))
            if i < start:
                continue
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(points), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    optimizer.synchronize()
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                with optimizer.skip_synchronize():
                    stepped.step()
                stepped.zero_grad()
            losses.append(loss.item())

    train(start=0, save_at=STEPS)
    trained = classifier(seed=0)
    trained.load_state_dict(model.state_dict())
    accelerator.load_state(str(checkpoint))
    train(start=STEPS, save_at=-1)
    return result(trained, model, losses, optimizer)


# --- Trainer of Hugging Face


class Counting(Dataset):
    """Sequences in which every token is the one before plus one."""

    def __init__(self, samples: int) -> None:
        starts = torch.randint(64, (samples, 1), generator=torch.Generator().manual_seed(0))
        self.tokens = (starts + torch.arange(16)) % 64

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def trainer_job(transport: Transport, folder: str) -> dict[str, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    rank, size = transport.rank, transport.size
    data = Counting(STEPS * BATCH * size)
    share = Subset(data, range(rank, len(data), size))
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        max_grad_norm=0.0,  # would clip the gradients of each rank before they are averaged
        save_steps=STEPS // 2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )

    def new_trainer() -> Trainer:
        torch.manual_seed(rank)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=64, n_layer=1, n_head=2))
        broadcast_parameters(model.state_dict())
        return Trainer(model, arguments, train_dataset=share, optimizers=(sketched(model, lr=1.0), None))

    first, second = new_trainer(), new_trainer()
    first.train()
    second.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}")
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    return result(first.model, second.model, losses, first.optimizer.optimizer)


# --- Lightning

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def lightning_job(transport: Transport, folder: str) -> dict[str, Any]:
    import lightning

    rank, size = transport.rank, transport.size

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = classifier(seed=rank)
            self.losses: list[float] = []

        def configure_optimizers(self) -> torch.optim.Optimizer:
            broadcast_parameters(self.state_dict())
            return sketched(self, lr=1.0)

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: float | None, gradient_clip_algorithm: str | None
        ) -> None:
            optimizer.synchronize()  # so that the averaged gradients are clipped
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    data = Questions(STEPS * BATCH * size)

    def new_loader() -> DataLoader:
        return DataLoader(data, BATCH, sampler=DistributedSampler(data, size, rank, shuffle=False))

    def new_trainer(epochs: int) -> lightning.Trainer:
        return lightning.Trainer(
            max_epochs=epochs,
            gradient_clip_val=1.0,
            default_root_dir=folder,
            use_distributed_sampler=False,
            **QUIET,
        )

    first, second = Module(), Module()
    half = new_trainer(1)
    half.fit(first, new_loader())
    checkpoint = f"{folder}/half.ckpt"
    half.save_checkpoint(checkpoint)
    whole = new_trainer(2)
    whole.fit(first, new_loader(), ckpt_path=checkpoint)
    new_trainer(2).fit(second, new_loader(), ckpt_path=checkpoint)
    return result(first, second, first.losses, whole.optimizers[0])


def lightning_manual_job(transport: Transport) -> dict[str, Any]:
    """Manual optimization, where the module gets Lightning's own object, of a class that inherits from ours."""
    import lightning

    class Module(lightning.LightningModule):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.model = classifier(seed=0)
            self.norms: list[float] = []

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sketched(self, lr=1.0, transport=transport)

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self.model(batch[0]), batch[1]))
            optimizer.synchronize()
            nn.utils.clip_grad_norm_(self.parameters(), 0.1)
            before = flat(self)
            with optimizer.skip_synchronize():
                optimizer.step()
            self.norms.append(float((flat(self) - before).norm()))

    module = Module()
    trainer = lightning.Trainer(max_steps=STEPS, enable_checkpointing=False, **QUIET)
    trainer.fit(module, DataLoader(Questions(STEPS * BATCH), BATCH))
    return {"exchanges": trainer.optimizers[0].ledger.totals().steps, "norms": module.norms}
