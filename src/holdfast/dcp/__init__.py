"""Holdfast as the storage of `torch.distributed.checkpoint` (DCP).

    dcp.save(state, storage_writer=holdfast.dcp.Writer(path))
    dcp.load(state, storage_reader=holdfast.dcp.Reader(path))

    Writer      saves into a hidden folder, and publishes it complete, with checksums
    Reader      checks every block that it reads, and runs no code of the checkpoint
    install     makes `FileSystemWriter` and `FileSystemReader` do the same, in this process
    uninstall   undoes `install`

DCP plans and stages. It calls Holdfast to lay out, write, publish and read. `dcp.async_save` works
too, with threads and with a process. Stock DCP reads what `Writer` saved, and `Reader` reads what
stock DCP saved.
"""

from holdfast.dcp.install import install, uninstall
from holdfast.dcp.reader import Reader
from holdfast.dcp.writer import Writer

__all__ = ["Reader", "Writer", "install", "uninstall"]
