"""qrefta inspect and qrefta verify: a prepared folder, without loading the model."""

from pathlib import Path
from typing import TYPE_CHECKING

from qrefta.cli.console import console, quiet_libraries
from qrefta.cli.options import Folder, TrustRemoteCode

if TYPE_CHECKING:
    from qrefta.hf_config import QReftaConfig


def inspect(folder: Folder) -> None:
    """Show how a model was prepared, from its config.json alone."""
    from qrefta.tables import report_table, settings_table

    config = saved_config(folder)
    console.print(report_table([row.report() for row in config.stacks]))
    settings = {name: value for name, value in config.to_dict().items() if name != "stacks"}
    console.print(settings_table(settings))


def verify(folder: Folder, trust_remote_code: TrustRemoteCode = False) -> None:
    """Check every file of a prepared model against its checksums and its config.json."""
    quiet_libraries(data=False)
    from qrefta.model.whole_folder import verify as verify_folder
    from qrefta.tables import files_table

    files = verify_folder(folder, trust_remote_code=trust_remote_code)
    console.print(files_table(files))
    console.print(f"{folder} is whole: {len(files)} files")


def saved_config(folder: Path) -> "QReftaConfig":
    """How the model in a folder was prepared, from its config.json."""
    from qrefta.hf_config import QReftaConfig
    from qrefta.model.config_file import read_config

    return QReftaConfig(**read_config(folder)["quantization_config"])
