"""The files that a process leaves if it is killed while it writes."""

import os
from pathlib import Path

import pytest


def killed_while_writing(write, monkeypatch):
    """Call `write` until its first file is complete under its temporary name; nothing is cleaned
    up.
    """

    def kill(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", kill)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            write()
