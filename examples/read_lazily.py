"""Read single tensors of a checkpoint. Reads only the blocks that are needed, and checks each one.

python read_lazily.py outputs/plain/step-60
"""

import sys

import holdfast


def main() -> None:
    checkpoint = holdfast.open(sys.argv[1])
    for name, entry in checkpoint.tensors.items():
        print(f"{name:40} {entry.dtype:10} {list(entry.shape)}")

    weight = next(name for name, entry in checkpoint.tensors.items() if len(entry.shape) == 2)
    whole = checkpoint.read(weight)
    rows = checkpoint.read(weight, (slice(0, 2),))
    print(f"\n{weight}: mean {whole.mean().item():.6f}, first two rows {tuple(rows.shape)}")


if __name__ == "__main__":
    main()
