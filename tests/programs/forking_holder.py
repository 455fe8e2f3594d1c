"""A holder of a lock, which forks children that end before it, and after it."""

import os
import sys
from pathlib import Path

from posthoc_cli.errors import LockedError
from posthoc_cli.snapshots.directory import DirectoryLock

held = DirectoryLock(Path(sys.argv[1]))
child = os.fork()
if child == 0:
    held.release()
    sys.exit()
os.waitpid(child, 0)
try:
    DirectoryLock(Path(sys.argv[1]))
except LockedError as error:
    print(str(os.getpid()) in (Path(sys.argv[1]) / ".ema.lock").read_text() or error)
read, write = os.pipe()
if os.fork() == 0:
    os.close(write)
    os.read(read, 1)  # has the lock's file open until its parent ends
    os._exit(0)
held.release()
DirectoryLock(Path(sys.argv[1])).release()
