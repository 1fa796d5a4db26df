"""Files that are either whole or absent: see `householder.storage`, their home."""

from householder.storage import fsync_path, sha256, write_atomically

__all__ = ["fsync_path", "sha256", "write_atomically"]
