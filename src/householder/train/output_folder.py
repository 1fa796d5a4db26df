"""The folder that runs are written to: made ready, or refused with what can be done instead."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from householder.storage import write_atomically
from householder.train.errors import CheckpointError, ConfigError, OutputError
from householder.train.settings import describe_differences, to_toml

CONFIG_FILE = "config.toml"


@dataclass(frozen=True)
class OutputFolder:
    """A folder that one command writes to, and what tells it from a folder of somebody else.

    Attributes:
        path: the folder.
        header: the first line of its config file.
        is_ours: whether the command writes such a file or folder into it.
    """

    path: Path
    header: str
    is_ours: Callable[[Path], bool]

    def holds_run(self) -> bool:
        """Return whether the command wrote it."""
        config = self.path / CONFIG_FILE
        return config.is_file() and config.read_bytes().startswith(self.header.encode())

    def open(
        self,
        settings: Mapping[str, Any],
        *,
        resume: bool,
        overwrite: bool,
        check_same: Callable[[], None],
    ) -> None:
        """Make the folder ready and write the settings into it, or say why it cannot be.

        Args:
            settings: what will run there.
            resume: it must hold the same run; `check_same` raises if it does not.
            overwrite: what it holds is deleted, if the command wrote it.
            check_same: called with `resume`.

        Raises:
            ConfigError: both `resume` and `overwrite` are given.
            OutputError: it is occupied or cannot be written.
        """
        if resume and overwrite:
            raise ConfigError(
                "`resume` continues and `overwrite` deletes the same folder; give one"
            )
        try:
            if resume:
                check_same()
            elif overwrite and self._is_occupied():
                self._delete()
            else:
                self.require_free()
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / CONFIG_FILE, self.header + to_toml(settings))
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot write the output folder: {error.strerror}; choose another "
                "with --out"
            ) from error

    def require_free(self) -> None:
        """Raise OutputError if the folder holds anything, or is none."""
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(
                f"{self.path}: must be a folder, is a file; choose another with --out"
            )
        if self._is_occupied():
            raise OutputError(
                f"{self.path}: the output folder is occupied; continue with --resume, replace "
                "it with --overwrite, or choose another with --out"
            )

    def require_config(self) -> Path:
        """Return the path of the config file.

        Raises:
            OutputError: there is none, or it is another command's.
        """
        if not self.holds_run():
            raise OutputError(
                f"{self.path}: nothing to resume, there is no {CONFIG_FILE} of this command; start "
                "without --resume"
            )
        return self.path / CONFIG_FILE

    def require_same(self, different: Mapping[str, tuple[Any, Any]]) -> None:
        """Raise CheckpointError if what the folder holds differs in any setting."""
        if different:
            raise CheckpointError(
                f"{self.path}: what it holds does not fit the requested settings: "
                f"{describe_differences(different)}; drop these settings or use another folder"
            )

    def _is_occupied(self) -> bool:
        # The settings alone are what a run leaves that failed before it had anything to keep.
        names = [path.name for path in self._held()]
        return bool(names) and not (names == [CONFIG_FILE] and self.holds_run())

    def _held(self) -> list[Path]:
        # Names with a leading dot are what a kill leaves of a file being written.
        files = self.path.iterdir() if self.path.exists() else ()
        return [path for path in files if not path.name.startswith(".")]

    def _delete(self) -> None:
        """Delete what the command wrote; touch nothing when there is anything else."""
        if not self.holds_run():
            raise OutputError(
                f"{self.path}: nothing is deleted, because no {CONFIG_FILE} says that this command "
                "wrote the folder; choose another with --out"
            )
        config = self.path / CONFIG_FILE
        ours = [path for path in self._held() if path != config]
        foreign = sorted(path.name for path in ours if not self.is_ours(path))
        if foreign:
            raise OutputError(
                f"{self.path}: nothing is deleted, because {', '.join(foreign)} is not "
                "householder's; move it away or choose another folder with --out"
            )
        for path in ours:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        # Last: what a kill leaves half deleted can be overwritten again.
        config.unlink()
