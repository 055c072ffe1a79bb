"""A training loop that resumes. Kill it at any time, and run it again.

python plain_loop.py
"""

import torch

import holdfast

STEPS = 60


def main() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)

    config = holdfast.CheckpointConfig(
        enable=True,
        interval=10,
        keep_latest_k=3,
        keep_best_k=1,
        keep_best_metric="loss",
        last_save_model_only=False,
    )
    with holdfast.CheckpointManager(
        "outputs/plain", model=model, optimizers=optimizer, lr_schedulers=scheduler, config=config
    ) as manager:
        start = manager.load()
        print(f"starting at step {start}")
        for step in range(start + 1, STEPS + 1):
            inputs = torch.randn(16, 8)
            loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            manager.save(step, last_step=step == STEPS, metrics={"loss": loss.item()})
    print(f"weights: {sum(p.sum().item() for p in model.parameters()):.6f}")


if __name__ == "__main__":
    main()
