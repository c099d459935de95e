"""DeepSpeed, started quietly in this process's group; `python -m` this module compiles what it would compile then."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
from pathlib import Path

from mvd_fast.errors import UserError

from . import launch, messages

# DeepSpeed's communication between ranks on CPUs, compiled at its first use for the torch of this environment.
EXTENSION = "deepspeed_shm_comm"


def start_deepspeed() -> None:
    """DeepSpeed takes over this process's group. Says so first where that takes a minute or two to compile."""
    if is_compilation_due() and launch.rank() == 0:
        messages.say(
            "mvd-fast: compiling DeepSpeed's communication between CPU ranks, once;",
            "  this takes a minute or two, and `make setup` does it beforehand",
        )
    import deepspeed

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it praises itself on every rank
            deepspeed.init_distributed()
    except RuntimeError as error:
        if "ninja" in str(error).lower() or "building extension" in str(error).lower():
            raise UserError(
                f"DeepSpeed cannot compile its communication between CPU ranks ({str(error).splitlines()[0]}); install "
                "g++ and ninja"
            ) from error
        raise


def is_compilation_due() -> bool:
    """Whether DeepSpeed will compile here when it starts; from now on in the `extension_folder`."""
    if launch.device().type != "cpu":
        return False
    return not (extension_folder() / f"{EXTENSION}.so").exists()


def extension_folder() -> Path:
    """Where torch keeps the extension. It is part of this environment where that can be written to.

    torch's own default is one folder for all environments of a user: each compiles anew what another has compiled, as
    its path differs. So do links to one environment, hence a folder for each path.
    """
    own = Path(sys.prefix) / "torch_extensions"
    if os.access(own if own.exists() else sys.prefix, os.W_OK):
        path = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(own / path))
    from torch.utils import cpp_extension

    return Path(cpp_extension._get_build_directory(EXTENSION, verbose=False))


def compile_communication() -> None:
    """For set-up: so that no run has to wait for it. Nothing to do where there is a GPU."""
    launch.choose_accelerator(os.environ)
    if is_compilation_due():
        from deepspeed.accelerator import get_accelerator

        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)


if __name__ == "__main__":
    compile_communication()
